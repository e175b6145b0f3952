"""The residency index and direct copies: what workers see of the store without a call."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.kvstore_support import NAMESPACE, block_hash, load, opened_store, payload
from trireme.kvcache.arena import Arena, ArenaRef, attach_arena, own_arena
from trireme.kvcache.arena_copies import CopyFault
from trireme.kvcache.block_codec import block_keys
from trireme.kvcache.direct_copies import HeldChain, Room
from trireme.kvcache.residency_index import ResidencyReader, ResidencyWriter, index_words_for
from trireme.kvcache.saves import NewBlock
from trireme.kvcache.stored_blocks import Block
from trireme.kvcache.tiered_store import TieredStore
from trireme.wire.kvstore.v1 import kvstore_pb2 as pb

DRAM, SSD = 1, 2
MOVES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 3)), max_size=120)


def hashes(numbers: list[int]) -> bytes:
    return b"".join(map(block_hash, numbers))


@settings(max_examples=80)
@given(moves=MOVES, chain=st.lists(st.integers(0, 60), max_size=20))
def test_the_index_says_what_a_dict_says(moves: list[tuple[int, int]], chain: list[int]) -> None:
    memory = memoryview(bytearray(8 * index_words_for(2**20, 0)))
    writer, reader = ResidencyWriter(memory), ResidencyReader(memory)
    tiers: dict[int, int] = {}
    for number, after in moves:
        writer.move(block_keys(NAMESPACE, block_hash(number)), tiers.get(number, 0), after)
        tiers[number] = after
    assert writer.left_out == 0

    def leading(wanted: int) -> int:
        found = [bool(tiers.get(number, 0) & wanted) for number in chain]
        return found.index(False) if False in found else len(found)

    assert reader.match(NAMESPACE, hashes(chain)) == (leading(DRAM | SSD), min(leading(DRAM), leading(3)))
    assert reader.match("another", hashes(chain)) == (0, 0)


def test_a_full_index_leaves_blocks_out_and_never_mixes_them_up() -> None:
    memory = memoryview(bytearray(8 * index_words_for(0, 0)))
    words = len(memory) // 8
    writer, reader = ResidencyWriter(memory), ResidencyReader(memory)
    keys = [block_keys(NAMESPACE, block_hash(n))[0] for n in range(2 * words)]
    for key in keys:
        writer.move((key,), 0, DRAM)
    shown = [reader.match(NAMESPACE, key[16:])[0] for key in keys]
    assert sum(shown) == 2 * words - writer.left_out > 0.8 * words
    for key in keys:  # a block that was left out is moved and removed without harm
        writer.move((key,), DRAM, DRAM | SSD)
    for key in keys:
        writer.move((key,), DRAM | SSD, 0)
    assert bytes(memory) == bytes(len(memory))


def test_most_blocks_find_their_place_at_half_load() -> None:
    memory = memoryview(bytearray(8 * 4096))
    writer = ResidencyWriter(memory)
    for number in range(2048):
        writer.move(block_keys(NAMESPACE, block_hash(number)), 0, SSD)
    assert writer.left_out < 5


def test_an_arena_whose_first_page_lies_about_its_index_is_refused(tmp_path: Path) -> None:
    with own_arena(tmp_path, dram_bytes=65536) as arena:
        for lie in (7, 2**40, 24):
            arena.memory[32:40] = lie.to_bytes(8, "little")
            with pytest.raises(FileNotFoundError, match="index"):
                attach_arena(arena.ref)


def test_the_heartbeat_says_whether_a_store_lives(tmp_path: Path) -> None:
    with own_arena(tmp_path, dram_bytes=65536) as arena:
        seen = attach_arena(arena.ref)
        assert not seen.is_alive(10**9, within_ns=10**8)
        arena.beat(10**9, peers=2)
        arena.show_ssd(True)
        assert seen.is_alive(10**9 + 10**8 - 1, within_ns=10**8) and seen.peers == 2 and seen.is_ssd_on
        assert not seen.is_alive(10**9 + 10**8, within_ns=10**8)
    assert not seen.is_alive(10**9 + 1, within_ns=10**8), "it was closed in order"


def room_for(store: TieredStore, numbers: list[int], size: int) -> Room:
    """As the client makes it of a response."""
    wanted = [NewBlock(block_hash=block_hash(n), payload_bytes=size) for n in numbers]
    blocks = [
        pb.ReservedBlock(
            outcome=pb.RESERVATION_RESERVED,
            offset=store.dram.payload_offset(found),
            generation=found.generation,
        )
        if isinstance(found, Block)
        else pb.ReservedBlock(outcome=pb.RESERVATION_PRESENT)
        for found in store.saves.reserve(NAMESPACE, "t", wanted)
    ]
    return Room(attached(store), blocks, [size] * len(numbers))


def attached(store: TieredStore) -> Arena:
    ref = store.arena.ref
    return attach_arena(ArenaRef(arena_id=ref.arena_id, path=ref.path, size_bytes=ref.size_bytes))


async def test_a_writer_fills_its_room_in_pieces_and_nothing_is_readable_before_the_commit(
    tmp_path: Path,
) -> None:
    async with opened_store(tmp_path, dram_bytes=2**20) as store:
        room = room_for(store, [0, 1, 2], 8000)
        for layer in range(4):
            for number in (0, 1):
                view = room.views[number]
                assert view is not None
                view[2000 * layer : 2000 * (layer + 1)] = payload(number, 8000)[2000 * layer :][:2000]
            assert store.match(NAMESPACE, hashes([0])) == (0, 0)
            assert await load(store, [0]) == []
        assert room.seal(0) and room.seal(1)
        # The third was never finished: it is given back.
        assert len(room.unsealed) == 1
        assert store.saves.commit(list(room.sealed), list(room.sealed.values())) == 2
        store.saves.abort(room.unsealed)
        assert await load(store, [0, 1, 2]) == [payload(0, 8000), payload(1, 8000)]
        assert room_for(store, [0], 8000).views == [None], "it is here"


async def test_a_writer_that_lost_its_room_cannot_seal_it(tmp_path: Path) -> None:
    async with opened_store(tmp_path, dram_bytes=65536) as store:
        room = room_for(store, [0], 3900)
        store.saves.abort(room.unsealed)
        assert not room.seal(0) and room.sealed == {}


async def test_a_reader_sees_right_bytes_or_that_they_were_not(tmp_path: Path) -> None:
    async with opened_store(tmp_path, dram_bytes=2**20) as store:
        room = room_for(store, [0, 1], 8000)
        for number in (0, 1):
            view = room.views[number]
            assert view is not None
            view[:] = payload(number, 8000)
            room.seal(number)
        store.saves.commit(list(room.sealed), list(room.sealed.values()))
        acquired = await store.acquire(NAMESPACE, hashes([0, 1]), deadline_s=0.0, lease_s=5.0)
        blocks = [
            pb.AcquiredBlock(
                offset=store.dram.payload_offset(block),
                payload_bytes=block.payload_bytes,
                checksum=block.checksum,
                generation=block.generation,
            )
            for block in acquired.blocks
        ]
        held = HeldChain(attached(store), blocks, acquired.lease_id, ends_s=0.0)
        assert [bytes(view) for view in held.views] == [payload(0, 8000), payload(1, 8000)]
        assert held.fault(0) is None and held.fault(1) is None
        with pytest.raises(TypeError):
            held.views[0][0] = 1
        store.dram.payload(acquired.blocks[1])[100] ^= 1
        assert held.fault(0) is None and held.fault(1) is CopyFault.CORRUPT
        assert held.corrupt_generations == [acquired.blocks[1].generation]
        store.release(acquired.lease_id)
        store.evictions.drop(acquired.blocks[0].run, from_dram=True, from_ssd=False)  # type: ignore[arg-type]
        assert held.fault(0) is CopyFault.REUSED
        assert len(HeldChain(attached(store), blocks, 1, ends_s=0.0)) == 0


@settings(max_examples=60)
@given(moves=MOVES, filled=st.sets(st.integers(100, 400), max_size=200))
def test_filling_in_bulk_says_what_moving_one_by_one_says(
    moves: list[tuple[int, int]], filled: set[int]
) -> None:
    memory = memoryview(bytearray(8 * index_words_for(2**20, 0)))
    writer, reader = ResidencyWriter(memory), ResidencyReader(memory)
    tiers: dict[int, int] = {}
    for number, after in moves:
        writer.move(block_keys(NAMESPACE, block_hash(number)), tiers.get(number, 0), after)
        tiers[number] = after
    if filled:
        writer.fill(b"".join(block_keys(NAMESPACE, hashes(sorted(filled)))), SSD)
    tiers |= dict.fromkeys(filled, SSD)
    assert writer.left_out == 0
    for number in [*range(61), *range(100, 401)]:
        expected = tiers.get(number, 0)
        assert reader.match(NAMESPACE, block_hash(number)) == (int(expected > 0), expected & DRAM)
    for number, before in tiers.items():
        writer.move(block_keys(NAMESPACE, block_hash(number)), before, 0)
    assert bytes(memory) == bytes(len(memory))


def test_a_bulk_that_does_not_fit_is_left_out_and_nothing_is_overwritten() -> None:
    memory = memoryview(bytearray(8 * index_words_for(0, 0)))
    words = len(memory) // 8
    writer, reader = ResidencyWriter(memory), ResidencyReader(memory)
    writer.move(block_keys(NAMESPACE, hashes(list(range(50)))), 0, DRAM)
    writer.fill(b"".join(block_keys(NAMESPACE, hashes(list(range(100, 100 + 2 * words))))), SSD)
    assert all(reader.match(NAMESPACE, block_hash(n)) == (1, 1) for n in range(50))
    shown = sum(reader.match(NAMESPACE, block_hash(n))[0] for n in range(100, 100 + 2 * words))
    assert shown == 2 * words - writer.left_out > 0.9 * words - 50
