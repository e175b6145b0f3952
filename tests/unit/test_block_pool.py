"""Blocks: held, draining, cached or free; a hash names one block; heads outlive tails; copies end first."""

from __future__ import annotations

import math
from hashlib import blake2b

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from trireme.kvcache.block_identity import HASH_BYTES, block_hashes, extend_hashes, root_salt
from trireme.kvcache.block_pool import BlockPool


def test_a_hash_covers_the_salt_and_all_tokens_before_it() -> None:
    tokens = list(range(50))
    hashes = block_hashes(tokens, 16, b"tenant")
    assert len(hashes) == 3
    assert {len(block_hash) for block_hash in hashes} == {HASH_BYTES}
    assert block_hashes(tokens[:48], 16, b"tenant") == hashes
    assert not set(block_hashes(tokens, 16, b"other")) & set(hashes)
    changed = block_hashes([99, *tokens[1:]], 16, b"tenant")
    assert not set(changed) & set(hashes)
    assert extend_hashes(hashes[0], tokens[16:], 16) == hashes[1:]
    assert block_hashes(tokens[:15], 16, b"tenant") == ()


def test_a_hash_is_blake2b_of_the_parent_and_little_endian_tokens() -> None:
    data = b"root" + b"".join(token.to_bytes(4, "little") for token in (1, 2, 70_000, 4))
    assert block_hashes([1, 2, 70_000, 4], 4, b"root") == (blake2b(data, digest_size=16).digest(),)


def test_the_root_tells_tenants_models_and_layouts_apart() -> None:
    roots = {
        root_salt(tenant=tenant, model_key=key, kv_layout=layout)
        for tenant in ("a", "ab")
        for key in ("b", "bb")
        for layout in ("", "b")
    }
    assert len(roots) == 8


def test_the_tail_of_a_prefix_is_given_up_before_its_head() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3) or []
    for block_id, name in zip(blocks, (b"head", b"middle", b"tail"), strict=True):
        pool.cache(block_id, name)
    pool.release(blocks)
    pool.allocate(1)
    assert [pool.find(name) is not None for name in (b"head", b"middle", b"tail")] == [True, True, False]


def test_the_least_recently_used_prefix_goes_first() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2) or []
    pool.cache(first, b"first")
    pool.cache(second, b"second")
    pool.release([first])
    pool.release([second])
    pool.acquire([first])  # used again
    pool.release([first])
    pool.allocate(1)
    assert pool.find(b"first") == first
    assert pool.find(b"second") is None


def test_a_block_that_a_copy_reads_is_not_given_out_until_the_copy_ends() -> None:
    pool = BlockPool(2)
    private, complete = pool.allocate(2) or []
    pool.cache(complete, b"complete")
    pool.begin_copy([private, complete])
    pool.release([private, complete])
    assert (pool.num_draining, pool.num_available) == (2, 0)
    assert pool.allocate(1) is None
    assert pool.find(b"complete") == complete  # it may still be read by whoever finds it
    pool.end_copy([private, complete])
    assert (pool.num_free, pool.num_cached, pool.num_draining) == (1, 1, 0)
    assert pool.allocate(1) == [private]


def test_the_block_that_is_needed_last_goes_first_and_those_of_no_known_use_before_it() -> None:
    uses = {b"soon": 1.0, b"late": 9.0, b"middle": 5.0}
    pool = BlockPool(4, next_use_s=lambda name: uses.get(name, math.inf))
    blocks = dict(zip((b"soon", b"late", b"middle", b"idle"), pool.allocate(4) or [], strict=True))
    for name, block_id in blocks.items():
        pool.cache(block_id, name)
        pool.release([block_id])
    pool.set_next_use(b"soon", 7.0)  # it was promoted to the back
    gone = [pool.allocate(1) for _ in range(4)]
    assert gone == [[blocks[name]] for name in (b"idle", b"late", b"soon", b"middle")]


def test_what_is_said_of_a_next_use_holds_through_a_copy_and_until_the_block_is_used() -> None:
    pool = BlockPool(3)
    awaited, idle, copied = pool.allocate(3) or []
    for block_id, name in ((awaited, b"awaited"), (idle, b"idle"), (copied, b"copied")):
        pool.cache(block_id, name)
    pool.begin_copy([copied])
    pool.release([copied, awaited, idle])
    pool.set_next_use(b"awaited", 1.0)
    pool.set_next_use(b"copied", 2.0)
    pool.end_copy([copied])
    assert [pool.allocate(1), pool.allocate(1)] == [[idle], [copied]]
    pool.acquire([awaited])
    pool.release([awaited])
    pool.cache(idle, b"idle")
    pool.set_next_use(b"idle", 1.0)
    pool.release([idle])
    assert pool.allocate(1) == [awaited]


