"""Payloads in and out of a mapped arena, from the worker's side.

A copy out is believed only if the slot still shows the generation it was found under and
the payload has its checksum; a store that went wrong, or that took the slot back, costs a
miss and nothing else.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence

from trireme.kvcache.arena import Arena
from trireme.kvcache.block_codec import HEADER_BYTES, Buffer, payload_checksum, read_generation
from trireme.wire.kvstore.v1.kvstore_pb2 import AcquiredBlock, ReservedBlock


class CopyFault(enum.Enum):
    """Why a block could not be copied."""

    REUSED = "reused"
    CORRUPT = "corrupt"
    OUTSIDE = "outside"


def copy_out(arena: Arena, block: AcquiredBlock) -> bytes | CopyFault:
    """The payload of an acquired block."""
    view = _slot(arena, block.offset, block.payload_bytes)
    if view is None:
        return CopyFault.OUTSIDE
    payload = bytes(view[HEADER_BYTES:])
    if read_generation(view[:HEADER_BYTES]) != block.generation:
        return CopyFault.REUSED
    if payload_checksum(payload) != block.checksum:
        return CopyFault.CORRUPT
    return payload


def copy_in(arena: Arena, block: ReservedBlock, payload: Buffer) -> CopyFault | None:
    """Write a payload to reserved room; None where it went well."""
    view = _slot(arena, block.offset, len(payload))
    if view is None:
        return CopyFault.OUTSIDE
    if read_generation(view[:HEADER_BYTES]) != block.generation:
        return CopyFault.REUSED
    view[HEADER_BYTES:] = payload
    return None


def copy_chain(
    arena: Arena, blocks: Sequence[AcquiredBlock]
) -> tuple[list[bytes], tuple[AcquiredBlock, CopyFault] | None]:
    """The payloads of a chain up to the first fault, and that fault."""
    payloads: list[bytes] = []
    for block in blocks:
        copied = copy_out(arena, block)
        if isinstance(copied, CopyFault):
            return payloads, (block, copied)
        payloads.append(copied)
    return payloads, None


def copy_all(
    arena: Arena, pairs: Iterable[tuple[ReservedBlock, Buffer]]
) -> tuple[list[int], list[int], list[int]]:
    """Write payloads to reserved room.

    Returns the generations written, the checksums of their payloads, and the generations that were not.
    """
    written: list[int] = []
    checksums: list[int] = []
    refused: list[int] = []
    for block, payload in pairs:
        if copy_in(arena, block, payload) is None:
            written.append(block.generation)
            checksums.append(payload_checksum(payload))
        else:
            refused.append(block.generation)
    return written, checksums, refused


def room_for(arena: Arena, block: ReservedBlock, payload_bytes: int) -> memoryview | None:
    """The memory of a reserved payload, to be written piece by piece; None where it is another's by now."""
    view = _slot(arena, block.offset, payload_bytes)
    if view is None or read_generation(view[:HEADER_BYTES]) != block.generation:
        return None
    return view[HEADER_BYTES:]


def view_of(arena: Arena, block: AcquiredBlock) -> memoryview | None:
    """The memory of an acquired payload, to be read piece by piece; None where it is another's by now."""
    view = _slot(arena, block.offset, block.payload_bytes)
    if view is None or read_generation(view[:HEADER_BYTES]) != block.generation:
        return None
    return view[HEADER_BYTES:].toreadonly()


def is_unchanged(arena: Arena, block: AcquiredBlock) -> CopyFault | None:
    """Whether what was read piece by piece was the block: None, or what is wrong with it."""
    view = _slot(arena, block.offset, block.payload_bytes)
    if view is None:
        return CopyFault.OUTSIDE
    if payload_checksum(view[HEADER_BYTES:]) != block.checksum:
        return CopyFault.CORRUPT
    # Read last: the slot was the block's for as long as its bytes were looked at.
    return None if read_generation(view[:HEADER_BYTES]) == block.generation else CopyFault.REUSED


def _slot(arena: Arena, offset: int, payload_bytes: int) -> memoryview | None:
    start, end = offset - HEADER_BYTES, offset + payload_bytes
    if start < 0 or end > arena.ref.size_bytes:
        return None
    return arena.memory[start:end]
