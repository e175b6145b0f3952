"""Read cubins: which functions there are and how long they are.

Source: System V ABI, ELF-64 object files; a cubin has one section `.text.NAME` for each function. An
instruction of compute capability 7.0 and newer has 16 bytes.
"""

from __future__ import annotations

import struct
from typing import Final

from trireme.errors import Kind, TriremeError

INSTRUCTION_BYTES: Final = 16
_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION: Final = struct.Struct("<IIQQQQIIQQ")


class InvalidCubin(TriremeError):
    """What should be a cubin is none."""

    kind = Kind.INVALID
    code = "invalid_cubin"


def function_sizes(image: bytes) -> dict[str, int]:
    """Bytes of code of each function of a cubin, the padding at its end included.

    Raises:
        InvalidCubin: it is no little-endian ELF-64 file, or is cut short.
    """
    try:
        header = _HEADER.unpack_from(image)
        if header[0][:6] != b"\x7fELF\x02\x01":
            raise InvalidCubin("not a cubin: it does not begin as an ELF-64 file")
        offset, size, count, names_index = header[6], header[11], header[12], header[13]
        sections = [_SECTION.unpack_from(image, offset + index * size) for index in range(count)]
        names_at = sections[names_index][4]
        sizes = {}
        for section in sections:
            start = names_at + section[0]
            name = image[start : image.index(b"\0", start)].decode()
            if name.startswith(".text."):
                sizes[name.removeprefix(".text.")] = section[5]
    except (struct.error, IndexError, ValueError) as error:
        raise InvalidCubin(f"not a cubin, or cut short: {error}") from error
    return sizes