class PoolMachine(RuleBasedStateMachine):
    """Sequences that take, share, complete and give back blocks while copies come and go, against
    a model of plain sets."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[list[int]] = []
        self.uses: dict[bytes, float] = {}
        self.resident: dict[bytes, int] = {}
        self.sequences: list[list[int]] = []
        self.names = 0
        self.is_forgetting = False

    @initialize(size=st.integers(1, 12))
    def make(self, size: int) -> None:
        self.pool = BlockPool(
            size,
            on_cached=self.cached,
            on_evicted=self.evicted,
            next_use_s=lambda name: self.uses.get(name, math.inf),
        )

    def cached(self, block_hash: bytes, block_id: int) -> None:
        assert block_hash not in self.resident
        self.resident[block_hash] = block_id

    def evicted(self, block_hash: bytes, block_id: int) -> None:
        assert self.resident.pop(block_hash) == block_id
        assert all(block_id not in held for held in self.sequences)
        assert self.is_forgetting or all(block_id not in ids for ids in self.copies)

    @rule(count=st.integers(0, 6))
    def allocate(self, count: int) -> None:
        available = self.pool.num_available
        taken = self.pool.allocate(count)
        assert (taken is None) == (count > available)
        if taken is None:
            assert self.pool.num_available == available
            return
        assert len(set(taken)) == count
        assert not {b for held in self.sequences + self.copies for b in held} & set(taken)
        assert all(self.pool.hash_of(block_id) is None for block_id in taken)
        self.sequences.append(taken)

    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        private = [b for held in self.sequences for b in held if self.pool.hash_of(b) is None]
        if private:
            self.names += data.draw(st.integers(0, 1))  # 0: a name that exists already
            name = self.names.to_bytes(4, "little")
            is_new = name not in self.resident
            assert self.pool.cache(data.draw(st.sampled_from(private)), name) == is_new

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        if self.resident:
            names = data.draw(st.lists(st.sampled_from(sorted(self.resident)), unique=True, max_size=4))
            blocks = self.pool.match(names)
            assert blocks == [self.resident[name] for name in names]
            self.pool.acquire(blocks)
            self.sequences.append(blocks)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.sequences:
            index = data.draw(st.integers(0, len(self.sequences) - 1))
            self.pool.release(self.sequences.pop(index))

    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        unheld = [b for b in self.resident.values() if all(b not in held for held in self.sequences)]
        if unheld:
            self.is_forgetting = True
            self.pool.forget([data.draw(st.sampled_from(unheld))])
            self.is_forgetting = False

    @rule(data=st.data())
    def begin_copy(self, data: st.DataObject) -> None:
        readable = {b for held in self.sequences for b in held} | set(self.resident.values())
        if readable:
            blocks = data.draw(st.lists(st.sampled_from(sorted(readable)), unique=True, min_size=1))
            self.pool.begin_copy(blocks)
            self.copies.append(blocks)

    @rule(data=st.data())
    def end_copy(self, data: st.DataObject) -> None:
        if self.copies:
            self.pool.end_copy(self.copies.pop(data.draw(st.integers(0, len(self.copies) - 1))))

    @rule(data=st.data(), at_s=st.sampled_from([0.0, 1.0, 2.0, math.inf]))
    def expect(self, data: st.DataObject, at_s: float) -> None:
        if self.resident:
            name = data.draw(st.sampled_from(sorted(self.resident)))
            self.uses[name] = at_s
            self.pool.set_next_use(name, at_s)

    @invariant()
    def books_balance(self) -> None:
        held = [block_id for sequence in self.sequences for block_id in sequence]
        copied = {block_id for ids in self.copies for block_id in ids}
        pool = self.pool
        assert pool.num_held == len(set(held))
        assert pool.num_draining == len(copied - set(held))
        assert pool.num_cached == len(set(self.resident.values()) - set(held) - copied)
        assert pool.num_free + pool.num_cached + pool.num_draining + pool.num_held == pool.num_blocks
        assert pool.num_available == pool.num_free + pool.num_cached
        assert all(self.pool.refs(b) == held.count(b) for b in range(self.pool.num_blocks))
        assert self.pool.num_resident_hashes == len(self.resident)
        for name, block_id in self.resident.items():
            assert self.pool.find(name) == block_id
            assert self.pool.hash_of(block_id) == name


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
