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


def copy_all(arena: Arena, pairs: Iterable[tuple[ReservedBlock, Buffer]]) -> tuple[list[int], list[int]]:
    """Write payloads to reserved room; returns the generations written and those that were not."""
    written: list[int] = []
    refused: list[int] = []
    for block, payload in pairs:
        fault = copy_in(arena, block, payload)
        (written if fault is None else refused).append(block.generation)
    return written, refused


def _slot(arena: Arena, offset: int, payload_bytes: int) -> memoryview | None:
    start, end = offset - HEADER_BYTES, offset + payload_bytes
    if start < 0 or end > arena.ref.size_bytes:
        return None
    return arena.memory[start:end]
