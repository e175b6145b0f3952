"""Traces, generators and engine models: what goes into a simulation."""

from __future__ import annotations

import gzip
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trireme.errors import InvalidConfiguration
from trireme.policies.iteration_profile import Part
from trireme.simulator import operators, traces, workloads
from trireme.simulator.engine_model import EngineModel, Sample, composition, fitted, from_file
from trireme.simulator.requests import TICK_S, Request, checked, on_tick, rescaled


def test_an_azure_trace_is_read_plain_and_gzipped(tmp_path: Path) -> None:
    text = "t_s,context_tokens,generated_tokens\n0.0,374,44\n0.25,396,0\n"
    plain, packed = tmp_path / "a.csv", tmp_path / "a.csv.gz"
    plain.write_text(text)
    packed.write_bytes(gzip.compress(text.encode()))
    expected = [Request("r0", 0.0, 374, 44), Request("r1", 0.25, 396, 1)]
    assert traces.read(plain) == traces.read(packed) == expected


def test_mooncake_blocks_keep_their_ids_and_order(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    row = {"timestamp": 3000, "input_length": 1700, "output_length": 9, "hash_ids": [7, 8, 3, 4]}
    path.write_text(json.dumps(row) + "\n")
    (request,) = traces.read(path)
    assert (request.arrival_s, request.prompt_tokens, request.block_tokens) == (3.0, 1700, 512)
    assert list(request.block_ids()) == [7, 8, 3, 4]


def agentic(path: Path) -> None:
    turns = [
        {"t": 9.0, "in": 200, "out": 0, "runs": [[0, 2], [5, 1]], "think_s": 4.0},
        {"t": 0.0, "in": 130, "out": 7, "runs": [[0, 2]], "think_s": 0.0},
    ]
    rows = [{"session": name, "block_size": 64, "requests": turns} for name in "ab"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_turns_of_a_session_come_in_order_and_share_blocks_with_no_other_session(tmp_path: Path) -> None:
    agentic(tmp_path / "s.jsonl")
    requests = traces.read(tmp_path / "s.jsonl", sessions_per_s=0.01, seed=3)
    by_session = {
        name: [r for r in requests if r.session_id == name] for name in {r.session_id for r in requests}
    }
    ids = []
    for turns in by_session.values():
        assert [turn.prompt_tokens for turn in turns] == [130, 200]
        assert turns[1].arrival_s - turns[0].arrival_s == pytest.approx(9.0)
        assert list(turns[1].block_ids())[:2] == list(turns[0].block_ids())
        ids.append(set(turns[1].block_ids()))
    assert not ids[0] & ids[1]


def test_a_closed_session_waits_for_its_answers(tmp_path: Path) -> None:
    agentic(tmp_path / "s.jsonl")
    requests = traces.read(tmp_path / "s.jsonl", closed=True)
    second = next(r for r in requests if r.request_id == "s0.1")
    assert (second.after, second.think_s) == ("s0.0", 4.0)
    cut = traces.read(tmp_path / "s.jsonl", closed=True, limit=3)
    assert {r.after for r in cut} <= {"", *(r.request_id for r in cut)}


@pytest.mark.parametrize(
    "name, text",
    [
        ("x.csv", "a,b\n1,2\n"),
        ("x.csv", "t_s,context_tokens,generated_tokens\nsoon,1,2\n"),
        ("x.csv", "t_s,context_tokens,generated_tokens\n"),
        ("x.jsonl", '{"timestamp": 1}\n'),
        ("x.jsonl", "not json\n"),
        ("x.csv.gz", "not gzip"),
    ],
)
def test_a_malformed_trace_is_named(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InvalidConfiguration, match="x\\."):
        traces.read(tmp_path / name)


def test_shipped_traces_are_found_by_name_and_others_refused() -> None:
    assert len(traces.read(traces.find("azure-conv"), limit=10)) == 10
    with pytest.raises(InvalidConfiguration, match="azure-conv"):
        traces.find("azure-poetry")


def test_rescaling_changes_the_rate_and_keeps_the_shape() -> None:
    requests = [Request(f"r{i}", t, 100, 10) for i, t in enumerate((1.0, 2.0, 5.0))]
    faster = rescaled(requests, rate_rps=2.0, prompt_factor=0.5, answer_factor=0.01)
    gaps = [b.arrival_s - a.arrival_s for a, b in itertools.pairwise(faster)]
    assert gaps == pytest.approx([0.25, 0.75])
    assert {(r.prompt_tokens, r.answer_tokens) for r in faster} == {(50, 1)}
    with pytest.raises(InvalidConfiguration):
        rescaled(requests[:1], rate_rps=1.0)
    with pytest.raises(InvalidConfiguration):
        rescaled(requests, prompt_factor=0.0)


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        [Request("a", 0.0, 1, 1), Request("a", 1.0, 1, 1)],
        [Request("a", 0.0, 0, 1)],
        [Request("a", -1.0, 1, 1)],
        [Request("a", math.nan, 1, 1)],
        [Request("a", 0.0, 1, 1, after="b")],
    ],
)
def test_requests_that_cannot_be_played_are_refused(wrong: list[Request]) -> None:
    with pytest.raises(InvalidConfiguration):
        checked(wrong)


