"""Blocks: a block is held, cached or free; a hash names one block; heads outlive tails."""

from __future__ import annotations

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


class PoolMachine(RuleBasedStateMachine):
    """Sequences that take, share, complete and give back blocks, against a model of plain sets."""

    def __init__(self) -> None:
        super().__init__()
        self.resident: dict[bytes, int] = {}
        self.sequences: list[list[int]] = []
        self.names = 0

    @initialize(size=st.integers(1, 12))
    def make(self, size: int) -> None:
        self.pool = BlockPool(size, on_cached=self.cached, on_evicted=self.evicted)

    def cached(self, block_hash: bytes, block_id: int) -> None:
        assert block_hash not in self.resident
        self.resident[block_hash] = block_id

    def evicted(self, block_hash: bytes, block_id: int) -> None:
        assert self.resident.pop(block_hash) == block_id
        assert all(block_id not in held for held in self.sequences)

    @rule(count=st.integers(0, 6))
    def allocate(self, count: int) -> None:
        available = self.pool.num_available
        taken = self.pool.allocate(count)
        assert (taken is None) == (count > available)
        if taken is None:
            assert self.pool.num_available == available
            return
        assert len(set(taken)) == count
        assert not {b for held in self.sequences for b in held} & set(taken)
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
            self.pool.forget([data.draw(st.sampled_from(unheld))])

    @invariant()
    def books_balance(self) -> None:
        held = [block_id for sequence in self.sequences for block_id in sequence]
        assert self.pool.num_held == len(set(held))
        assert self.pool.num_available == self.pool.num_blocks - len(set(held))
        assert all(self.pool.refs(b) == held.count(b) for b in range(self.pool.num_blocks))
        assert self.pool.num_resident_hashes == len(self.resident)
        for name, block_id in self.resident.items():
            assert self.pool.find(name) == block_id
            assert self.pool.hash_of(block_id) == name


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
