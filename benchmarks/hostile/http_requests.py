"""Requests to every route that /openapi.json describes: schemathesis draws them, right and wrong ones."""

from __future__ import annotations

from typing import Any

import requests
import schemathesis
from schemathesis import GenerationMode

from benchmarks.hostile.plan import drawn
from benchmarks.hostile.verdicts import Verdicts

TIMEOUT_S = 60.0
FEW_TOKENS = 16


def ask_all(url: str, models: list[str], verdicts: Verdicts, *, each: int, seed: int) -> None:
    """Send `each` right and `each` wrong requests to each operation.

    An answer must be one that the description has for that operation, and no 5xx.
    """
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    session = requests.Session()
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.NEGATIVE and not _can_be_wrong(operation.definition.raw):
                continue
            cases = list(drawn(operation.as_strategy(generation_mode=mode), each, seed=seed))
            for number, case in enumerate(cases):
                if number % 4 and isinstance(case.body, dict) and "model" in case.body:
                    case.body["model"] = models[number % len(models)]
                    if mode is GenerationMode.POSITIVE:
                        _shorten(operation.path, case.body)
                _ask(session, operation, case, verdicts, kind=f"http {mode.value}")


def _shorten(path: str, body: dict[str, Any]) -> None:
    """A request in order is answered: not with all tokens that the context has room for."""
    if path == "/v1/responses":
        body["max_output_tokens"] = FEW_TOKENS
    elif "completions" in path:
        body.pop("max_completion_tokens", None)
        body["max_tokens"] = FEW_TOKENS


def _can_be_wrong(described: dict[str, Any]) -> bool:
    """Any text is a name, so that a path alone cannot be."""
    return "requestBody" in described or any(p["in"] != "path" for p in described.get("parameters", ()))


def _ask(session: requests.Session, operation: Any, case: Any, verdicts: Verdicts, *, kind: str) -> None:
    try:
        response = case.call(session=session, timeout=TIMEOUT_S)
    except requests.Timeout:
        verdicts.note(kind, "silence", fault=f"{operation.label} {case.as_curl_command()}")
        return
    except (requests.RequestException, UnicodeError, ValueError):
        verdicts.note(kind, "not sent")  # The client library refuses to send it.
        return
    fault = ""
    described = {"default", str(response.status_code)} & set(operation.definition.raw["responses"])
    if response.status_code >= 500 or not (described or response.status_code == 405):
        fault = f"{operation.label} {case.as_curl_command()} ({response.text[:200]})"
    verdicts.note(kind, str(response.status_code), fault=fault)
