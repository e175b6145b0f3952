"""KV moves between device, host and lower tiers, beside the steps: tokens stay, blocks are conserved."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Generator
from typing import Any, cast

import pytest
import torch

from tests.unit.engine_support import (
    answer,
    greedy,
    outputs_of,
    prompt_of,
    request,
    run,
    settings,
    tokens_of,
)
from tests.unit.kv_movement_support import ChanceRoster, Releases, conserves, library_of, shaken, sound
from trireme.engine import Engine, FinishReason, Link, Mode, SavedBlock, SequenceRequest, StoredBlock
from trireme.engine.copy_streams import CopyStream
from trireme.engine.kv_copies import Copy, CopyFailed, KvCopies
from trireme.engine.kv_preloads import LayersNeeded
from trireme.engine.kv_swaps import KvSwaps
from trireme.engine.roster import Roster
from trireme.engine.sequence import Sequence
from trireme.errors import InvalidConfiguration, InvalidRequest
from trireme.kvcache.block_codec import payload_checksum
from trireme.kvcache.block_identity import block_hashes
from trireme.models.model import Model
from trireme.models.null import NullModel
from trireme.policies.iteration import Location

SALT = b"tenant"
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


Ask = Callable[[SequenceRequest], list[int]]


@pytest.fixture(scope="module")
def alone(model: Model) -> Ask:
    known: dict[tuple[int, ...], list[int]] = {}

    def ask(wanted: SequenceRequest) -> list[int]:
        key = (wanted.sampling.max_tokens, *wanted.prompt_token_ids)
        if key not in known:
            known[key] = answer(Engine(model, settings()), wanted.prompt_token_ids, wanted.sampling)
        return known[key]

    return ask


class Gatekeeper:
    """Holds one direction of an engine's copies back until it is told to open."""

    def __init__(self, submit: Callable[..., Copy]) -> None:
        self._event = threading.Event()
        submit(self._parts, lambda copy: None)

    def _parts(self, stream: CopyStream) -> Generator[int, None, None]:
        self._event.wait(30)
        yield 0

    def open(self) -> None:
        self._event.set()


def started(model: Model, prompt: list[int], **changes: Any) -> tuple[Engine, KvSwaps, Sequence]:
    """An engine with one sequence that has chosen three tokens."""
    engine = Engine(
        model, settings(**{"block_size": 4, "max_batch_tokens": 64, "host_blocks": 32, **changes})
    )
    engine.add(request("moves", prompt, greedy(12), salt=SALT))
    for _ in range(3):
        engine.step()
    (sequence,) = engine._requests["moves"]
    assert sequence.num_outputs == 3
    return engine, KvSwaps(engine._cache), sequence


def until(engine: Engine, is_so: Callable[[], bool]) -> None:
    """Poll until something is so, without a step."""
    for _ in range(60_000):
        engine.poll()
        if is_so():
            return
        time.sleep(0.001)
    raise AssertionError("a copy does not end")


def is_quiet(engine: Engine) -> bool:
    return engine._cache.copies.num_open == 0


