"""Holds what a gateway answers to the description that it serves of itself."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx2 as httpx
from jsonschema import Draft202012Validator


class OpenApiChecks:
    """The description of one gateway, and the operations that were held to it."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.seen: set[tuple[str, str, str]] = set()
        """Method, path and status."""
        self._validators: dict[str, Draft202012Validator] = {}
        self._patterns = [(re.compile(re.sub(r"{[^}]+}", "[^/]+", path)), path) for path in document["paths"]]

    def check(self, method: str, path: str, status: int, content_type: str, body: bytes) -> None:
        """Raise AssertionError where an answer is none of those that are described."""
        found = next((known for pattern, known in self._patterns if pattern.fullmatch(path)), None)
        operation = None if found is None else self.document["paths"][found].get(method.lower())
        if operation is None:
            assert status in (401, 403, 404, 405, 429), (method, path, status)
            return
        described = operation["responses"].get(str(status))
        assert described is not None, f"{method} {found} does not say that it answers {status}"
        kind = content_type.split(";")[0]
        assert kind in described["content"], f"{method} {found} {status} does not say that it gives {kind}"
        self.seen.add((method, str(found), str(status)))
        if kind == "application/json":
            self.validate(described["content"][kind]["schema"], json.loads(body))

    def check_events(self, path: str, body: bytes) -> list[Any]:
        """The events of a stream, each held to what the description says of them."""
        schema = self.document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
        lines = [line.removeprefix(b"data: ") for line in body.splitlines() if line.startswith(b"data: ")]
        assert lines.pop() == b"[DONE]"
        events = [json.loads(line) for line in lines]
        for event in events:
            self.validate(schema["x-event"], event)
        return events

    def validate(self, schema: dict[str, Any], value: Any) -> None:
        """Raise AssertionError unless the value is what the schema says."""
        key = json.dumps(schema)
        if key not in self._validators:
            whole = {**schema, "components": self.document["components"]}
            self._validators[key] = Draft202012Validator(whole)
        errors = [f"{error.json_path}: {error.message}" for error in self._validators[key].iter_errors(value)]
        assert not errors, f"{schema}: {errors[:5]}"


class CheckingTransport(httpx.AsyncBaseTransport):
    """Sends requests to a gateway, and holds whole answers to its description."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._inner = httpx.AsyncHTTPTransport()
        self._checks: OpenApiChecks | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self._inner.handle_async_request(request)
        if response.headers.get("content-type", "").startswith("application/json"):
            body = await response.aread()
            await self.check(request.method, request.url.path, response, body)
        return response

    async def check(self, method: str, path: str, response: httpx.Response, body: bytes) -> None:
        if self._checks is None:
            asked = await self._inner.handle_async_request(httpx.Request("GET", f"{self._url}/openapi.json"))
            self._checks = OpenApiChecks(json.loads(await asked.aread()))
        self._checks.check(method, path, response.status_code, response.headers["content-type"], body)

    async def aclose(self) -> None:
        await self._inner.aclose()
