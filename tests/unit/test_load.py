"""Load: plans are fixed by their seed, an open loop never waits, a report's figures are what they say."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trireme.errors import InvalidConfiguration
from trireme.load.outcome import Outcome
from trireme.load.plan import Lengths, PlannedRequest, closed, from_prompts, from_trace, poisson
from trireme.load.report import Goals, percentile, summarise
from trireme.load.run import Run, run_closed_loop, run_open_loop

LENGTHS = Lengths(prompt_tokens=20, answer_tokens=8, spread=0.5)


def replay(path: Path, *, limit: int = 100, time_scale: float = 1.0, length_scale: float = 1.0):  # type: ignore[no-untyped-def]
    return from_trace(
        path, limit=limit, time_scale=time_scale, length_scale=length_scale, vocabulary=500, seed=3
    )


def test_a_plan_is_fixed_by_its_seed() -> None:
    one = poisson(count=50, rate_rps=10, lengths=LENGTHS, vocabulary=500, seed=1, tenants=3)
    again = poisson(count=50, rate_rps=10, lengths=LENGTHS, vocabulary=500, seed=1, tenants=3)
    other = poisson(count=50, rate_rps=10, lengths=LENGTHS, vocabulary=500, seed=2, tenants=3)
    assert one == again
    assert one != other
    assert {planned.tenant for planned in one} == {"tenant-0", "tenant-1", "tenant-2"}
    assert closed(count=5, lengths=LENGTHS, vocabulary=500, seed=1) == closed(
        count=5, lengths=LENGTHS, vocabulary=500, seed=1
    )


def test_poisson_arrivals_have_the_rate_and_the_spread_of_poisson_arrivals() -> None:
    planned = poisson(count=20_000, rate_rps=40, lengths=LENGTHS, vocabulary=500, seed=1)
    gaps = np.diff([request.at_s for request in planned])
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / 40, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 40, rel=0.03), "exponential: deviation and mean are equal"


@given(st.integers(1, 200), st.integers(1, 50), st.floats(0, 1), st.integers(2, 1000), st.integers(0, 2**32))
def test_synthetic_requests_keep_their_bounds(
    prompt: int, answer: int, spread: float, vocabulary: int, seed: int
) -> None:
    lengths = Lengths(prompt_tokens=prompt, answer_tokens=answer, spread=spread)
    for planned in closed(count=5, lengths=lengths, vocabulary=vocabulary, seed=seed):
        assert max(1, prompt * (1 - spread) - 1) <= len(planned.prompt) <= prompt * (1 + spread) + 1
        assert 1 <= planned.max_tokens <= answer * (1 + spread) + 1
        assert planned.at_s == 0
        assert all(0 <= token < vocabulary for token in planned.prompt)  # type: ignore[operator]


def test_a_csv_trace_is_replayed_at_its_times(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("t_s,context_tokens,generated_tokens\n0.5,100,20\n2.0,40,1\n4.0,7,3\n")
    planned = replay(path, limit=2, time_scale=2.0, length_scale=0.1)
    assert [request.at_s for request in planned] == [0.25, 1.0]
    assert [len(request.prompt) for request in planned] == [10, 4]
    assert [request.max_tokens for request in planned] == [2, 1]
    assert planned == replay(path, limit=2, time_scale=2.0, length_scale=0.1)


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=6),
    st.lists(st.integers(51, 99), min_size=1, max_size=4),
    st.lists(st.integers(100, 150), min_size=1, max_size=4),
    st.integers(1, 512),
    st.sampled_from([1.0, 0.5, 0.1, 0.03, 0.0025]),
)
def test_equal_leading_blocks_give_equal_leading_tokens_at_every_scale(
    tmp_path_factory: pytest.TempPathFactory,
    shared: list[int],
    one: list[int],
    other: list[int],
    last: int,
    scale: float,
) -> None:
    path = tmp_path_factory.mktemp("trace") / "trace.jsonl.gz"
    rows = [
        {
            "timestamp": 1000 * index,
            "input_length": 512 * (len(blocks) - 1) + last,
            "output_length": 5,
            "hash_ids": blocks,
        }
        for index, blocks in enumerate([shared + one, shared + other])
    ]
    with gzip.open(path, "wt") as lines:
        lines.write("\n".join(map(json.dumps, rows)))
    first, second = replay(path, length_scale=scale)
    for planned, row in zip((first, second), rows, strict=True):
        assert len(planned.prompt) == max(1, round(row["input_length"] * scale))  # type: ignore[operator]
    common = min(len(shared) * max(1, round(512 * scale)), len(first.prompt), len(second.prompt))
    assert first.prompt[:common] == second.prompt[:common]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("t.csv", "a,b\n1,2\n", "columns"),
        ("t.csv", "t_s,context_tokens,generated_tokens\n1,x,2\n", "line 2"),
        ("t.csv", "t_s,context_tokens,generated_tokens\n1,2\n", "line 2"),
        ("t.jsonl", '{"timestamp": 1, "input_length": 2}\n', "output_length"),
        ("t.jsonl", "{}\n{", "line 1|timestamp"),
        ("t.jsonl", "nothing\n", "not JSON"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, name: str, text: str, says: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InvalidConfiguration, match=says):
        replay(path)


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    for name in ("no.csv", "no.jsonl", "no.jsonl.gz"):
        with pytest.raises(InvalidConfiguration):
            replay(tmp_path / name)


def test_prompts_come_from_a_file_again_and_again(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n\n{"turns": ["two", "more"]}\n')
    planned = from_prompts(path, count=3, rate_rps=None, answer_tokens=4, seed=0)
    assert [request.prompt for request in planned] == ["one", "two", "one"]
    path.write_text('{"turns": []}\n')
    with pytest.raises(InvalidConfiguration):
        from_prompts(path, count=3, rate_rps=None, answer_tokens=4, seed=0)


finite = st.floats(-1e6, 1e6)


@given(st.lists(finite, min_size=1, max_size=40), st.floats(0, 1))
def test_percentiles_are_numpys(values: list[float], share: float) -> None:
    expected = float(np.percentile(values, share * 100))
    assert percentile(sorted(values), share) == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_no_value_has_the_percentile_zero() -> None:
    assert percentile([], 0.5) == 0.0


def outcome(index: int, *, ttft_s: float, gap_s: float, tokens: int = 5, error: str | None = None) -> Outcome:
    arrivals = [(10 + ttft_s + gap_s * place, 1) for place in range(tokens)]
    return Outcome(
        index=index,
        started_s=10.0,
        arrivals=arrivals,
        ended_s=arrivals[-1][0],
        error=error,
        prompt_tokens=7,
        answer_tokens=tokens,
        joules=2.0,
    )


def test_a_request_is_good_when_it_meets_every_goal_that_is_set() -> None:
    run = Run(
        outcomes=(
            outcome(0, ttft_s=0.1, gap_s=0.01),
            outcome(1, ttft_s=0.5, gap_s=0.01),
            outcome(2, ttft_s=0.1, gap_s=0.05),
            outcome(3, ttft_s=0.1, gap_s=0.01, error="cancelled"),
        ),
        duration_s=2.0,
    )
    assert summarise(run).goodput == 3 / 2
    assert summarise(run, Goals(ttft_ms=200)).goodput == 2 / 2
    assert summarise(run, Goals(tpot_ms=20)).goodput == 2 / 2
    assert summarise(run, Goals(ttft_ms=200, tpot_ms=20)).goodput == 1 / 2
    assert summarise(run, Goals(e2e_ms=1)).goodput == 0
    report = summarise(run)
    assert (report.requests, report.failed, report.errors) == (4, 1, {"cancelled": 1})
    assert report.request_throughput == 3 / 2
    assert report.output_throughput == 15 / 2
    assert report.total_token_throughput == 36 / 2
    assert report.joules_per_token == 6 / 15
    assert report.tpot_ms.max == pytest.approx(50)
    assert report.itl_ms.p50 == pytest.approx(10)
    json.dumps(report.as_json())


def test_time_per_token_needs_two_tokens() -> None:
    assert outcome(0, ttft_s=0.1, gap_s=0.01, tokens=1).tpot_s is None
    assert Outcome(index=0, started_s=1.0).ttft_s is None


class Server:
    """Counts who is in flight; answers when told."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.open = 0
        self.most = 0
        self.answer = asyncio.Event()

    async def __call__(self, planned: PlannedRequest) -> Outcome:
        self.sent.append(planned.index)
        self.open += 1
        self.most = max(self.most, self.open)
        await self.answer.wait()
        await asyncio.sleep(0.001 * (planned.index % 3))
        self.open -= 1
        now_s = time.monotonic()
        return Outcome(index=planned.index, started_s=now_s, ended_s=now_s)


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    server = Server()
    plan = poisson(count=20, rate_rps=1000, lengths=LENGTHS, vocabulary=50, seed=1)
    running = asyncio.create_task(run_open_loop(plan, server))
    async with asyncio.timeout(60):
        while len(server.sent) < 20:
            await asyncio.sleep(0.01)
    assert server.open == 20, "all were sent though none was answered"
    server.answer.set()
    run = await running
    assert [done.index for done in run.outcomes] == list(range(20))


async def test_a_closed_loop_keeps_so_many_in_flight_and_no_more() -> None:
    server = Server()
    plan = closed(count=30, lengths=LENGTHS, vocabulary=50, seed=1)
    ended: list[int] = []
    running = asyncio.create_task(
        run_closed_loop(plan, server, concurrency=4, on_end=lambda done: ended.append(done.index))
    )
    async with asyncio.timeout(60):
        while server.open < 4:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    assert (server.open, len(server.sent)) == (4, 4), "it waits for answers"
    server.answer.set()
    run = await running
    assert server.most == 4
    assert [done.index for done in run.outcomes] == list(range(30))
    assert sorted(ended) == list(range(30))