@pytest.mark.parametrize("cv", [1.0, 4.0])
def test_generated_arrivals_have_the_rate_and_variation_asked_for(cv: float) -> None:
    requests = workloads.generate(count=40_000, rate_rps=5.0, lengths=workloads.SHAREGPT_LIKE, seed=1, cv=cv)
    gaps = np.diff([request.arrival_s for request in requests])
    assert gaps.mean() == pytest.approx(0.2, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)
    assert all(request.arrival_s == on_tick(request.arrival_s) for request in requests[:100])


def test_lengths_do_not_depend_on_the_rate() -> None:
    slow, fast = (
        workloads.generate(count=100, rate_rps=rate, lengths=workloads.ALPACA_LIKE, seed=2)
        for rate in (1.0, 9.0)
    )
    assert [r[2:4] for r in slow] == [r[2:4] for r in fast]
    assert [r[2:4] for r in slow] != [
        r[2:4] for r in workloads.generate(count=100, rate_rps=1.0, lengths=workloads.ALPACA_LIKE, seed=3)
    ]


def test_a_ratio_of_means_and_recorded_lengths_are_drawn() -> None:
    ratio = workloads.ratio_of_means(4.0, mean_tokens=200, sigma=0.5)
    drawn = workloads.generate(count=8000, rate_rps=1.0, lengths=ratio, seed=0)
    prompt, answer = (np.mean([request[field] for request in drawn]) for field in (2, 3))
    assert (prompt, answer) == (pytest.approx(160, rel=0.05), pytest.approx(40, rel=0.05))
    recorded = [Request("a", 0.0, 5, 6), Request("b", 0.0, 7, 8)]
    drawn = workloads.generate(count=50, rate_rps=1.0, lengths=workloads.sampled_lengths(recorded), seed=0)
    assert {(r.prompt_tokens, r.answer_tokens) for r in drawn} == {(5, 6), (7, 8)}


MODEL = EngineModel(
    name="test",
    knot_tokens=(1, 16, 64),
    knot_s=(0.002, 0.003, 0.006),
    per_sequence_s=1e-4,
    per_kv_token_s=1e-7,
    per_pair_s=2e-8,
)


def test_an_iterations_time_adds_up_by_hand() -> None:
    found = composition([Part(2, 1, 99), Part(1, 14, 50)])
    assert found == (3, 16, 264, 2 * 100 + 14 * 50 + 105)
    assert MODEL.iteration_s(*found) == pytest.approx(0.003 + 3e-4 + 264e-7 + 1005 * 2e-8, abs=TICK_S)
    assert MODEL.linear_s(112) == pytest.approx(0.009)  # beyond the last knot: its slope


@given(sequences=st.integers(1, 64), context=st.integers(1, 4000), iterations=st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_a_run_of_decoding_takes_exactly_the_sum_of_its_iterations(
    sequences: int, context: int, iterations: int
) -> None:
    ends_s = MODEL.decode_ends_s(sequences, sequences * context, iterations)
    now_s = 0.0
    for index in range(iterations):
        kv_tokens = sequences * (context + index)
        now_s += MODEL.iteration_s(sequences, sequences, kv_tokens, kv_tokens)
        assert now_s == ends_s[index]


def test_the_fit_finds_the_model_that_made_the_samples() -> None:
    grid = [(Part(b, 1, c),) for b in (1, 4, 16, 32) for c in (0, 100, 1000)]
    grid += [(Part(1, n, c),) for n in (2, 4, 8, 16, 32, 64) for c in (0, 500)]
    grid += [(Part(8, 1, 200), Part(1, n, 0)) for n in (8, 24, 56)]
    samples = [Sample(parts, MODEL.iteration_s(*composition(parts))) for parts in grid]
    model = fitted(samples, name="again")
    unseen = composition([Part(6, 1, 300), Part(2, 13, 77)])
    assert model.iteration_s(*unseen) == pytest.approx(MODEL.iteration_s(*unseen), rel=0.02)
    with pytest.raises(InvalidConfiguration, match="too few"):
        fitted(samples[:3], name="again")


def test_a_measured_profile_is_read_and_anything_else_refused(tmp_path: Path) -> None:
    grid = [(Part(b, 1, c),) for b in (1, 2, 4, 8) for c in (0, 100)]
    rows = [{"parts": parts, "seconds": MODEL.iteration_s(*composition(parts))} for parts in grid]
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"variant": "v", "kv_bytes_per_token": 64, "samples": rows}))
    model = from_file(path)
    assert (model.name, model.kv_bytes_per_token) == ("v", 64)
    path.write_text("{}")
    with pytest.raises(InvalidConfiguration, match="iteration_profile"):
        from_file(path)
    with pytest.raises(InvalidConfiguration, match="cannot read"):
        from_file(tmp_path / "none.json")


@pytest.mark.parametrize("name", operators.names())
def test_a_published_profile_grows_with_its_load(name: str) -> None:
    model = operators.published(name)
    assert model.decode_s(1, 100) < model.decode_s(1, 10_000) < model.decode_s(64, 10_000)
    assert model.prefill_s(64) < model.prefill_s(2048) < model.prefill_s(2048, 8192)
    # Reading all weights once is the floor of a decode iteration: 7 GB and more at the best bandwidth.
    assert model.decode_s(1, 1) > 0.003


def test_an_unknown_profile_names_the_known_ones() -> None:
    with pytest.raises(InvalidConfiguration, match="a100-llama2-7b"):
        operators.published("b200-llama9")
