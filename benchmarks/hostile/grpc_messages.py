"""Messages for every RPC that reflection names: well-formed ones of any content, and bytes that are none.

The server's own descriptors say what a message may have, so that a new RPC is asked, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from hypothesis import strategies as st

from benchmarks.hostile.plan import drawn
from benchmarks.hostile.verdicts import Verdicts

CALL_S = 2.0
"""A call's deadline; requests that turn out to be in order end by it."""
WATCH_S = 0.1
"""For methods that never end by themselves."""
ENDLESS = ("/grpc.health.v1.Health/Watch",)
MOST_RESPONSES = 64
FAULTS = frozenset(
    {
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
        grpc.StatusCode.ABORTED,
    }
)
"""What a server says of itself; none of it is a client's doing."""

_INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-3, 9),
}
_DEPTH = 4


@dataclass(frozen=True, slots=True)
class Method:
    """One RPC."""

    path: str
    request: Descriptor
    client_streams: bool
    server_streams: bool


def methods(channel: grpc.Channel) -> list[Method]:
    """Every RPC that the server's reflection names."""
    database = ProtoReflectionDescriptorDatabase(channel)
    pool = DescriptorPool(database)
    found: list[Method] = []
    for name in sorted(database.get_services()):
        service = pool.FindServiceByName(name)
        found += [_method(name, method) for method in service.methods]
    return found


def _method(service: str, method: MethodDescriptor) -> Method:
    return Method(
        f"/{service}/{method.name}", method.input_type, method.client_streaming, method.server_streaming
    )


class Words:
    """Strategies for messages, with the names of the fleet among their texts."""

    def __init__(self, models: list[str]) -> None:
        self._texts = st.sampled_from(
            [*models * 6, "", "x", "text_input", "BYTES", "1", "\u0000", "é" * 40, "a" * 3000]
        ) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)

    def message(self, descriptor: Descriptor, depth: int = 0) -> st.SearchStrategy[Any]:
        """A message of any content; below some depth they are empty."""
        if depth >= _DEPTH:
            return st.just(GetMessageClass(descriptor)())
        parts = {field.name: self._field(field, depth) for field in descriptor.fields}
        return st.fixed_dictionaries({}, optional=parts).map(lambda values: _filled(descriptor, values))

    def _field(self, field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
        kind = field.message_type
        if kind is not None and kind.GetOptions().map_entry:
            keys = self._value(kind.fields_by_name["key"], depth + 1)
            return st.dictionaries(keys, self._value(kind.fields_by_name["value"], depth + 1), max_size=2)
        one = self._value(field, depth + 1)
        return st.lists(one, max_size=3) if field.is_repeated else one

    def _value(self, field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
        match field.cpp_type:
            case FieldDescriptor.CPPTYPE_MESSAGE:
                return st.deferred(lambda: self.message(field.message_type, depth))
            case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
                return st.binary(max_size=12)
            case FieldDescriptor.CPPTYPE_STRING:
                return self._texts
            case FieldDescriptor.CPPTYPE_BOOL:
                return st.booleans()
            case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
                return st.floats(width=32) | st.sampled_from([0.0, 1.0])
            case _:
                low, high = _INTEGERS[field.cpp_type]
                return st.integers(low, high) | st.integers(max(low, -2), 40)


def _filled(descriptor: Descriptor, values: dict[str, Any]) -> Any:
    message = GetMessageClass(descriptor)()
    for name, value in values.items():
        field = descriptor.fields_by_name[name]
        target = getattr(message, name)
        if isinstance(value, dict):
            for key, one in value.items():
                if hasattr(one, "SerializeToString"):
                    target[key].CopyFrom(one)
                else:
                    target[key] = one
        elif field.is_repeated:
            target.extend(value)
        elif field.message_type is not None:
            target.CopyFrom(value)
        else:
            setattr(message, name, value)
    return message


@st.composite
def torn(draw: st.DrawFn, words: Words, descriptor: Descriptor) -> bytes:
    """The bytes of a message, with some changed, cut off or put in."""
    raw = bytearray(draw(words.message(descriptor)).SerializeToString())
    for _ in range(draw(st.integers(1, 3))):
        position = draw(st.integers(0, len(raw)))
        raw[position : position + draw(st.integers(0, 9))] = draw(st.binary(max_size=6))
    return bytes(raw)


def ask_all(
    channel: grpc.Channel, asked: list[Method], words: Words, verdicts: Verdicts, *, each: int, seed: int
) -> None:
    """Send `each` messages to each method, and as many that are torn."""
    for method in asked:
        whole = words.message(method.request).map(lambda message: message.SerializeToString())
        for kind, strategy in (("message", whole), ("torn", torn(words, method.request))):
            batches = st.lists(strategy, min_size=1, max_size=3 if method.client_streams else 1)
            for batch in drawn(batches, each, seed=seed):
                call(channel, method, batch, verdicts, kind=f"grpc {kind}")


def call(
    channel: grpc.Channel, method: Method, batch: list[bytes], verdicts: Verdicts, *, kind: str, **how: Any
) -> None:
    """One call; what comes back is read, up to a bound."""
    timeout = WATCH_S if method.path in ENDLESS else CALL_S
    try:
        for _ in zip(range(MOST_RESPONSES), _responses(channel, method, batch, timeout, how), strict=False):
            pass
        code = grpc.StatusCode.OK
    except grpc.RpcError as error:
        code = error.code()  # type: ignore[attr-defined]
    fault = f"{method.path} {batch!r}" if code in FAULTS else ""
    verdicts.note(kind, code.name, fault=fault)


def _responses(
    channel: grpc.Channel, method: Method, batch: list[bytes], timeout: float, how: dict[str, Any]
) -> Iterator[Any]:
    if method.client_streams and method.server_streams:
        yield from channel.stream_stream(method.path)(iter(batch), timeout=timeout, **how)
    elif method.server_streams:
        yield from channel.unary_stream(method.path)(batch[0], timeout=timeout, **how)
    elif method.client_streams:
        yield channel.stream_unary(method.path)(iter(batch), timeout=timeout, **how)
    else:
        yield channel.unary_unary(method.path)(batch[0], timeout=timeout, **how)


def ask_too_much(channel: grpc.Channel, asked: list[Method], verdicts: Verdicts) -> None:
    """Messages over the limit, packed ones that unpack to more, metadata without end, unknown methods."""
    zeros = bytes(17 * 2**20)
    flood = tuple((f"x-flood-{number}", "v" * 400) for number in range(100))
    for method in asked:
        call(channel, method, [zeros], verdicts, kind="grpc oversized")
        packed: dict[str, Any] = {"compression": grpc.Compression.Gzip}
        call(channel, method, [zeros], verdicts, kind="grpc packed", **packed)
        call(channel, method, [b""], verdicts, kind="grpc metadata flood", metadata=flood)
        unknown = Method(method.path + "x", method.request, method.client_streams, method.server_streams)
        call(channel, unknown, [b""], verdicts, kind="grpc unknown method")