# Random interleavings.


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_tokens_do_not_depend_on_how_kv_moves(model: Model, alone: Ask, seed: int, shares: bool) -> None:
    chance = random.Random(seed)
    rates = [None, 3e5, 1e6, 1e7]
    rules: list[int | LayersNeeded] = [0, 1, 2, lambda loaded, new: loaded // (loaded + new)]
    engine = Engine(
        model,
        settings(
            num_blocks=24,
            host_blocks=chance.choice([6, 20, 60]),
            block_size=4,
            max_batch_tokens=16,
            prefix_cache=shares,
        ),
        preload_layers=chance.choice(rules),
        link=Link(in_bytes_per_s=chance.choice(rates), out_bytes_per_s=chance.choice(rates)),
    )
    roster = ChanceRoster(engine, chance)
    engine._roster = cast(Roster, roster)
    shared = prompt_of(seed % 2, 14)
    elder = Engine(model, settings(block_size=4))
    releases = Releases()
    wanted: dict[str, SequenceRequest] = {}
    tokens: dict[str, list[int]] = {}
    ended: set[str] = set()
    cancelled: set[str] = set()
    for _ in range(6000):
        if len(wanted) < 14 and chance.random() < 0.2:
            name = f"s{len(wanted)}"
            prompt = shared[: chance.randint(0, 14)] + prompt_of(chance.randint(0, 5), chance.randint(1, 20))
            wanted[name] = request(name, prompt, greedy(chance.choice([2, 25])), salt=SALT)
            answer(elder, prompt, greedy(1), salt=SALT)
            library = library_of(elder, block_hashes(prompt, elder.settings.block_size, SALT))
            stored = list(shaken(library, releases, chance)) if chance.random() < 0.7 else []
            if chance.random() < 0.5:
                engine.add(wanted[name], stored=stored)
            else:
                engine.add(wanted[name])
                engine.preload(name, stored)
        elif wanted and len(cancelled) < 3 and chance.random() < 0.02:
            name = chance.choice(sorted(wanted))
            assert engine.cancel(name) == (name not in ended | cancelled)
            if name not in ended:
                cancelled.add(name)
        elif chance.random() < 0.1:
            library = library_of(engine, list(engine._cache.pool._by_hash))
            engine.save(list(library), on_saved=equal_to(library))
        for output in engine.step().outputs:
            assert output.sequence_id not in cancelled
            assert output.index == len(tokens.setdefault(output.sequence_id, []))
            assert output.token_id is not None
            tokens[output.sequence_id].append(output.token_id)
            if output.finish_reason is not None:
                ended.add(output.sequence_id)
        assert conserves(engine._cache.pool)
        assert engine._cache.host is not None and conserves(engine._cache.host.pool)
        if len(wanted) == 14 and not engine.has_work:
            break
    else:
        raise AssertionError("the engine makes no progress")
    for name, got in tokens.items():
        expected = alone(wanted[name])
        assert got == (expected if name in ended else expected[: len(got)])
    assert ended | cancelled == set(wanted)
    until(engine, lambda: is_quiet(engine))
    stats = engine.stats()
    assert (stats.kv_blocks_used, stats.kv_blocks_draining, stats.host_blocks_used) == (0, 0, 0)
    assert stats.lost_sequences == 0
    assert stats.recomputed_tokens == 0 or roster.evictions > 0
    assert roster.swap_outs > 0 and roster.pauses > 0 and stats.swapped_in_blocks > 0
    assert set(releases.counts) <= {1}
    assert not engine._cache._pending
    engine.close()


def equal_to(library: dict[bytes, bytes]) -> Callable[[tuple[SavedBlock, ...]], None]:
    def check(saved: tuple[SavedBlock, ...]) -> None:
        for block in saved:
            assert bytes(block.payload) == library[block.block_hash]

    return check


@pytest.mark.parametrize("seed", range(4))
def test_copies_that_fail_cost_time_and_no_token(
    model: Model, alone: Ask, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    engine = Engine(model, settings(num_blocks=24, host_blocks=30, block_size=4, max_batch_tokens=16))
    engine._roster = cast(Roster, ChanceRoster(engine, chance))
    for owner, name in (
        (engine._cache.memory, "gather"),
        (engine._cache.memory, "scatter"),
        (engine._cache.memory, "scatter_layer"),
    ):
        monkeypatch.setattr(owner, name, fragile(getattr(owner, name)))
    elder = Engine(model, settings(block_size=4))
    wanted = [request(f"s{n}", prompt_of(n, 10 + n), greedy(20), salt=SALT) for n in range(8)]
    releases = Releases()
    for one in wanted:
        answer(elder, one.prompt_token_ids, greedy(1), salt=SALT)
        library = library_of(elder, block_hashes(one.prompt_token_ids, elder.settings.block_size, SALT))
        engine.add(one, stored=sound(library, releases))
    tokens = tokens_of(run(engine))
    assert tokens == {one.sequence_id: alone(one) for one in wanted}
    until(engine, lambda: is_quiet(engine))
    stats = engine.stats()
    assert stats.lost_sequences > 0
    assert (stats.kv_blocks_used, stats.kv_blocks_draining, stats.host_blocks_used) == (0, 0, 0)
    assert set(releases.counts) == {1}


def fragile(function: Callable[..., Any]) -> Callable[..., Any]:
    calls = itertools.count(1)

    def sometimes(*args: Any) -> Any:
        if next(calls) % 4 == 0:
            raise OSError("a copy engine's bad day")
        return function(*args)

    return sometimes


@pytest.mark.parametrize("way", ["swapped", "evicted"])
def test_scores_and_vectors_count_each_token_once_however_often_it_is_computed(
    model: Model, way: str
) -> None:
    asked = [
        request("vector", prompt_of(1, 40), greedy(1), mode=Mode.EMBED),
        request("scores", prompt_of(2, 9), greedy(1), mode=Mode.SCORE, score_continuations=(range(1, 90),)),
    ]

    def answers(disturb: Callable[[Engine], None]) -> tuple[list[float], list[float]]:
        engine = Engine(model, settings(block_size=4, max_batch_tokens=8, host_blocks=64))
        for one in asked:
            engine.add(one)
        vector: list[float] = []
        scores: list[float] = []
        while engine.has_work:
            result = engine.step()
            vector += [x for output in result.embeddings for x in output.vector]
            scores += [x for output in result.scores for x in output.logprobs]
            disturb(engine)
        return vector, scores

    chance = random.Random(5)

    def disturb(engine: Engine) -> None:
        for sequence in list(engine._roster.running.values()):
            if chance.random() > 0.2:
                continue
            if way == "evicted":
                engine._roster.preempt(sequence)
                continue
            swaps = KvSwaps(engine._cache)
            assert swaps.swap_out(sequence)
            until(engine, lambda: sequence.location is not Location.MOVING)  # noqa: B023
            if sequence.location is Location.HOST:
                assert swaps.swap_in(sequence)
                until(engine, lambda: sequence.location is Location.DEVICE)  # noqa: B023
            else:
                engine._roster.preempt(sequence)

    expected = answers(lambda engine: None)
    got = answers(disturb)
    assert got[0] == pytest.approx(expected[0], abs=1e-5)
    assert got[1] == pytest.approx(expected[1], rel=1e-5)


# Swapping.


@pytest.mark.parametrize("length", [1, 7, 8, 30])
def test_a_swapped_sequence_goes_on_where_it_was_and_computes_nothing_again(
    model: Model, alone: Ask, length: int
) -> None:
    prompt = prompt_of(3, length)
    engine, swaps, sequence = started(model, prompt)
    computed = sequence.num_computed
    assert swaps.swap_out(sequence)
    assert sequence.location is Location.MOVING
    assert not swaps.swap_in(sequence) and not swaps.swap_out(sequence)
    until(engine, lambda: sequence.location is Location.HOST)
    assert sequence.row < 0 and sequence.num_computed == computed
    assert engine.stats().kv_blocks_used == 0
    engine._cache.pool.clear()
    engine._cache.memory.tensor.fill_(torch.nan)  # nothing of the device's content is of use
    assert swaps.swap_in(sequence)
    until(engine, lambda: sequence.location is Location.DEVICE)
    engine._cache.memory.zero([b for b in range(256) if b not in sequence.blocks])
    more = [o.token_id for o in outputs_of(run(engine))["moves"]]
    assert sequence.token_ids[length:] == alone(request("alone", prompt, greedy(12)))
    assert len(more) == 9
    stats = engine.stats()
    assert stats.recomputed_tokens == 0
    assert stats.swapped_out_blocks == stats.swapped_in_blocks == -(-computed // 4)
    assert stats.swap_out_bytes == stats.swapped_out_blocks * engine._cache.memory.block_bytes
    assert (stats.host_blocks_used, stats.host_blocks_total) == (0, 32)
    assert stats.host_in_bytes_per_s > 0 and stats.host_out_bytes_per_s > 0


def test_a_sequence_without_a_complete_block_to_share_swaps_too(model: Model, alone: Ask) -> None:
    prompt = prompt_of(3, 9)
    engine, swaps, sequence = started(model, prompt, prefix_cache=False)
    assert swaps.swap_out(sequence)
    until(engine, lambda: sequence.location is Location.HOST)
    engine._cache.memory.tensor.zero_()
    assert swaps.swap_in(sequence)
    until(engine, lambda: sequence.location is Location.DEVICE)
    run(engine)
    assert sequence.token_ids[9:] == alone(request("alone", prompt, greedy(12)))


def test_only_what_is_new_is_copied_and_what_is_there_is_found(model: Model) -> None:
    engine, swaps, sequence = started(model, prompt_of(3, 22))  # 24 computed: 6 whole blocks
    assert sequence.num_computed == 24
    swaps.swap_out(sequence)
    until(engine, lambda: sequence.location is Location.HOST)
    assert swaps.swap_in(sequence)
    assert sequence.location is Location.DEVICE  # the device has all six: no copy
    assert engine.stats().swapped_in_blocks == 0
    for _ in range(2):
        engine.step()
    assert sequence.num_computed == 26
    swaps.swap_out(sequence)
    until(engine, lambda: sequence.location is Location.HOST)
    assert engine.stats().swapped_out_blocks == 6 + 1


def test_a_block_is_not_written_before_the_copy_that_reads_it_is_over(model: Model, alone: Ask) -> None:
    prompt = prompt_of(3, 22)
    engine, swaps, sequence = started(model, prompt, num_blocks=8)
    gatekeeper = Gatekeeper(engine._cache.copies.copy_out)
    assert swaps.swap_out(sequence)
    engine._roster._scheduler.remove("moves")  # nobody brings it back
    stats = engine.stats()
    assert (stats.kv_blocks_used, stats.kv_blocks_draining) == (0, 6)
    engine.add(request("other", prompt_of(4, 20), greedy(4), salt=SALT))
    for _ in range(3):
        assert engine.step().work == ()  # six of eight blocks drain: it has no room
    gatekeeper.open()
    engine._cache.wait_for_draining()
    assert engine.stats().kv_blocks_draining == 0
    while "other" in engine._requests:
        engine.step()
    assert swaps.swap_in(sequence)
    until(engine, lambda: sequence.location is Location.DEVICE)
    engine._roster.add(sequence)
    run(engine)
    assert len(sequence.token_ids) == 32  # all that eight blocks hold
    assert sequence.token_ids[22:] == alone(request("alone", prompt, greedy(12)))[:10]


def test_a_full_host_refuses_and_nothing_changes(model: Model) -> None:
    engine, swaps, sequence = started(model, prompt_of(3, 22), host_blocks=5)
    before = list(sequence.blocks)
    assert not swaps.swap_out(sequence)
    assert sequence.location is Location.DEVICE and sequence.blocks == before
    assert engine.stats().host_blocks_used == 0
    without, swaps, sequence = started(model, prompt_of(3, 22), host_blocks=0)
    assert not swaps.swap_out(sequence)
    assert without.stats().host_blocks_total == 0
    with pytest.raises(InvalidConfiguration, match="host_blocks"):
        settings(host_blocks=-1)


@pytest.mark.parametrize("way", ["out", "in"])
def test_a_cancel_while_blocks_move_leaves_none_behind(model: Model, way: str) -> None:
    engine, swaps, sequence = started(model, prompt_of(3, 22))
    copies = engine._cache.copies
    if way == "in":
        swaps.swap_out(sequence)
        until(engine, lambda: sequence.location is Location.HOST)
        engine._cache.pool.clear()
    gatekeeper = Gatekeeper(copies.copy_in if way == "in" else copies.copy_out)
    assert swaps.swap_in(sequence) if way == "in" else swaps.swap_out(sequence)
    assert engine.cancel("moves")
    assert engine._cache.pool.num_draining == 6
    gatekeeper.open()
    until(engine, lambda: is_quiet(engine))
    stats = engine.stats()
    assert (stats.kv_blocks_used, stats.kv_blocks_draining, stats.host_blocks_used) == (0, 0, 0)


def test_a_model_without_layers_swaps_nothing_in_no_time() -> None:
    engine = Engine(NullModel(vocab_size=50), settings(host_blocks=8))
    engine.add(request("null", [1, 2, 3], greedy(5)))
    engine.step()
    (sequence,) = engine._requests["null"]
    swaps = KvSwaps(engine._cache)
    assert swaps.swap_out(sequence)
    until(engine, lambda: sequence.location is Location.HOST)
    assert swaps.swap_in(sequence)
    until(engine, lambda: sequence.location is Location.DEVICE)
    assert tokens_of(run(engine))["null"] == [5, 6, 7, 8]


# Preloading.


def stored_for(model: Model, prompt: list[int], releases: Releases) -> list[StoredBlock]:
    elder = Engine(model, settings(block_size=4))
    answer(elder, prompt, greedy(1), salt=SALT)
    return sound(library_of(elder, block_hashes(prompt, elder.settings.block_size, SALT)), releases)


@pytest.mark.parametrize("layers", [0, 1, 2, 99])
def test_a_stored_prefix_is_loaded_beside_the_steps_of_others(model: Model, alone: Ask, layers: int) -> None:
    prompt = prompt_of(8, 43)
    releases = Releases()
    engine = Engine(
        model,
        settings(block_size=4),
        preload_layers=layers,
        link=Link(in_bytes_per_s=5e4),  # a layer of ten blocks takes 0.1 s
    )
    other = request("other", prompt_of(9, 12), greedy(300), salt=SALT)
    engine.add(other)
    engine.step()
    wanted = request("late", prompt, greedy(8), salt=SALT)
    engine.add(wanted, stored=stored_for(model, prompt, releases))
    results = run(engine)
    assert tokens_of(results)["late"] == alone(wanted)
    assert outputs_of(results)["late"][0].cached_tokens == 40
    stats = engine.stats()
    assert stats.prefill_tokens == 12 + 3
    assert (stats.preload_blocks, stats.preload_corrupt) == (10, 0)
    assert (stats.stall_s > 0.05) == (layers < 2)
    assert set(releases.counts) == {1}


@pytest.mark.parametrize("fault", ["flipped", "short", "missing"])
def test_a_bad_block_ends_the_prefix_and_the_rest_is_computed(model: Model, alone: Ask, fault: str) -> None:
    prompt = prompt_of(8, 43)
    releases = Releases()
    stored = stored_for(model, prompt, releases)
    bad = stored[6]
    match fault:
        case "flipped":
            damaged = bytearray(bad.payload)
            damaged[-1] ^= 1
            stored[6] = StoredBlock(bad.block_hash, damaged, bad.checksum, bad.release)
        case "short":
            stored[6] = StoredBlock(bad.block_hash, memoryview(bad.payload)[:-1], None, bad.release)
        case "missing":
            stored.pop(6).let_go()
    engine = Engine(model, settings(block_size=4))
    wanted = request("late", prompt, greedy(8), salt=SALT)
    engine.add(wanted)
    assert engine.preload("late", stored)
    results = run(engine)
    assert tokens_of(results)["late"] == alone(wanted)
    assert outputs_of(results)["late"][0].cached_tokens == 24
    stats = engine.stats()
    assert (stats.preload_blocks, stats.preload_corrupt) == (6, fault != "missing")
    assert stats.prefill_tokens == 43 - 24
    assert set(releases.counts) == {1}
    assert stats.kv_blocks_used == 0


def test_a_payload_that_changes_after_it_was_offered_is_a_miss(model: Model, alone: Ask) -> None:
    prompt = prompt_of(8, 43)
    engine = Engine(model, settings(block_size=4))
    gatekeeper = Gatekeeper(engine._cache.copies.copy_in)
    slots = []
    stored = []
    for block in stored_for(model, prompt, Releases()):
        slots.append(bytearray(block.payload))
        stored.append(StoredBlock(block.block_hash, memoryview(slots[-1]), block.checksum))
    wanted = request("late", prompt, greedy(8), salt=SALT)
    engine.add(wanted, stored=stored)
    engine.step()
    slots[0][:] = bytes(len(slots[0]))  # the lease ran out
    gatekeeper.open()
    assert tokens_of(run(engine))["late"] == alone(wanted)
    assert engine.stats().preload_blocks == 0


def test_choices_of_one_prompt_wait_for_one_load(model: Model, alone: Ask) -> None:
    prompt = prompt_of(8, 43)
    engine = Engine(model, settings(block_size=4), link=Link(in_bytes_per_s=2e5), preload_layers=2)
    releases = Releases()
    for name in ("a", "b", "c"):
        engine.add(request(name, prompt, greedy(8), salt=SALT), stored=stored_for(model, prompt, releases))
    tokens = tokens_of(run(engine))
    assert tokens["a"] == tokens["b"] == tokens["c"] == alone(request("x", prompt, greedy(8)))
    stats = engine.stats()
    assert stats.preload_blocks == 10
    assert stats.prefill_tokens == 3 * 3
    assert set(releases.counts) == {1}


def test_loads_of_those_who_wait_do_not_push_each_other_out(model: Model) -> None:
    releases = Releases()
    engine = Engine(model, settings(block_size=4, num_blocks=26, max_num_seqs=1, watermark=0.0))
    for number in range(5):
        prompt = prompt_of(20 + number, 43)
        engine.add(
            request(f"s{number}", prompt, greedy(2), salt=SALT), stored=stored_for(model, prompt, releases)
        )
    results = run(engine)
    firsts = [outputs[0].cached_tokens for outputs in outputs_of(results).values()]
    assert firsts == [40] * 5
    assert engine.stats().preload_blocks == 50


def test_what_cannot_be_preloaded_is_let_go(model: Model) -> None:
    prompt = prompt_of(8, 43)
    releases = Releases()
    engine = Engine(model, settings(block_size=4))
    assert not engine.preload("nobody", stored_for(model, prompt, releases))
    engine.add(request("runs", prompt, greedy(8), salt=SALT))
    engine.step()
    assert not engine.preload("runs", stored_for(model, prompt, releases))
    with pytest.raises(InvalidRequest):
        engine.add(request("bad", [], greedy(8)), stored=stored_for(model, prompt, releases))
    engine.add(request("waits", prompt_of(9, 20), greedy(8), salt=SALT))
    assert engine.preload("waits", stored_for(model, prompt_of(10, 20), releases))  # of another prompt
    run(engine)
    assert set(releases.counts) == {1}
    assert engine.stats().preload_blocks == 0


def test_a_sequence_that_was_admitted_without_its_stored_blocks_does_without_them(model: Model) -> None:
    prompt = prompt_of(8, 43)
    releases = Releases()
    engine = Engine(model, settings(block_size=4))
    engine.add(request("late", prompt, greedy(8), salt=SALT), stored=stored_for(model, prompt, releases))
    (sequence,) = engine._requests["late"]
    assert engine._cache.admit(sequence)
    assert set(releases.counts) == {1}
    engine._preloads.start([sequence], reserve=0)
    assert sequence.load is None and engine._cache.pool.num_held == 11
    engine.cancel("late")
    assert engine._cache.pool.num_free == 256


def test_a_cancel_during_a_load_leaves_nothing_behind(model: Model) -> None:
    prompt = prompt_of(8, 43)
    releases = Releases()
    engine = Engine(model, settings(block_size=4))
    gatekeeper = Gatekeeper(engine._cache.copies.copy_in)
    engine.add(request("late", prompt, greedy(8), salt=SALT), stored=stored_for(model, prompt, releases))
    engine.step()
    assert engine.stats().kv_blocks_used == 10
    assert engine.cancel("late")
    assert engine.stats().kv_blocks_draining == 10
    gatekeeper.open()
    until(engine, lambda: is_quiet(engine))
    assert engine._cache.pool.num_free == 256
    assert set(releases.counts) == {1}


def test_a_load_that_breaks_under_a_running_sequence_is_computed_instead(
    model: Model, alone: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompt_of(8, 43)
    engine = Engine(model, settings(block_size=4), preload_layers=1, link=Link(in_bytes_per_s=1e5))
    scatter = engine._cache.memory.scatter_layer

    def broken(layer: int, *args: Any) -> None:
        if layer == 1:
            raise OSError("the second layer is lost")
        scatter(layer, *args)

    monkeypatch.setattr(engine._cache.memory, "scatter_layer", broken)
    other = request("other", prompt_of(9, 12), greedy(40), salt=SALT)
    engine.add(other)
    wanted = request("late", prompt, greedy(8), salt=SALT)
    engine.add(wanted, stored=stored_for(model, prompt, Releases()))
    results = run(engine)
    assert tokens_of(results) == {"late": alone(wanted), "other": alone(other)}
    assert all(o.finish_reason is not FinishReason.ERROR for r in results for o in r.outputs)


def test_a_load_that_breaks_before_its_sequence_has_run_is_computed_instead(
    model: Model, alone: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompt_of(8, 43)
    engine = Engine(model, settings(block_size=4), preload_layers=0)
    gate = threading.Event()

    def broken(*args: Any) -> None:
        gate.wait(30)
        raise OSError("the first layer is lost")

    monkeypatch.setattr(engine._cache.memory, "scatter_layer", broken)
    wanted = request("late", prompt, greedy(8), salt=SALT)
    engine.add(wanted, stored=stored_for(model, prompt, Releases()))
    (sequence,) = engine._requests["late"]
    engine._preloads.start([sequence], reserve=0)
    until(engine, lambda: sequence.location is Location.NONE)
    assert engine._cache.admit(sequence)
    assert sequence.num_computed == 40
    gate.set()
    until(engine, lambda: is_quiet(engine))
    assert sequence.location is Location.NONE and sequence.num_computed == 0
    assert engine._cache.pool.num_free == 256
    assert tokens_of(run(engine))["late"] == alone(wanted)


# Saving.


@pytest.mark.parametrize("given_room", [False, True])
def test_saved_blocks_are_whole_and_stay_as_they_were(model: Model, given_room: bool) -> None:
    engine = Engine(model, settings(block_size=4, num_blocks=44))
    prompt = prompt_of(8, 41)
    answer(engine, prompt, greedy(1), salt=SALT)
    names = list(block_hashes(prompt, engine.settings.block_size, SALT))
    expected = library_of(engine, names)
    rooms = {name: memoryview(bytearray(engine._cache.memory.block_bytes)) for name in names[:-1]}
    rooms[names[0]] = memoryview(bytearray(3))
    gatekeeper = Gatekeeper(engine._cache.copies.copy_out)
    saved: list[SavedBlock] = []
    count = engine.save(
        [*names, b"nobody's"], rooms.get if given_room else None, on_saved=lambda blocks: saved.extend(blocks)
    )
    assert count == 10
    assert engine.stats().kv_blocks_draining == 10
    engine.add(request("other", prompt_of(9, 150), greedy(2), salt=SALT))
    assert engine.step().work == ()  # it would have to overwrite what is being saved
    gatekeeper.open()
    run(engine)
    until(engine, lambda: is_quiet(engine))
    got = {block.block_hash: bytes(block.payload) for block in saved}
    assert got == ({name: expected[name] for name in names[1:-1]} if given_room else expected)
    assert all(block.checksum == payload_checksum(block.payload) for block in saved)
    if given_room:
        assert all(bytes(rooms[name]) == expected[name] for name in got)


def test_saving_takes_no_more_than_a_part_of_the_blocks_at_a_time(model: Model) -> None:
    engine = Engine(model, settings(block_size=4, num_blocks=16))
    prompt = prompt_of(8, 41)
    answer(engine, prompt, greedy(1), salt=SALT)
    names = block_hashes(prompt, engine.settings.block_size, SALT)
    answers: list[tuple[SavedBlock, ...]] = []
    gatekeeper = Gatekeeper(engine._cache.copies.copy_out)
    assert [
        engine.save(names[:3], on_saved=answers.append),
        engine.save(names[3:], on_saved=answers.append),
    ] == [3, 1]
    assert engine.save(names[4:], on_saved=answers.append) == 0
    assert answers == [()]
    gatekeeper.open()
    until(engine, lambda: is_quiet(engine))
    assert [len(saved) for saved in answers] == [0, 3, 1]
    assert engine.save(names[4:], on_saved=answers.append) == 4


def test_a_save_is_answered_once_whatever_happens(model: Model) -> None:
    engine = Engine(model, settings(block_size=4))
    answers: list[tuple[SavedBlock, ...]] = []
    assert engine.save([b"nobody's"], on_saved=answers.append) == 0
    assert answers == [()]
    prompt = prompt_of(8, 41)
    answer(engine, prompt, greedy(1), salt=SALT)
    gatekeeper = Gatekeeper(engine._cache.copies.copy_out)
    engine.save(block_hashes(prompt, engine.settings.block_size, SALT), on_saved=answers.append)
    threading.Timer(0.05, gatekeeper.open).start()
    engine.close()
    assert len(answers) == 2
    assert engine._cache.pool.num_draining == 0


# Copies.


def counting(parts: int, seen: list[str], name: str) -> Callable[[CopyStream], Generator[int, None, None]]:
    def work(stream: CopyStream) -> Generator[int, None, None]:
        for part in range(parts):
            seen.append(f"{name}{part}")
            yield 1000

    return work


def test_copies_of_one_direction_keep_their_order_and_report_at_the_poll() -> None:
    copies = KvCopies(CPU, Link(in_bytes_per_s=1e6))
    seen: list[str] = []
    over: list[Copy] = []
    first = copies.copy_in(counting(2, seen, "a"), over.append)
    second = copies.copy_in(counting(3, seen, "b"), over.append)
    copies.join(second, 2)
    copies.finish(second)
    assert seen == ["a0", "a1", "b0", "b1", "b2"]
    assert over == [] and copies.num_open == 2
    copies.poll()
    assert over == [first, second] and copies.num_open == 0
    assert first.is_complete and second.num_bytes == 3000
    assert 0 < copies.in_bytes_per_s <= 1e6
    assert copies.out_bytes_per_s == 0
    copies.close()


def test_a_cancelled_copy_stops_after_its_part_and_a_failed_one_does_not_stop_the_next() -> None:
    copies = KvCopies(CPU)
    seen: list[str] = []
    over: list[Copy] = []
    gatekeeper = Gatekeeper(copies.copy_out)
    cancelled = copies.copy_out(counting(5, seen, "a"), over.append)
    cancelled.cancel()

    def failing(stream: CopyStream) -> Generator[int, None, None]:
        yield 10
        raise OSError("no such memory")

    failed = copies.copy_out(failing, over.append)
    last = copies.copy_out(counting(1, seen, "c"), over.append)
    gatekeeper.open()
    copies.finish(last)
    copies.join(failed, 0)
    with pytest.raises(CopyFailed):
        copies.join(failed, 1)
    with pytest.raises(CopyFailed):
        copies.join(cancelled, 0)
    copies.poll()
    assert seen == ["c0"]
    assert [copy.is_complete for copy in over] == [False, False, True]
    assert isinstance(failed.error, OSError)
    copies.close()


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_link_without_speed_is_refused(rate: float) -> None:
    with pytest.raises(InvalidConfiguration):
        Link(in_bytes_per_s=rate)
