"""What the store knows of a block, and of the run it belongs to.

A run is up to `MAX_RUN_BLOCKS` consecutive blocks of one chain that were saved together. It is
what moves between the tiers: one read, one write, one decision. A block stays the unit of finding,
leasing and checking, since chains branch anywhere.

Invariant: a block belongs to the run that lists it exactly while some tier holds a copy of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from trireme.kvcache.block_codec import BlockHeader, BlockKey, image_bytes
from trireme.policies.kv_items import State

MAX_RUN_BLOCKS = 32
MAX_RUN_BYTES = 8 * 2**20
NOWHERE = -1


class Block:
    """One block. About 300 bytes with its key and its place in the table: there may be millions."""

    __slots__ = (
        "checksum",
        "generation",
        "image_bytes",
        "key",
        "offset",
        "payload_bytes",
        "pins",
        "run",
        "ssd_offset",
    )

    def __init__(self, key: BlockKey, payload_bytes: int, checksum: int) -> None:
        self.key = key
        self.payload_bytes = payload_bytes
        self.image_bytes = image_bytes(payload_bytes)
        """Room it takes in either tier."""
        self.checksum = checksum
        self.run: Run | None = None
        """None before it is committed, and after it is dropped."""
        self.offset = NOWHERE
        """In DRAM: bytes from the beginning of the arena's slots."""
        self.generation = 0
        """Names this use of the slot."""
        self.pins = 0
        """Leases and copies in flight that keep the slot as it is."""
        self.ssd_offset = NOWHERE
        """On SSD: bytes from the beginning of its run's segment."""

    @property
    def in_dram(self) -> bool:
        """Whether it can be read from DRAM."""
        return self.run is not None and self.run.in_dram

    def header(self, *, position: int) -> BlockHeader:
        """What its image says of it; `position` is its place in the run."""
        assert self.run is not None
        run = self.run
        return BlockHeader(
            self.key, self.payload_bytes, self.checksum, run.tenant, run.saved_unix_s, position
        )


class Run:
    """Blocks that were saved together and move together."""

    __slots__ = (
        "blocks",
        "expires_s",
        "in_dram",
        "number",
        "pins",
        "saved_unix_s",
        "segment",
        "size_bytes",
        "state",
        "tenant",
        "use_s",
    )

    def __init__(self, number: int, tenant: str, blocks: Sequence[Block], *, saved_unix_s: float) -> None:
        self.number = number
        self.tenant = tenant
        self.blocks = list(blocks)
        self.saved_unix_s = saved_unix_s
        self.in_dram = False
        self.segment = 0
        """Number of the segment that holds it; 0: not on SSD."""
        self.state = State.RESIDENT
        self.pins = 0
        """Leases on any of its blocks."""
        self.use_s = 0.0
        """When it was last used; differs between runs."""
        self.expires_s = float("inf")
        self.size_bytes = sum(block.image_bytes for block in self.blocks)
        for block in self.blocks:
            block.run = self

    @property
    def on_ssd(self) -> bool:
        """Whether a valid copy lies on SSD."""
        return self.segment != 0

    def remove(self, block: Block) -> None:
        """Take a block out; it belongs to no run then."""
        self.blocks.remove(block)
        self.size_bytes -= block.image_bytes
        block.run = None


def cut_into_runs(blocks: Sequence[Block], *, max_run_bytes: int) -> list[list[Block]]:
    """Consecutive blocks in runs of bounded length; a block of another namespace begins a new one."""
    runs: list[list[Block]] = []
    size_bytes = 0
    for block in blocks:
        size_bytes += block.image_bytes
        last = runs[-1] if runs else []
        if (
            not last
            or len(last) >= MAX_RUN_BLOCKS
            or size_bytes > max_run_bytes
            or last[0].key[:16] != block.key[:16]
        ):
            runs.append([block])
            size_bytes = block.image_bytes
        else:
            last.append(block)
    return runs


def runs_of(blocks: Iterable[Block]) -> list[Run]:
    """The runs that blocks belong to, in order of appearance."""
    runs: dict[int, Run] = {}
    for block in blocks:
        if block.run is not None:
            runs.setdefault(block.run.number, block.run)
    return list(runs.values())
