"""Slots, the arena and the DRAM tier: room in use is never given away, names never mixed up."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.kvstore_support import (
    NAMESPACE,
    HandClock,
    block_hash,
    load,
    opened_store,
    payload,
    save,
    slot_of,
)
from trireme.errors import InvalidRequest
from trireme.kvcache.arena import ArenaRef, attach_arena, own_arena, remove_stale_arenas
from trireme.kvcache.arena_copies import CopyFault, copy_out
from trireme.kvcache.block_codec import (
    HEADER_BYTES,
    BlockHeader,
    BlockKey,
    block_keys,
    image_bytes,
    is_intact,
    payload_checksum,
    read_generation,
    read_header,
    tenant_label,
    write_generation,
    write_header,
)
from trireme.kvcache.saves import RESERVATION_S, NewBlock, Refusal
from trireme.kvcache.slab_allocator import SlabAllocator
from trireme.kvcache.stored_blocks import Block

SLAB = 64 * 1024


STEPS = st.tuples(st.sampled_from([4096, 12288, 20480, SLAB]), st.booleans(), st.integers(0, 99))


@given(steps=st.lists(STEPS))
def test_slots_in_use_never_overlap_and_all_room_comes_back(steps: list[tuple[int, bool, int]]) -> None:
    allocator = SlabAllocator(num_slabs=3, slab_bytes=SLAB)
    held: dict[int, int] = {}
    for slot_bytes, give_back, pick in steps:
        if give_back and held:
            offset = sorted(held)[pick % len(held)]
            del held[offset]
            allocator.free(offset)
        elif (offset_or_none := allocator.allocate(slot_bytes)) is not None:
            held[offset_or_none] = slot_bytes
        spans = sorted((offset, offset + length) for offset, length in held.items())
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        assert all(start >= 0 and end <= 3 * SLAB for start, end in spans)
        assert allocator.used_bytes == sum(held.values())
    for offset in held:
        allocator.free(offset)
    assert [allocator.allocate(SLAB) is not None for _ in range(4)] == [True, True, True, False]


@given(data=st.binary(min_size=1, max_size=300), flip=st.integers(0, 8 * (HEADER_BYTES + 300) - 1))
def test_a_flipped_bit_of_an_image_is_noticed_unless_it_carries_nothing(data: bytes, flip: int) -> None:
    header = BlockHeader(
        key=BlockKey(b"k" * 32), payload_bytes=len(data), checksum=payload_checksum(data), tenant="acme",
        saved_unix_s=5.0,
    )  # fmt: skip
    image = bytearray(image_bytes(len(data)))
    image[HEADER_BYTES : HEADER_BYTES + len(data)] = data
    write_header(image, header, generation=7)
    assert read_header(image) == header and is_intact(image, header) and read_generation(image) == 7
    image[flip // 8] ^= 1 << flip % 8
    found = read_header(image)
    # Either it is seen, or it fell on the generation or on padding and changes nothing.
    assert found is None or not is_intact(image, found) or found == header


def test_long_tenant_names_stay_distinct_and_fit() -> None:
    names = ["ü" * 60 + end for end in "ab"] + ["short"]
    labels = [tenant_label(name) for name in names]
    assert len(set(labels)) == 3 and all(len(label.encode()) <= 64 for label in labels)
    assert labels[2] == "short"


def test_hashes_of_a_broken_length_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="17 bytes"):
        block_keys("n", b"x" * 17)


def test_an_arena_leaves_no_file_and_only_its_own_reference_maps_it(tmp_path: Path) -> None:
    with own_arena(tmp_path, dram_bytes=SLAB) as arena:
        attached = attach_arena(arena.ref)
        arena.memory[-1] = 77
        assert attached.memory[-1] == 77
        other = ArenaRef(arena_id=b"x" * 16, path=arena.ref.path, size_bytes=arena.ref.size_bytes)
        with pytest.raises(FileNotFoundError):
            attach_arena(other)
    assert list(tmp_path.iterdir()) == []
    assert attached.memory[-1] == 77, "a mapping outlives the file"


def test_the_arena_of_a_killed_process_is_removed_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from trireme.kvcache.arena import own_arena\n"
        "with own_arena(Path(sys.argv[1]), dram_bytes=65536): print('up', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == b"up\n"
        assert remove_stale_arenas(tmp_path) == 0
        owner.kill()
        owner.wait()
        assert len(list(tmp_path.iterdir())) == 1
        assert remove_stale_arenas(tmp_path) == 1
    assert list(tmp_path.iterdir()) == []


async def test_a_leased_block_stays_when_everything_else_is_put_out(tmp_path: Path) -> None:
    async with opened_store(tmp_path, dram_bytes=SLAB) as store:  # 16 slots of 4 KiB
        save(store, [(0, payload(0))])
        held = await store.acquire(NAMESPACE, block_hash(0), deadline_s=0.0, lease_s=5.0)
        assert save(store, [(n, payload(n)) for n in range(1, 40)]) == 15
        assert save(store, [(n, payload(n)) for n in range(40, 60)]) == 15
        assert copy_out(store.arena, slot_of(held.blocks[0], store)) == payload(0)
        assert await load(store, [0]) == [payload(0)]


async def test_a_reader_that_outlived_its_lease_misses(tmp_path: Path) -> None:
    clock = HandClock()
    async with opened_store(tmp_path, dram_bytes=SLAB, clock=clock) as store:
        save(store, [(0, payload(0))])
        held = await store.acquire(NAMESPACE, block_hash(0), deadline_s=0.0, lease_s=5.0)
        block = slot_of(held.blocks[0], store)
        clock.now_s += 5.0
        store.sweep()
        assert copy_out(store.arena, block) == payload(0), "nobody needed the room yet"
        save(store, [(n, payload(n)) for n in range(1, 17)])
        assert copy_out(store.arena, block) is CopyFault.REUSED
        assert not store.release(held.lease_id)
        assert store.dram.expired == 1


async def test_a_writer_that_never_commits_loses_its_room_and_cannot_commit_later(tmp_path: Path) -> None:
    clock = HandClock()
    async with opened_store(tmp_path, dram_bytes=SLAB, clock=clock) as store:
        wanted = [NewBlock(block_hash=block_hash(n), payload_bytes=3900) for n in range(16)]
        slots = [slot for slot in store.saves.reserve(NAMESPACE, "t", wanted) if isinstance(slot, Block)]
        assert len(slots) == 16
        assert store.saves.reserve(NAMESPACE, "t", wanted[:1]) == [Refusal.PRESENT]
        another = NewBlock(block_hash=block_hash(99), payload_bytes=3900)
        assert store.saves.reserve(NAMESPACE, "t", [another]) == [Refusal.NO_SPACE]
        clock.now_s += RESERVATION_S
        store.sweep()
        assert store.dram.used_bytes == 0
        assert store.saves.commit([slot.generation for slot in slots], [0] * 16) == 0
        assert store.match(NAMESPACE, block_hash(0)) == (0, 0)


async def test_a_flipped_byte_in_the_arena_is_a_miss_once_and_then_forgotten(tmp_path: Path) -> None:
    async with opened_store(tmp_path, dram_bytes=SLAB) as store:
        save(store, [(0, payload(0)), (1, payload(1))])
        held = await store.acquire(NAMESPACE, block_hash(1), deadline_s=0.0, lease_s=5.0)
        store.dram.payload(held.blocks[0])[5] ^= 1
        store.release(held.lease_id)
        assert await load(store, [0, 1]) == [payload(0)]
        assert store.moved.dram_corrupt == 1
        assert store.match(NAMESPACE, block_hash(0) + block_hash(1)) == (1, 1)
        assert save(store, [(1, payload(1))]) == 1
        assert await load(store, [0, 1]) == [payload(0), payload(1)]


async def test_memory_moves_between_block_sizes_as_use_moves(tmp_path: Path) -> None:
    async with opened_store(tmp_path, dram_bytes=4 * SLAB) as store:
        small = [(n, payload(n, 3900)) for n in range(64)]
        assert save(store, small) == 64
        large = [(n, payload(n, 40_000)) for n in range(100, 104)]
        assert save(store, large) == 4
        assert await load(store, range(100, 104)) == [data for _, data in large]
        assert save(store, [(n, payload(n, 3900)) for n in range(200, 264)]) == 64
        assert await load(store, range(200, 264)) == [payload(n, 3900) for n in range(200, 264)]


async def test_a_block_larger_than_a_slab_is_refused_without_putting_others_out(tmp_path: Path) -> None:
    async with opened_store(tmp_path, dram_bytes=4 * SLAB) as store:
        save(store, [(0, payload(0))])
        assert save(store, [(1, payload(1, SLAB))]) == 0
        assert await load(store, [0]) == [payload(0)]


async def test_blocks_are_not_put_out_where_that_makes_no_room(tmp_path: Path) -> None:
    async with opened_store(tmp_path, dram_bytes=SLAB) as store:
        save(store, [(n, payload(n)) for n in range(16)])
        held = await store.acquire(NAMESPACE, block_hash(7), deadline_s=0.0, lease_s=5.0)
        assert save(store, [(100, payload(100, 40_000))]) == 0
        assert await load(store, range(16)) == [payload(n) for n in range(16)]
        store.release(held.lease_id)
        assert save(store, [(100, payload(100, 40_000))]) == 1


async def test_the_end_of_a_chain_goes_before_its_beginning(tmp_path: Path) -> None:
    async with opened_store(tmp_path, dram_bytes=SLAB) as store:
        save(store, [(n, payload(n)) for n in range(16)])
        save(store, [(100, payload(100))])
        assert store.match(NAMESPACE, b"".join(map(block_hash, range(16)))) == (15, 15)


async def test_namespaces_and_salted_hashes_keep_models_and_tenants_apart(tmp_path: Path) -> None:
    async with opened_store(tmp_path, dram_bytes=SLAB) as store:
        save(store, [(0, payload(0))], namespace="model-a", tenant="acme")
        save(store, [(0, payload(50))], namespace="model-b", tenant="bolt")
        assert await load(store, [0], namespace="model-a") == [payload(0)]
        assert await load(store, [0], namespace="model-b") == [payload(50)]
        assert await load(store, [0], namespace="model-c") == []
        assert dict(store.table.dram_ledger.bytes) == {"acme": 4096, "bolt": 4096}


def test_the_generation_is_wiped_when_room_is_given_back() -> None:
    image = bytearray(4096)
    write_generation(image, 9)
    assert read_generation(image) == 9
    write_generation(image, 0)
    assert read_generation(image) == 0
