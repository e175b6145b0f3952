"""A GGUF file: its metadata, and where its tensors lie.

The file is a stranger's: every count and length is checked against what is left of it before anything is
read, so that a damaged or hostile one costs no more than its own size.

Source: the GGUF specification of ggml, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from trireme.errors import InvalidCheckpoint

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_ALIGNMENT: Final = 32
MOST_KEYS: Final = 65_536
MOST_TENSORS: Final = 65_536
MOST_ELEMENTS: Final = 1 << 22
"""Of one array of metadata: tokens of a vocabulary, merges."""
MOST_NAME_BYTES: Final = 1024
_MOST_DIMENSIONS: Final = 4
_SCALARS: Final = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "<u1",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies."""

    name: str
    form: GGMLQuantizationType
    shape: tuple[int, ...]
    """The slowest dimension first, as PyTorch has it."""
    offset: int
    """From the file's beginning."""
    size_bytes: int


class GgufFile:
    """A file that was read up to its tensors.

    Raises:
        InvalidCheckpoint: it is no GGUF file, or it is damaged; says what is wrong and where.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise InvalidCheckpoint(f"{path} is not a file")
        try:
            with path.open("rb") as opened:
                is_empty = path.stat().st_size == 0
                mapped = b"" if is_empty else mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise InvalidCheckpoint(f"{path} cannot be read: {error.strerror}") from error
        self._bytes: NDArray[np.uint8] = np.frombuffer(mapped, dtype=np.uint8)
        cursor = _Cursor(path, memoryview(mapped))
        num_tensors, num_keys = _read_header(cursor)
        self.metadata: Mapping[str, Any] = _read_metadata(cursor, num_keys)
        self.tensors: Mapping[str, StoredTensor] = _read_tensors(cursor, num_tensors, self.metadata)

    def data(self, tensor: StoredTensor) -> NDArray[np.uint8]:
        """A tensor's bytes, row by row: (rows, bytes of a row); not copied."""
        raw = self._bytes[tensor.offset : tensor.offset + tensor.size_bytes]
        block, block_bytes = GGML_QUANT_SIZES[tensor.form]
        return raw.reshape(-1, tensor.shape[-1] // block * block_bytes)


class _Cursor:
    """Reads on, and never past the end."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path = path
        self.at = 0
        self.size = len(data)
        self._data = data

    def bad(self, what: str) -> InvalidCheckpoint:
        return InvalidCheckpoint(f"{self.path} is no usable GGUF file: {what} (at byte {self.at})")

    def take(self, count: int, what: str) -> memoryview:
        if count > self.size - self.at:
            left = self.size - self.at
            raise self.bad(f"{what} needs {count} bytes, and {left} are left: is it cut short?")
        taken = self._data[self.at : self.at + count]
        self.at += count
        return taken

    def number(self, form: str, what: str) -> int:
        (value,) = struct.unpack(form, self.take(struct.calcsize(form), what))
        return int(value)

    def text(self, what: str, most_bytes: int | None = None) -> str:
        length = self.number("<Q", f"the length of {what}")
        if most_bytes is not None and length > most_bytes:
            raise self.bad(f"{what} has {length} bytes; at most {most_bytes} are read")
        try:
            return str(self.take(length, what), "utf-8")
        except UnicodeDecodeError as error:
            raise self.bad(f"{what} is not UTF-8") from error


def _read_header(cursor: _Cursor) -> tuple[int, int]:
    """Numbers of tensors and of keys."""
    if bytes(cursor.take(4, "the header")) != _MAGIC:
        cursor.at = 0
        raise cursor.bad("it does not begin with GGUF")
    version = cursor.number("<I", "the version")
    if version not in _VERSIONS:
        raise cursor.bad(f"its version is {version}; little-endian files of version 2 and 3 are read")
    num_tensors = cursor.number("<Q", "the number of tensors")
    num_keys = cursor.number("<Q", "the number of keys")
    if num_tensors > MOST_TENSORS or num_keys > MOST_KEYS:
        raise cursor.bad(
            f"it claims {num_tensors} tensors and {num_keys} keys; at most {MOST_TENSORS} and {MOST_KEYS} "
            "are read"
        )
    return num_tensors, num_keys


def _read_metadata(cursor: _Cursor, num_keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.text("a key", MOST_NAME_BYTES)
        if key in metadata:
            raise cursor.bad(f"key {key!r} stands twice")
        metadata[key] = _read_value(cursor, key)
    return metadata


def _read_value(cursor: _Cursor, key: str) -> Any:
    form = _value_type(cursor, key)
    if form is GGUFValueType.STRING:
        return cursor.text(f"the value of {key!r}")
    if form is not GGUFValueType.ARRAY:
        return _numbers(cursor, form, 1, key)[0]
    form = _value_type(cursor, key)
    count = cursor.number("<Q", f"the length of {key!r}")
    if count > MOST_ELEMENTS:
        raise cursor.bad(f"{key!r} has {count} elements; at most {MOST_ELEMENTS} are read")
    if form is GGUFValueType.ARRAY:
        raise cursor.bad(f"{key!r} is an array of arrays")
    if form is GGUFValueType.STRING:
        return [cursor.text(f"an element of {key!r}") for _ in range(count)]
    return _numbers(cursor, form, count, key)


def _value_type(cursor: _Cursor, key: str) -> GGUFValueType:
    number = cursor.number("<I", f"the type of {key!r}")
    try:
        return GGUFValueType(number)
    except ValueError:
        raise cursor.bad(f"{key!r} is of the unknown type {number}") from None


def _numbers(cursor: _Cursor, form: GGUFValueType, count: int, key: str) -> list[Any]:
    kind = np.dtype(_SCALARS[form])
    values = np.frombuffer(cursor.take(count * kind.itemsize, f"the value of {key!r}"), dtype=kind)
    return list((values != 0).tolist() if form is GGUFValueType.BOOL else values.tolist())


def _read_tensors(cursor: _Cursor, num_tensors: int, metadata: Mapping[str, Any]) -> dict[str, StoredTensor]:
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
        raise cursor.bad(f"general.alignment is {alignment!r}")
    told = [_read_tensor(cursor) for _ in range(num_tensors)]
    cursor.at += -cursor.at % alignment
    begin, size = cursor.at, cursor.size
    tensors: dict[str, StoredTensor] = {}
    for name, form, shape, offset in told:
        block, block_bytes = GGML_QUANT_SIZES[form]
        if shape[-1] % block:
            raise cursor.bad(f"tensor {name!r} has rows of {shape[-1]}, no multiple of {form.name}'s {block}")
        size_bytes = math.prod(shape) // block * block_bytes
        if offset % alignment or begin + offset + size_bytes > size:
            raise cursor.bad(
                f"tensor {name!r} of {size_bytes} bytes at {begin + offset} does not lie in the {size} bytes "
                "of the file: is it cut short?"
            )
        if name in tensors:
            raise cursor.bad(f"tensor {name!r} stands twice")
        tensors[name] = StoredTensor(
            name=name, form=form, shape=shape, offset=begin + offset, size_bytes=size_bytes
        )
    return tensors


def _read_tensor(cursor: _Cursor) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
    name = cursor.text("a tensor's name", MOST_NAME_BYTES)
    dimensions = cursor.number("<I", f"the dimensions of {name!r}")
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise cursor.bad(f"tensor {name!r} has {dimensions} dimensions")
    shape = tuple([cursor.number("<Q", f"the shape of {name!r}") for _ in range(dimensions)])[::-1]
    number = cursor.number("<I", f"the type of {name!r}")
    offset = cursor.number("<Q", f"the place of {name!r}")
    try:
        form = GGMLQuantizationType(number)
    except ValueError:
        raise cursor.bad(f"tensor {name!r} is of the unknown type {number}") from None
    if 0 in shape or form not in GGML_QUANT_SIZES:
        raise cursor.bad(f"tensor {name!r} of type {form.name} has shape {shape}")
    return name, form, shape, offset
