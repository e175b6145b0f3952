"""Write the reference part of docs/api.md from the routes and contracts; with --check, fail if it is not so.

Run as `make api-reference`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from grpc_tools import protoc
from redis.asyncio import Redis

from trireme.bus.connection import Keys
from trireme.gateway.identity import gate_of
from trireme.gateway.metrics import Metrics
from trireme.gateway.openai_api.app import openai_app
from trireme.gateway.openai_api.background import Background
from trireme.gateway.openai_api.openapi import description_of
from trireme.gateway.settings import Settings
from trireme.runtime.health import HealthReporter

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
MARK = "<!-- Below: made by `make api-reference`. -->"
CONTRACTS = ("trireme/wire/inference/v1/inference.proto", "trireme/wire/oip/v2/oip.proto")


def http_description() -> dict[str, Any]:
    """What a gateway serves at /openapi.json. No handler is called, so that nothing need run behind them."""
    settings = Settings(fleet=Path("none"))
    core: Any = SimpleNamespace(metrics=Metrics(), limits=settings.limits(), quotas=None)
    links: Any = None
    background = Background(Redis(), Keys("none"), settings, core, gateway_id="none")
    app = openai_app(settings, core, links, HealthReporter({}), background.routes(), gate_of(settings))
    return description_of(app.router.routes())


def http_part(document: Mapping[str, Any]) -> Iterator[str]:
    yield "\n## HTTP\n"
    yield "| call | what it does | takes | gives |\n|---|---|---|---|"
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            gives = operation["responses"]["200"]["content"]
            names = [
                _schema(content.get("x-event") or content["schema"], kind) for kind, content in gives.items()
            ]
            taken = operation.get("requestBody", {"content": {}})["content"]
            takes = [_schema(content["schema"], kind) for kind, content in taken.items()]
            takes += [f"`?{p['name']}`" for p in operation.get("parameters", ()) if p["in"] == "query"]
            row = (f"`{method.upper()} {path}`", operation["summary"], ", ".join(takes), ", ".join(names))
            yield f"| {' | '.join(row)} |"
    yield "\nHeaders of calls with a body:\n\n| header | meaning |\n|---|---|"
    chat = document["paths"]["/v1/chat/completions"]["post"]
    for parameter in chat["parameters"]:
        yield f"| `{parameter['name']}` | {parameter['description']} |"
    schemas = document["components"]["schemas"]
    for name in sorted(schemas):
        yield from _object(name, schemas[name])


def _schema(schema: Mapping[str, Any], kind: str) -> str:
    if "$ref" not in schema:
        return f"`{kind}`"
    name = str(schema["$ref"]).rpartition("/")[2]
    link = f"[{name}](#{name.lower()})"
    return f"a stream of {link}" if kind == "text/event-stream" else link


def _object(name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    yield f"\n### {name}\n"
    if schema.get("description"):
        yield f"{_one_line(schema['description'])}\n"
    yield "| field | type | |\n|---|---|---|"
    needed = schema.get("required", ())
    for field, found in schema.get("properties", {}).items():
        words = [_one_line(found.get("description", ""))]
        if field in needed:
            words.insert(0, "always")
        yield f"| `{field}` | {_type(found)} | {'. '.join(word for word in words if word)} |"


def _type(schema: Mapping[str, Any]) -> str:
    """A type in a few words; null is what may be left out, and is not said."""
    if "$ref" in schema:
        return _schema(schema, "application/json")
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "anyOf" in schema:
        kinds = [_type(one) for one in schema["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds)) or "null"
    kind = str(schema.get("type", "any"))
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}"
    limits = [
        f"{sign} {schema[key]}"
        for key, sign in (("minimum", "≥"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if key in schema
    ]
    return " ".join([kind, ", ".join(limits)]).strip()


def grpc_part() -> Iterator[str]:
    with tempfile.NamedTemporaryFile(suffix=".pb") as out:
        arguments = [
            "protoc",
            f"-I{ROOT / 'proto'}",
            "--include_source_info",
            f"--descriptor_set_out={out.name}",
        ]
        assert protoc.main([*arguments, *CONTRACTS]) == 0
        files = FileDescriptorSet.FromString(Path(out.name).read_bytes()).file
    for file in files:
        comments = {
            tuple(place.path): _one_line(place.leading_comments) for place in file.source_code_info.location
        }
        for number, service in enumerate(file.service):
            yield f"\n## gRPC: `{file.package}.{service.name}`\n"
            yield f"{comments[6, number]} Contract: [`{file.name}`](../proto/{file.name}).\n"
            yield "| call | takes | gives | |\n|---|---|---|---|"
            for index, method in enumerate(service.method):
                takes = ("stream of " if method.client_streaming else "") + _named(method.input_type)
                gives = ("stream of " if method.server_streaming else "") + _named(method.output_type)
                words = comments[6, number, 2, index].removeprefix(method.name).strip()
                yield f"| `{method.name}` | {takes} | {gives} | {words} |"
        yield from _messages(file, comments)


def _messages(file: FileDescriptorProto, comments: Mapping[tuple[int, ...], str]) -> Iterator[str]:
    for number, message in enumerate(file.message_type):
        if message.field:
            yield f"\n### {message.name}\n\n{comments[4, number]}\n"
            yield "| field | type | |\n|---|---|---|"
            yield from _fields(message, (4, number), comments)
    for number, enum in enumerate(file.enum_type):
        yield f"\n### {enum.name}\n\n{comments[5, number]}\n\n| value | |\n|---|---|"
        for index, value in enumerate(enum.value):
            yield f"| `{value.name}` = {value.number} | {comments[5, number, 2, index]} |"


def _fields(
    message: DescriptorProto,
    place: tuple[int, ...],
    comments: Mapping[tuple[int, ...], str],
    prefix: str = "",
) -> Iterator[str]:
    maps = {inner.name for inner in message.nested_type if inner.options.map_entry}
    for index, field in enumerate(message.field):
        yield f"| `{prefix}{field.name}` | {_kind(field, maps)} | {comments[(*place, 2, index)]} |"
        for number, inner in enumerate(message.nested_type):
            if inner.name not in maps and field.type_name.endswith(f".{message.name}.{inner.name}"):
                yield from _fields(inner, (*place, 3, number), comments, f"{prefix}{field.name}.")


def _kind(field: FieldDescriptorProto, maps: Iterable[str]) -> str:
    name = field.type_name.rpartition(".")[2]
    if name in maps:
        return "map"
    word = name or FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    return f"list of {word}" if field.label == FieldDescriptorProto.LABEL_REPEATED else word


def _named(type_name: str) -> str:
    return f"`{type_name.rpartition('.')[2]}`"


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> int:
    page = PAGE.read_text(encoding="utf-8")
    prose = page.partition(MARK)[0]
    wanted = f"{prose}{MARK}\n" + "\n".join([*http_part(http_description()), *grpc_part()]) + "\n"
    if "--check" in sys.argv:
        if page != wanted:
            print("docs/api.md is not what is served: run `make api-reference`", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
