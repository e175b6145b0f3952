"""Blocks as streams between nodes: sent from leased slots, received into reserved ones.

Both sides hold little: the sender a few leased blocks, as gRPC takes no more than it can pass on;
the receiver one piece. A block that arrives is readable after its last byte and its checksum.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from trireme.errors import InvalidRequest
from trireme.kvcache.block_codec import (
    HASH_BYTES,
    MAX_PAYLOAD_BYTES,
    BlockKey,
    payload_checksum,
    read_generation,
    tenant_label,
)
from trireme.kvcache.saves import RESERVATION_S
from trireme.kvcache.stored_blocks import MAX_RUN_BLOCKS, MAX_RUN_BYTES, Block
from trireme.kvcache.tiered_store import TieredStore
from trireme.wire.kvstore.v1 import kvstore_pb2 as pb

PART_BYTES = 2**20
MAX_STREAM_BLOCKS = 16384
_BLOCKS_PER_LEASE = 16
_LEASE_S = 30.0
_INLINE_BYTES = 256 * 1024
"""Payloads up to so large are checked on the loop."""


@dataclass(slots=True)
class TransferCounters:
    """What went between nodes since the start, in blocks."""

    from_peers: int = 0
    to_peers: int = 0
    corrupt: int = 0


async def send_chain(
    store: TieredStore, namespace: str, block_hashes: bytes, *, deadline_s: float, counters: TransferCounters
) -> AsyncIterator[pb.BlockPart]:
    """The leading blocks of a chain, in pieces, up to the first that is not here in time."""
    end_s = time.monotonic() + deadline_s
    step = _BLOCKS_PER_LEASE * HASH_BYTES
    for start in range(0, len(block_hashes), step):
        part = block_hashes[start : start + step]
        left_s = max(0.0, end_s - time.monotonic())
        acquired = await store.acquire(namespace, part, deadline_s=left_s, lease_s=_LEASE_S)
        try:
            for block in acquired.blocks:
                async for piece in send_block(store, block):
                    yield piece
                counters.to_peers += 1
        finally:
            store.release(acquired.lease_id)
        if len(acquired.blocks) * HASH_BYTES < len(part):
            return


async def send_block(store: TieredStore, block: Block) -> AsyncIterator[pb.BlockPart]:
    """One pinned block in pieces; ends early where the lease has, which the receiver sees as a miss."""
    image, payload = store.dram.image(block), store.dram.payload(block)
    generation = block.generation
    tenant = block.run.tenant if block.run is not None else ""
    head = pb.BlockHead(
        key=block.key, payload_bytes=block.payload_bytes, checksum=block.checksum, tenant=tenant
    )
    for start in range(0, len(payload), PART_BYTES):
        data = bytes(payload[start : start + PART_BYTES])
        if read_generation(image) != generation:
            return
        yield pb.BlockPart(head=head if start == 0 else None, data=data)


class Receiver:
    """Takes one stream of blocks into the store."""

    def __init__(self, store: TieredStore, counters: TransferCounters) -> None:
        self._store = store
        self._counters = counters
        self._block: Block | None = None
        """The block that arrives now, where there is room for it."""
        self._head: pb.BlockHead | None = None
        self._arrived_bytes = 0
        self._whole: list[Block] = []
        """Arrived and sound, not readable yet."""
        self._whole_bytes = 0
        self._heads = 0
        self.stored = 0
        """Blocks of the stream that are here now."""
        self.wanted: frozenset[bytes] | None = None
        """Keys that were asked for; None: all are welcome."""

    async def take(self, part: pb.BlockPart) -> None:
        """Take the next piece.

        Raises:
            InvalidRequest: it does not continue the stream, or is too large.
        """
        if part.HasField("head"):
            self._begin(part.head)
        if self._head is None:
            raise InvalidRequest("a stream of blocks begins with a head", param="head")
        end = self._arrived_bytes + len(part.data)
        if len(part.data) > PART_BYTES or end > self._head.payload_bytes:
            raise InvalidRequest(
                f"{len(part.data)} bytes at {self._arrived_bytes} of {self._head.payload_bytes} are too many",
                param="data",
            )
        if self._block is not None:
            self._store.dram.payload(self._block)[self._arrived_bytes : end] = part.data
        self._arrived_bytes = end
        if end == self._head.payload_bytes:
            await self._end()

    def finish(self) -> None:
        """The stream is over: what is whole can be read, what is not is given back."""
        self._drop_unfinished()
        self._commit()

    def _begin(self, head: pb.BlockHead) -> None:
        self._drop_unfinished()
        self._heads += 1
        if len(head.key) != 2 * HASH_BYTES or not 0 < head.payload_bytes <= MAX_PAYLOAD_BYTES:
            raise InvalidRequest(
                f"a head names a key of {len(head.key)} bytes and a payload of {head.payload_bytes}",
                param="head",
            )
        if self._heads > MAX_STREAM_BLOCKS:
            raise InvalidRequest(f"a stream has more than {MAX_STREAM_BLOCKS} blocks", param="head")
        self._head, self._arrived_bytes = head, 0
        key = BlockKey(head.key)
        if self.wanted is not None and key not in self.wanted:
            return
        if self._store.leading([key]):
            self.stored += 1
        elif not self._store.dram.is_being_written(key):
            expires_s = self._store.now_s() + RESERVATION_S
            self._block = self._store.saves.reserve_key(
                key, tenant_label(head.tenant), head.payload_bytes, expires_s
            )

    async def _end(self) -> None:
        block, head = self._block, self._head
        self._block, self._head = None, None
        if block is None or head is None:
            return
        payload = self._store.dram.payload(block)
        if len(payload) <= _INLINE_BYTES:
            checksum = payload_checksum(payload)
        else:
            checksum = await asyncio.to_thread(payload_checksum, payload)
        if checksum != head.checksum:
            self._counters.corrupt += 1
            self._store.saves.abort([block.generation])
            return
        block.checksum = checksum
        self._whole.append(block)
        self._whole_bytes += block.image_bytes
        if len(self._whole) >= MAX_RUN_BLOCKS or self._whole_bytes >= MAX_RUN_BYTES:
            self._commit()

    def _commit(self) -> None:
        stored = self._store.saves.commit(
            [block.generation for block in self._whole], [block.checksum for block in self._whole]
        )
        self.stored += stored
        self._counters.from_peers += stored
        self._whole, self._whole_bytes = [], 0

    def _drop_unfinished(self) -> None:
        if self._block is not None:
            self._store.saves.abort([self._block.generation])
        self._block, self._head = None, None
