"""The index of a sealed segment, in a file beside it: read at start instead of the segment.

Numbers are little-endian. The file ends with the XXH3 of all before it, so a torn or damaged one
is noticed, and the segment is scanned instead; it also names the segment's length, since an index
that outlived a truncation would promise what is gone.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trireme.kvcache.block_codec import BlockKey, payload_checksum

_HEAD = struct.Struct("<8sIIQQQ")
"""Magic, version, bytes of the tenants' names, bytes of the segment, runs, blocks."""
_MAGIC = b"TRIKVIDX"
_VERSION = 1
_CHECKSUM = struct.Struct("<Q")
_KEY_BYTES = 32
_RUN = np.dtype([("tenant", "<u4"), ("blocks", "<u4"), ("saved_unix_s", "<f8"), ("used_unix_s", "<f8")])
_BLOCK = np.dtype(
    [("key", f"V{_KEY_BYTES}"), ("payload_bytes", "<u8"), ("checksum", "<u8"), ("offset", "<u8")]
)


class FoundBlock(NamedTuple):
    """A block in a segment, as its header or the segment's index tells."""

    key: BlockKey
    payload_bytes: int
    checksum: int
    offset: int


@dataclass(frozen=True, slots=True)
class FoundRun:
    """Blocks in a segment that were saved together."""

    tenant: str
    saved_unix_s: float
    used_unix_s: float
    blocks: Sequence[FoundBlock]


def encode_sidecar(runs: Sequence[FoundRun], *, segment_bytes: int) -> bytes:
    """The file's content."""
    tenants = sorted({run.tenant for run in runs})
    numbers = {tenant: number for number, tenant in enumerate(tenants)}
    names = json.dumps(tenants).encode()
    run_rows = np.array(
        [(numbers[run.tenant], len(run.blocks), run.saved_unix_s, run.used_unix_s) for run in runs], _RUN
    )
    block_rows = np.array(
        [(b.key, b.payload_bytes, b.checksum, b.offset) for run in runs for b in run.blocks], _BLOCK
    )
    head = _HEAD.pack(_MAGIC, _VERSION, len(names), segment_bytes, len(run_rows), len(block_rows))
    body = b"".join((head, names, run_rows.tobytes(), block_rows.tobytes()))
    return body + _CHECKSUM.pack(payload_checksum(body))


def decode_sidecar(data: bytes, *, segment_bytes: int) -> list[FoundRun] | None:
    """The runs of a segment of that length; None where the file is damaged or of another segment."""
    body = memoryview(data)[: -_CHECKSUM.size]
    if len(data) < _HEAD.size + _CHECKSUM.size:
        return None
    magic, version, names_bytes, length, num_runs, num_blocks = _HEAD.unpack_from(data)
    if (magic, version, length) != (_MAGIC, _VERSION, segment_bytes):
        return None
    if len(body) != _HEAD.size + names_bytes + num_runs * _RUN.itemsize + num_blocks * _BLOCK.itemsize:
        return None
    if _CHECKSUM.unpack_from(data, len(body))[0] != payload_checksum(body):
        return None
    start = _HEAD.size
    tenants: list[str] = json.loads(bytes(body[start : start + names_bytes]))
    start += names_bytes
    run_rows = np.frombuffer(body, _RUN, count=num_runs, offset=start).tolist()
    start += num_runs * _RUN.itemsize
    keys = np.frombuffer(body, _BLOCK, count=num_blocks, offset=start)
    block_rows = list(
        map(
            FoundBlock,
            [BlockKey(key) for key in keys["key"].tolist()],
            keys["payload_bytes"].tolist(),
            keys["checksum"].tolist(),
            keys["offset"].tolist(),
        )
    )
    runs: list[FoundRun] = []
    first = 0
    for tenant, count, saved_unix_s, used_unix_s in run_rows:
        runs.append(FoundRun(tenants[tenant], saved_unix_s, used_unix_s, block_rows[first : first + count]))
        first += count
    return runs
