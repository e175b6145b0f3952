"""Decode steps replayed from graphs give what they give without, whatever came between capture and replay."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.cuda.graph_tape import TapeCapturer, TapedLauncher
from tests.unit.engine_support import prompt_of, reference_model, request, run, save, tokens_of
from tests.unit.engine_support import settings as sizes
from trireme.engine import Engine, SamplingParams, SequenceRequest
from trireme.engine.device_choice import DeviceChooser
from trireme.engine.graph_capture import Graph, capturer_of
from trireme.kernels import cuda_attention, cuda_kv, ops, reference
from trireme.kernels.attention_batch import AttentionBatch
from trireme.kernels.cuda_emulator import Emulator
from trireme.kernels.static_decodes import StaticDecodes, spare_blocks
from trireme.loading.whole import load_model
from trireme.models.model import Model

CPU = torch.device("cpu")


def loaded(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    return load_model(save(reference_model(name), folder), dtype=dtype)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return loaded("llama3", Path(tmp_path_factory.mktemp("llama3")))


# A static batch.


def static_batch(
    rows: int,
    positions: list[int],
    tables: np.ndarray[Any, Any],
    *,
    width: int,
    dtype: torch.dtype,
    spare: int,
) -> StaticDecodes:
    batch = StaticDecodes(rows=rows, width=width, block_size=16, spare_block=spare, device=CPU, dtype=dtype)
    # Another step was there before: nothing of it may be left.
    batch.fill([9] * rows, [5] * rows, np.arange(rows, dtype=np.int64)[:, None])
    batch.fill([3] * len(positions), positions, tables)
    return batch


def moving_batch(positions: list[int], tables: np.ndarray[Any, Any], dtype: torch.dtype) -> AttentionBatch:
    return AttentionBatch(
        query_lens=[1] * len(positions),
        context_lens=[position + 1 for position in positions],
        block_tables=tables,
        block_size=16,
        device=CPU,
        dtype=dtype,
    )


def scene(positions: list[int], dtype: torch.dtype) -> tuple[np.ndarray[Any, Any], Tensor, Tensor, int]:
    """Block tables, queries for 8 rows, caches with spare blocks, and the first of those."""
    torch.manual_seed(0)
    width = max(positions) // 16 + 1
    tables = np.random.default_rng(1).permutation(width * len(positions)).reshape(-1, width)
    spare = tables.size
    caches = torch.randn(2, spare + spare_blocks(8, 16), 16, 2, 16, dtype=dtype)
    return tables.astype(np.int64), torch.randn(8, 4, 16, dtype=dtype), caches, spare


@pytest.mark.parametrize("window", [None, 20])
def test_attention_of_a_static_batch_is_that_of_a_step(window: int | None) -> None:
    positions = [0, 70, 15, 16, 33]
    tables, q, caches, spare = scene(positions, torch.float32)
    static = static_batch(8, positions, tables, width=9, dtype=torch.float32, spare=spare)
    found = ops.paged_attention(q, caches[0], caches[1], static, scale=0.25, window=window, cap=3.0)
    batch = moving_batch(positions, tables, torch.float32)
    wanted = reference.paged_attention(q[:5], caches[0], caches[1], batch, scale=0.25, window=window, cap=3.0)
    torch.testing.assert_close(found[:5], wanted)
    assert found.isfinite().all()


def test_the_kernels_bits_do_not_depend_on_a_graphs_padding_and_width(emulator: Emulator) -> None:
    positions = [0, 1200, 515, 511, 40]  # one to three splits of keys
    tables, q, caches, spare = scene(positions, torch.bfloat16)
    batch = moving_batch(positions, tables, torch.bfloat16)
    wanted = cuda_attention.paged_attention(emulator, q[:5], caches[0], caches[1], batch, scale=0.25)
    for width in (76, 160):
        static = static_batch(8, positions, tables, width=width, dtype=torch.bfloat16, spare=spare)
        found = cuda_attention.paged_attention(emulator, q, caches[0], caches[1], static, scale=0.25)
        assert torch.equal(found[:5], wanted)


def test_a_bound_of_contexts_bounds_their_splits() -> None:
    rule = cuda_attention.SplitRule(unit=64, most=4)
    most = 0
    for context in range(1, 2000):
        most = max(most, rule.splits(context))
        assert rule.splits_up_to(context) == most


def test_padding_writes_to_spare_blocks_alone_each_row_to_its_own_slot(emulator: Emulator) -> None:
    positions = [5, 40, 17]
    tables, _, caches, spare = scene(positions, torch.bfloat16)
    static = static_batch(8, positions, tables, width=4, dtype=torch.bfloat16, spare=spare)
    assert len(set(static.slots.tolist())) == 8
    assert static.slots[:3].tolist() == moving_batch(positions, tables, torch.bfloat16).slots.tolist()
    assert all(spare * 16 <= slot < caches.shape[1] * 16 for slot in static.slots[3:].tolist())
    before = caches.clone()
    new = torch.randn(2, 8, 2, 16, dtype=torch.bfloat16)
    cuda_kv.append_kv(emulator, new[0], new[1], caches[0], caches[1], static.slots)
    changed = (caches != before).any(-1).any(-1).flatten(1)[:, : spare * 16]
    assert sorted(set(changed.nonzero()[:, 1].tolist())) == sorted(static.slots[:3].tolist())


# Whole engines.


def requests(count: int = 5, *, max_tokens: int = 40) -> list[SequenceRequest]:
    """Sequences that end one after the other, so that batches of all sizes decode."""
    shared = prompt_of(99, 24)
    return [
        request(
            f"s{number}",
            [*shared, *prompt_of(number, 3 + 7 * number)] if number % 2 else prompt_of(number, 5 + number),
            SamplingParams(max_tokens=max_tokens - 7 * number, temperature=0.7 * (number % 3), seed=number),
        )
        for number in range(count)
    ]


def answers(engine: Engine, wanted: list[SequenceRequest]) -> dict[str, list[int]]:
    for one in wanted:
        engine.add(one)
    return tokens_of(run(engine))


@pytest.mark.parametrize("name", ["qwen2_window", "gemma2", "gpt2"])
def test_an_engine_gives_the_same_tokens(name: str, tmp_path: Path) -> None:
    model = loaded(name, tmp_path)
    capturer = TapeCapturer()
    wanted = requests(max_tokens=34)
    engine = Engine(model, sizes(), capturer=capturer)
    assert answers(engine, wanted) == answers(Engine(model, sizes()), wanted)
    assert capturer.captures == 4  # 1, 2, 4 and 8 rows
    assert engine.stats().graph_steps == capturer.replays > 20 and capturer.clears == 0


def test_sequences_that_outgrow_the_block_tables_get_other_graphs(model: Model) -> None:
    capturer = TapeCapturer()
    wanted = requests(3, max_tokens=90)
    changes = {"block_size": 4, "num_blocks": 200}
    got = answers(Engine(model, sizes(**changes), capturer=capturer), wanted)
    assert got == answers(Engine(model, sizes(**changes)), wanted)
    assert capturer.clears == 1 and capturer.captures > 3


def test_preempted_and_swapped_sequences_go_on_in_graphs(model: Model) -> None:
    capturer = TapeCapturer()
    wanted = requests(6)
    changes = {"num_blocks": 18, "host_blocks": 9, "policy": "mlfq", "max_num_seqs": 3}
    engine = Engine(model, sizes(**changes), capturer=capturer)
    assert answers(engine, wanted) == answers(Engine(model, sizes()), wanted)
    assert engine.stats().preemptions and capturer.replays > 30


def test_a_replay_touches_no_block_of_another(model: Model) -> None:
    engine = Engine(model, sizes(), capturer=TapeCapturer())
    for one in requests(3):
        engine.add(one)
    while engine.stats().prefill_tokens < sum(len(one.prompt_token_ids) for one in requests(3)) - 24:
        engine.step()
    engine.step()
    tensor = engine._cache.memory.tensor[:, :, : engine.settings.num_blocks]
    before = tensor.clone()
    engine.step()
    running = [sequence for one in engine._requests.values() for sequence in one]
    places = [divmod(sequence.num_computed - 1, engine.settings.block_size) for sequence in running]
    written = sorted(
        (one.blocks[block], offset) for one, (block, offset) in zip(running, places, strict=True)
    )
    changed = (tensor != before).any(-1).any(-1).any(0).any(0)
    assert [tuple(place) for place in changed.nonzero().tolist()] == written


def test_kernels_sampling_and_graphs_work_together(
    tmp_path: Path, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded("qwen3", tmp_path, torch.bfloat16)
    capturer = TapeCapturer()
    launcher = TapedLauncher(emulator, capturer)
    wanted = requests(3, max_tokens=16)
    vocab = model.config.vocab_size

    def attention(q: Tensor, k: Tensor, v: Tensor, batch: AttentionBatch, **rules: Any) -> Tensor:
        rules["soft_cap"] = rules.pop("cap", None)
        return cuda_attention.paged_attention(launcher, q, k, v, batch, **rules)

    monkeypatch.setattr(ops, "paged_attention", attention)
    monkeypatch.setattr(ops, "append_kv", lambda *tensors: cuda_kv.append_kv(launcher, *tensors))
    plain = answers(Engine(model, sizes()), wanted)
    chooser = DeviceChooser(emulator, CPU, vocab_size=vocab, most_sequences=8)
    engine = Engine(model, sizes(), capturer=capturer, chooser=chooser)
    assert answers(engine, wanted) == plain
    assert capturer.captures == 3 and capturer.replays > 10


# Faults.


def test_an_engine_whose_steps_cannot_be_captured_runs_without(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    class Refusing(TapeCapturer):
        def capture(self, run: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
            self.captures += 1
            raise RuntimeError("operation not permitted when stream is capturing")

    capturer = Refusing()
    with caplog.at_level(logging.WARNING):
        got = answers(Engine(model, sizes(), capturer=capturer), requests())
    assert got == answers(Engine(model, sizes()), requests())
    assert capturer.captures == 1
    assert [record.message for record in caplog.records] == ["decode_graphs_off"]


def test_a_graph_that_gives_something_else_is_not_used(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    class Wrong(TapeCapturer):
        def capture(self, run: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
            graph, expected = super().capture(run)
            return graph, expected * 1.1

    capturer = Wrong()
    with caplog.at_level(logging.ERROR):
        got = answers(Engine(model, sizes(), capturer=capturer), requests())
    assert got == answers(Engine(model, sizes()), requests())
    assert capturer.captures == capturer.replays == 1
    assert [record.message for record in caplog.records] == ["decode_graphs_off"]


def test_the_tape_refuses_what_a_capture_refuses() -> None:
    x = torch.zeros(20)
    for ask in (lambda: x * x.sum().item(), lambda: x + torch.tensor([1.0])):
        with pytest.raises(RuntimeError, match="while a graph is captured"):
            TapeCapturer().capture(ask)


def test_without_a_gpu_there_is_nothing_to_capture_with(model: Model) -> None:
    assert capturer_of(model) is None
    memory = Engine(model, sizes())._cache.memory
    assert memory.tensor.shape[2] == sizes().num_blocks  # no spare blocks
