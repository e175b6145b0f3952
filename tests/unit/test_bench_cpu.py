"""`make bench-cpu`: weights are what they say, engines agree on them, and bars are judged rightly."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.cpu_models.bars import bars
from benchmarks.cpu_models.llama_cpp_install import without_amx
from benchmarks.cpu_models.ours import Ours, stored_step_bytes
from benchmarks.cpu_models.random_weights import SHAPES, Shape, write_random_checkpoint
from benchmarks.cpu_models.transformers_peer import Transformers
from benchmarks.cpu_models.turns import Case, Died, Running, Times

TINY = Shape(hidden=64, layers=2, heads=4, kv_heads=2, inner=128, vocabulary=96)
DECODE_1 = Case(prompt=32, batch=1, steps=4)
PREFILL = Case(prompt=128)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_random_checkpoint(TINY, directory, seed=3)
    return directory


def test_a_checkpoint_has_the_parameters_that_its_shape_says(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == TINY.parameters
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize(("name", "millions"), [("125m", 125), ("850m", 850)])
def test_a_shape_is_as_large_as_its_name(name: str, millions: int) -> None:
    assert math.isclose(SHAPES[name].parameters, millions * 1e6, rel_tol=0.01)


def test_the_same_seed_gives_the_same_bits(checkpoint: Path, tmp_path: Path) -> None:
    write_random_checkpoint(TINY, tmp_path / "same", seed=3)
    write_random_checkpoint(TINY, tmp_path / "other", seed=4)
    weights = (checkpoint / "model.safetensors").read_bytes()
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == weights
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != weights


def test_our_engine_and_transformers_have_the_same_logits_and_answer(checkpoint: Path) -> None:
    threads = torch.get_num_threads()
    ours, theirs = Ours(checkpoint, threads, ""), Transformers(checkpoint, threads, "float32")
    prompt = list(range(16, 56))
    mine, reference = torch.tensor(ours.logits(prompt)), torch.tensor(theirs.logits(prompt))
    assert mine.std() > 0.1
    torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4)
    for contestant in (ours, theirs):
        assert contestant.prefill_s(prompt) > 0.0
        assert contestant.decode_s([prompt[:32]] * 16, 3) > 0.0


def test_a_step_reads_all_weights_but_the_embedding(checkpoint: Path) -> None:
    assert stored_step_bytes(checkpoint) == 2 * (TINY.parameters - TINY.vocabulary * TINY.hidden)
    peer = Transformers(checkpoint, torch.get_num_threads(), "float32")
    assert peer.step_bytes == 2 * stored_step_bytes(checkpoint)


def test_a_ratio_is_the_median_over_the_rounds() -> None:
    times = Times(PREFILL, {"a": [1.0, 2.0, 10.0], "b": [2.0, 3.0, 10.0]})
    assert times.ratio("a", "b") == 1.5  # of 2, 1.5 and 1
    assert times.ratio("b", "a") == pytest.approx(1 / 1.5)


def test_bars_take_the_faster_peer_and_leave_transformers_out() -> None:
    seconds = {
        "trireme int8": [1.0],
        "llama.cpp Q8_0": [1.3],
        "openvino 8-bit": [1.2],
        "transformers x": [0.1],
    }
    found = bars("850m", "int8", {"decode 1": Times(DECODE_1, seconds)}, {"decode 1": 0.8})
    assert [(bar.measured, bar.wanted, bar.is_met) for bar in found] == [
        (1.2, 1.25, False),
        (0.8, 0.75, True),
    ]
    small = bars("125m", "int8", {"decode 1": Times(DECODE_1, seconds)}, {})
    assert [(bar.wanted, bar.is_met) for bar in small] == [(1.1, True)]
    prefill = bars("850m", "int4", {"prefill 128": Times(PREFILL, {**seconds, "trireme int4": [1.0]})}, {})
    assert [bar.wanted for bar in prefill] == [1.0]
    assert bars("trireme-py-6m", "int8", {"decode 1": Times(DECODE_1, seconds)}, {}) == []


def test_six_bits_are_held_against_sixteen_and_against_q6_k() -> None:
    times = Times(DECODE_1, {"trireme fp6": [0.4], "trireme bf16": [1.0], "llama.cpp Q6_K": [0.3]})
    over_bf16, over_q6_k = bars("125m", "fp6", {"decode 1": times}, {})
    assert over_bf16.measured == pytest.approx(0.4) and over_bf16.is_met
    assert not replace(over_bf16, measured=0.46).is_met
    assert over_q6_k.measured == pytest.approx(0.75) and not over_q6_k.is_met


def test_a_build_without_amx_keeps_the_other_instruction_sets() -> None:
    options = without_amx({"avx2", "avx512f", "avx512_vnni", "amx_int8", "amx_tile"})
    assert options == "-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON"


def test_a_process_that_dies_is_named_with_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    with pytest.raises(Died, match=r"nobody ended with 1; see .*log\.txt"):
        Running("nobody", Path(sys.executable), "no_such_module", [], log)
    assert "no_such_module" in log.read_text(encoding="utf-8")
