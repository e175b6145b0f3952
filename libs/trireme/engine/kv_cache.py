"""Which sequence holds which blocks of KV, on the device or in host memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from trireme.engine import block_moves
from trireme.engine.block_moves import Load
from trireme.engine.block_tables import BlockTables
from trireme.engine.host_arena import HostArena
from trireme.engine.kv_copies import Copy, KvCopies, Link
from trireme.engine.kv_counters import KvCounters
from trireme.engine.kv_memory import KvMemory
from trireme.engine.kv_rotation import turn
from trireme.engine.layer_gate import GatedLayers
from trireme.engine.sequence import Sequence
from trireme.engine.stored_blocks import OnSaved, Room, let_go_of
from trireme.engine.tier import KvTier
from trireme.kvcache.block_pool import BlockPool
from trireme.kvcache.supplied_blocks import CountLeading, Supplied, supplied_blocks
from trireme.models.model import LayerKv, Model

_SAVED_SHARE = 4
"""One in so many blocks may be on its way to a lower tier."""


class KvCache:
    """Blocks of `block_size` tokens for one model.

    Args:
        model: gives shape, type and device.
        num_blocks, block_size: of the device's pool.
        kv_dtype: what keys and values are stored as: one of `kernels.kv_forms`.
        host_blocks: of the host arena that sequences are swapped to; 0: none.
        max_model_len: longest sequence.
        shares: reuse complete blocks; else no block is ever found again.
        tier: told what becomes resident and what leaves.
        link: a modelled link between device and host.
        spare_blocks: of the device's memory, beside the pool: see `KvMemory`.
    """

    def __init__(
        self,
        model: Model,
        *,
        num_blocks: int,
        block_size: int,
        kv_dtype: str = "auto",
        host_blocks: int = 0,
        max_model_len: int,
        shares: bool,
        tier: KvTier | None,
        link: Link | None = None,
        spare_blocks: int = 0,
    ) -> None:
        self.block_size = block_size
        self.shares = shares
        self._tier = tier
        self.rotation = model.key_rotation
        self.memory = KvMemory(
            model,
            num_blocks=num_blocks,
            block_size=block_size,
            kv_dtype=kv_dtype,
            spare_blocks=spare_blocks,
        )
        self.pool = BlockPool(num_blocks, on_cached=self._on_cached, on_evicted=self._on_evicted)
        self.host = HostArena(self.memory, host_blocks) if host_blocks else None
        self.copies = KvCopies(model.device, link)
        self.counters = KvCounters()
        self._tables = BlockTables(-(-max_model_len // block_size))
        self._num_saving = 0
        self._pending: dict[bytes, Sequence] = {}
        """Prompt blocks that a sequence is about to complete or that are being loaded for it."""

    def hashes(self, sequence: Sequence, num_tokens: int) -> list[bytes]:
        """Hashes of the full blocks of the sequence's first `num_tokens` tokens."""
        known = sequence.hashes
        wanted = num_tokens // self.block_size
        if len(known) < wanted:
            start = len(known) * self.block_size
            tokens = sequence.token_ids[start : wanted * self.block_size]
            known.extend(sequence.chain.extend(known, tokens, self.block_size))
        return known if len(known) == wanted else known[:wanted]

    def complete_hashes(self, sequence: Sequence) -> tuple[bytes, ...]:
        """Hashes of the complete blocks that the sequence has, by which others may find them."""
        return tuple(self.hashes(sequence, sequence.num_computed)) if self.shares else ()

    def interchangeable(self, sequence: Sequence, hashes: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """Those of its blocks that others' of the same name can stand in for, to the last bit.

        Behind a cut a name says which tokens were seen, not whether they were still there when a block was
        computed: a sequence that has begun goes on with its own.
        """
        window = sequence.window
        return hashes if window is None or not window.stage.cuts else hashes[: window.head_blocks]

    def match(self, sequence: Sequence) -> list[int]:
        """Resident blocks that the sequence could start from."""
        if not self.shares:
            return []
        return self.pool.match(self.hashes(sequence, sequence.reusable_tokens))

    def next_block(self, sequence: Sequence, num_matched: int) -> bytes | None:
        """Hash of the first block that the sequence would compute and others could share."""
        hashes = self.hashes(sequence, sequence.reusable_tokens)
        return hashes[num_matched] if self.shares and num_matched < len(hashes) else None

    def is_pending(self, block_hash: bytes | None) -> bool:
        """A sequence on the device is computing or loading this block."""
        return block_hash is not None and block_hash in self._pending

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def admit(self, sequence: Sequence) -> bool:
        """Give a sequence without KV its resident prefix, and blocks for all it must compute.

        A prefix that is being loaded for it counts as resident once enough of its layers are
        there. What follows a resident head, and is resident from before a cut, is copied to where it
        stands now. Sets `num_computed` to the tokens found. False, and nothing taken, if blocks lack
        or the load is not that far.
        """
        if sequence.load is not None:
            return self._join(sequence, sequence.load)
        matched = self.match(sequence)
        supply = self.supplied(sequence, len(matched), lambda names: len(self.pool.match(names)))
        sources = self.pool.match(supply.hashes)
        missing = self.blocks_for(sequence.num_target) - len(matched)
        self.pool.acquire(matched + sources)
        fresh = self.pool.allocate(missing)
        if fresh is None and sources:  # they stand in their own way
            self.pool.release(sources)
            sources = []
            fresh = self.pool.allocate(missing)
        if fresh is None:
            self.pool.release(matched)
            return False
        self.attach(sequence, matched + fresh)
        sequence.begin((len(matched) + len(sources)) * self.block_size)
        sequence.num_committed = len(matched)
        if sources and self.rotation is not None:
            targets = fresh[: len(sources)]
            turn(self.memory, self.rotation, sources, targets, shift_tokens=supply.shift_tokens)
            self.pool.release(sources)
            self.counters.rerotated_blocks += len(sources)
            self.commit(sequence)
        self._let_go(sequence)
        self.expect(sequence)
        return True

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Hold blocks for the sequence's first `num_tokens` tokens; False if the pool is out of them."""
        missing = self.blocks_for(num_tokens) - len(sequence.blocks)
        if missing <= 0:
            return True
        fresh = self.pool.allocate(missing)
        if fresh is None:
            return False
        self._tables.extend(sequence.row, len(sequence.blocks), fresh)
        sequence.blocks.extend(fresh)
        return True

    def commit(self, sequence: Sequence) -> None:
        """Let others find the blocks that `num_computed` has completed."""
        complete = sequence.num_computed // self.block_size
        if complete == sequence.num_committed:
            return
        hashes = self.hashes(sequence, complete * self.block_size)
        for index in range(sequence.num_committed, complete):
            if self.shares:
                self.pool.cache(sequence.blocks[index], hashes[index])
                self._settle(hashes[index], sequence)
        sequence.num_committed = complete
        if self._tier is not None and self.shares and sequence.was_cut_here:
            self._tier.on_cut(sequence.sequence_id, hashes)

    def pause(self, sequence: Sequence) -> None:
        """The sequence keeps its blocks but does not run now: others may compute what it was to share."""
        for block_hash in sequence.hashes[sequence.num_committed :]:
            self._settle(block_hash, sequence)

    def expect(self, sequence: Sequence) -> None:
        """The sequence runs: others may wait for its prompt's blocks instead of computing them too."""
        if self.shares:
            for block_hash in self.hashes(sequence, sequence.reusable_tokens)[sequence.num_committed :]:
                self._pending.setdefault(block_hash, sequence)

    def attach(self, sequence: Sequence, blocks: list[int]) -> None:
        """Write blocks, one reference to each of which is the sequence's, into a row of the table."""
        sequence.row = self._tables.take(blocks)
        sequence.blocks = blocks

    def hold(self, sequence: Sequence, blocks: list[int]) -> None:
        """The sequence has these blocks now; their references are its own already."""
        self._tables.extend(sequence.row, 0, blocks)
        sequence.blocks = blocks

    def detach(self, sequence: Sequence) -> None:
        """Take the device's blocks back; what was computed still counts."""
        self.pause(sequence)
        self.pool.release(sequence.blocks)
        self._tables.give_back(sequence.row)
        sequence.row = -1
        sequence.blocks = []
        sequence.num_committed = 0

    def release(self, sequence: Sequence) -> None:
        """Take everything back from a sequence, wherever its KV is; complete blocks stay findable.

        Copies under way are cancelled; the blocks they touch drain until they are over.
        """
        if sequence.row >= 0:
            self.detach(sequence)
        for copy in (sequence.move, sequence.load.copy if sequence.load is not None else None):
            if copy is not None:
                copy.cancel()
        sequence.move = sequence.load = None
        if self.host is not None:
            self.host.pool.release(sequence.host_blocks)
            sequence.host_blocks = []
        self._let_go(sequence)
        sequence.restart()

    def scrub(self, sequence: Sequence) -> None:
        """Forget and zero what a failed sequence wrote: it may hold values that are not numbers."""
        if sequence.load is not None:  # what is loaded after the zeros would undo them
            sequence.load.copy.cancel()
            self.copies.finish(sequence.load.copy)
        own = [block_id for block_id in sequence.blocks if self.pool.refs(block_id) == 1]
        if not own:
            return
        if self.host is not None:
            hashes = [self.pool.hash_of(block_id) for block_id in own]
            found = [self.host.pool.find(name) for name in hashes if name is not None]
            self.host.pool.forget([block_id for block_id in found if block_id is not None])
        self.pool.forget(own)
        self.memory.zero(own)

    def tables(self, rows: list[int], width: int) -> NDArray[np.int64]:
        """Block tables (rows, width) of running sequences; a copy."""
        return self._tables.read(rows, width)

    def layers_for(self, sequences: Iterable[Sequence]) -> Seq[LayerKv]:
        """The layers, for a step of these sequences; each layer waits for what is loaded into it."""
        loads = [sequence.load for sequence in sequences if sequence.load is not None]
        return GatedLayers(self.memory.layers, loads, self.copies) if loads else self.memory.layers

    def wait_for_draining(self) -> None:
        """Wait until no block drains any more; the copies that touch them do not depend on a step."""
        while self.pool.num_draining:
            self.copies.wait(timeout_s=0.1)
            self.copies.poll()

    def save(self, block_hashes: Seq[bytes], room_for: Room | None, on_saved: OnSaved) -> int:
        """Copy resident ones of the blocks out, beside the compute; how many are taken, first ones first.

        Until a block is out it drains, so nobody overwrites it: at most a part of the pool is taken at
        a time, else saving could keep all blocks from those who run. `on_saved` is called in any case.
        """
        room = max(1, self.pool.num_blocks // _SAVED_SHARE) - self._num_saving
        resident = (
            (name, block_id) for name in block_hashes if (block_id := self.pool.find(name)) is not None
        )
        found = list(islice(resident, max(0, room)))
        if not found:
            on_saved(())
            return 0
        names, blocks = [name for name, _ in found], [block_id for _, block_id in found]
        report = block_moves.OnceSaved(on_saved)

        def then(copy: Copy) -> None:
            self._num_saving -= len(blocks)
            self.pool.end_copy(blocks)
            report(())  # a copy that was cancelled before it began has not told

        self._num_saving += len(blocks)
        self.pool.begin_copy(blocks)
        self.copies.copy_out(block_moves.save(self.memory, blocks, names, room_for, report), then)
        return len(blocks)

    def export_block(self, block_hash: bytes) -> bytes | None:
        """A resident block's bytes, in `layout`; None if it is not resident."""
        block_id = self.pool.find(block_hash)
        return None if block_id is None else self.memory.read(block_id)

    def import_block(self, block_hash: bytes, payload: bytes | memoryview) -> bool:
        """Make a block resident from bytes in `layout`.

        False if the bytes have the wrong length or every block is held.
        """
        if self.pool.find(block_hash) is not None:
            return True
        view = memoryview(payload)
        if view.nbytes != self.memory.block_bytes or not self.shares:
            return False
        taken = self.pool.allocate(1)
        if taken is None:
            return False
        self.memory.write(taken[0], view)
        self.pool.cache(taken[0], block_hash)
        self.pool.release(taken)
        return True

    def _join(self, sequence: Sequence, load: Load) -> bool:
        if not load.is_admissible or load.num_intact is None:
            return False
        kept = len(load.held) + load.num_intact
        corrupt, sequence.blocks = sequence.blocks[kept:], sequence.blocks[:kept]
        self.pool.release(corrupt)
        if not self.grow(sequence, sequence.num_target):
            return False
        sequence.begin(kept * self.block_size)
        load.is_joined = True
        self.expect(sequence)
        return True

    def supplied(self, sequence: Sequence, num_own: int, count_leading: CountLeading) -> Supplied:
        """What stands in for the prompt's blocks behind the first `num_own`, from before the cut that it
        came with."""
        window, truncation = sequence.window, sequence.request.truncation
        if not self.shares or self.rotation is None or window is None or truncation is None:
            return Supplied([], 0)
        if not truncation.cuts or window.stage.cuts != truncation.cuts:
            return Supplied([], 0)
        return supplied_blocks(
            truncation.supplies,
            window.rule,
            truncation.cuts,
            num_own=num_own,
            most=sequence.reusable_tokens // self.block_size - num_own,
            count_leading=count_leading,
        )

    def _let_go(self, sequence: Sequence) -> None:
        """No load is begun for the sequence any more, and what was loaded does not wait for it."""
        stored, sequence.stored = sequence.stored, ()
        let_go_of(stored)
        for block_hash in sequence.preloaded:
            self.pool.set_next_use(block_hash, math.inf)
        sequence.preloaded = ()

    def _settle(self, block_hash: bytes, sequence: Sequence) -> None:
        if self._pending.get(block_hash) is sequence:
            del self._pending[block_hash]

    def _on_cached(self, block_hash: bytes, block_id: int) -> None:
        if self._tier is not None:
            self._tier.on_cached(block_hash)

    def _on_evicted(self, block_hash: bytes, block_id: int) -> None:
        if self._tier is not None:
            self._tier.on_evicted(block_hash, lambda: self.memory.read(block_id))
