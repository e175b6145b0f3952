"""Tensors of the Open Inference Protocol: bytes to values and back.

Pure. What a client says about a tensor is checked against what it sent before anything is made
of it, so that a shape of 2^60 costs no more than its refusal.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trireme.errors import InvalidRequest
from trireme.wire.oip.v2 import oip_pb2 as pb

Value = bool | int | float | bytes

MAX_INPUTS = 64
"""Tensors of one request."""
MAX_RANK = 8
SHOWN_CHARACTERS = 80
"""How much of a client's own words an error repeats."""


@dataclass(frozen=True, slots=True)
class _Kind:
    code: str
    """As `struct` names one element."""
    field: str
    """Where InferTensorContents has them."""


_KINDS: dict[str, _Kind] = {
    "BOOL": _Kind("?", "bool_contents"),
    "INT8": _Kind("b", "int_contents"),
    "INT16": _Kind("h", "int_contents"),
    "INT32": _Kind("i", "int_contents"),
    "INT64": _Kind("q", "int64_contents"),
    "UINT8": _Kind("B", "uint_contents"),
    "UINT16": _Kind("H", "uint_contents"),
    "UINT32": _Kind("I", "uint_contents"),
    "UINT64": _Kind("Q", "uint64_contents"),
    "FP32": _Kind("f", "fp32_contents"),
    "FP64": _Kind("d", "fp64_contents"),
    "BYTES": _Kind("", "bytes_contents"),
}
DATATYPES = frozenset(_KINDS)
"""Those that are read here; FP16 and BF16 are nobody's input."""
_ANY_INTEGER = frozenset(name for name in _KINDS if "INT" in name)
_ANY_NUMBER = _ANY_INTEGER | {"FP32", "FP64"}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a model takes or gives under one name."""

    name: str
    datatype: str
    length: int = 1
    """Elements; -1: any number."""

    def accepts(self, datatype: str) -> bool:
        """Numbers may come in whichever type holds them."""
        if self.datatype in _ANY_INTEGER:
            return datatype in _ANY_INTEGER
        if self.datatype == "FP32":
            return datatype in _ANY_NUMBER
        return datatype == self.datatype


def read_inputs(
    request: pb.ModelInferRequest, specs: Sequence[TensorSpec], *, most_elements: int
) -> dict[str, list[Value]]:
    """The elements of each input, by name.

    Args:
        most_elements: of one input whose length is free.

    Raises:
        InvalidRequest: names the input at fault.
    """
    if len(request.inputs) > MAX_INPUTS:
        raise InvalidRequest(f"at most {MAX_INPUTS} inputs are allowed", param="inputs")
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequest(
            f"raw_input_contents has {len(raw)} entries for {len(request.inputs)} inputs",
            param="raw_input_contents",
        )
    known = {spec.name: spec for spec in specs}
    values: dict[str, list[Value]] = {}
    for number, tensor in enumerate(request.inputs):
        spec = known.get(tensor.name)
        if spec is None:
            raise InvalidRequest(
                f"there is no input {tensor.name[:SHOWN_CHARACTERS]!r}; there are {', '.join(known)}",
                param="inputs",
            )
        if tensor.name in values:
            raise InvalidRequest(f"{tensor.name} is there twice", param=tensor.name)
        count = _count(tensor, spec, most_elements)
        for parameter in tensor.parameters:
            raise InvalidRequest(
                f"{tensor.name}: the parameter {parameter[:SHOWN_CHARACTERS]!r} is not supported",
                param=tensor.name,
            )
        if raw:
            if tensor.HasField("contents"):
                raise InvalidRequest(
                    f"{tensor.name}: give raw_input_contents or contents, not both", param=tensor.name
                )
            values[tensor.name] = _from_raw(tensor, raw[number], count)
        else:
            values[tensor.name] = _from_contents(tensor, count)
    return values


def add_output(response: pb.ModelInferResponse, spec: TensorSpec, values: Sequence[Value]) -> None:
    """Add an output of one dimension."""
    response.outputs.add(name=spec.name, datatype=spec.datatype, shape=[len(values)])
    if spec.datatype == "BYTES":
        texts = [value for value in values if isinstance(value, bytes)]
        raw = b"".join(struct.pack("<I", len(text)) + text for text in texts)
    else:
        raw = struct.pack(f"<{len(values)}{_KINDS[spec.datatype].code}", *values)
    response.raw_output_contents.append(raw)


def _count(tensor: pb.ModelInferRequest.InferInputTensor, spec: TensorSpec, most_elements: int) -> int:
    name = tensor.name
    if not spec.accepts(tensor.datatype):
        raise InvalidRequest(
            f"{name} must be {spec.datatype}, not {tensor.datatype[:SHOWN_CHARACTERS]!r}", param=name
        )
    if len(tensor.shape) > MAX_RANK or any(length < 0 for length in tensor.shape):
        raise InvalidRequest(
            f"{name}: a shape has at most {MAX_RANK} dimensions, none of them negative", param=name
        )
    count = math.prod(tensor.shape)
    if spec.length >= 0 and count != spec.length:
        raise InvalidRequest(
            f"{name} must have the shape [{spec.length}], not {list(tensor.shape)}", param=name
        )
    if count > most_elements:
        raise InvalidRequest(f"{name} has {count} elements; at most {most_elements} are allowed", param=name)
    return count


def _from_contents(tensor: pb.ModelInferRequest.InferInputTensor, count: int) -> list[Value]:
    wanted = _KINDS[tensor.datatype].field
    for field, _ in tensor.contents.ListFields():
        if field.name != wanted:
            raise InvalidRequest(
                f"{tensor.name}: the elements of {tensor.datatype} belong into {wanted}, not {field.name}",
                param=tensor.name,
            )
    found = getattr(tensor.contents, wanted)
    if len(found) != count:
        raise InvalidRequest(
            f"{tensor.name} has {len(found)} elements; its shape says {count}", param=tensor.name
        )
    return list(found)


def _from_raw(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes, count: int) -> list[Value]:
    if tensor.datatype == "BYTES":
        values: list[Value] = list(_split(tensor.name, raw, count))
        if len(values) != count:
            raise InvalidRequest(
                f"{tensor.name} has {len(values)} elements; its shape says {count}", param=tensor.name
            )
        return values
    form = f"<{count}{_KINDS[tensor.datatype].code}"
    if len(raw) != struct.calcsize(form):
        raise InvalidRequest(
            f"{tensor.name} has {len(raw)} bytes; its type and shape take {struct.calcsize(form)}",
            param=tensor.name,
        )
    return list(struct.unpack(form, raw))


def _split(name: str, raw: bytes, count: int) -> Iterator[bytes]:
    """The elements of BYTES: each has its length in 4 bytes before it. At most one more than `count`."""
    position = 0
    for _ in range(count + 1):
        if position == len(raw):
            return
        end = position + 4
        length = int.from_bytes(raw[position:end], "little")
        if end > len(raw) or length > len(raw) - end:
            raise InvalidRequest(f"{name}: an element is longer than what came of it", param=name)
        position = end + length
        yield raw[end:position]
