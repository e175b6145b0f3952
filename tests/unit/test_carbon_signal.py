"""A carbon signal always answers, says where from, and believes no nonsense."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from trireme.errors import InvalidConfiguration
from trireme.policies.carbon_intensity import is_plausible, parse_series, unix_s
from trireme.power.carbon_signal import CarbonSignal, PolledSignal, number_at, open_signal
from trireme.runtime.fleet import Carbon

TRACE = Path(__file__).parents[2] / "benchmarks/data/carbon/us_cal_ciso_2023_09_hourly.csv"
MONDAY_S = unix_s("2023-09-04T00:00:00Z")


class HandClock:
    """Time moved by hand."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s

    def unix_s(self) -> float:
        return self.now_s

    def monotonic_s(self) -> float:
        return self.now_s


def opened(config: Carbon, clock: HandClock | None = None) -> CarbonSignal:
    return open_signal(config, clock or HandClock(), refresh_s=300.0, max_age_s=7200.0)


# --- the series


def test_a_value_holds_until_the_next_and_the_series_goes_round() -> None:
    lines = ["datetime_utc,ci_lca", "2023-01-01T00:00:00Z,100", "2023-01-01T01:00:00Z,200"]
    series = parse_series(lines, name="two.csv")
    start_s = series.times_s[0]
    assert series.at(start_s) == (100.0, 0.0)
    assert series.at(start_s + 3599) == (100.0, 3599.0)
    assert series.at(start_s + 3600) == (200.0, 0.0)
    assert series.at(start_s + 7200 + 60) == (100.0, 60.0)
    assert series.at(start_s - 60) == (200.0, 3540.0)


def test_the_shipped_trace_is_four_whole_weeks() -> None:
    series = parse_series(TRACE.read_text().splitlines(), name=TRACE.name)
    assert len(series.times_s) == 4 * 7 * 24
    assert series.span_s == 4 * 7 * 86400
    now_s = unix_s("2026-11-20T22:30:00Z")  # a Friday
    assert series.same_hour(now_s) == unix_s("2023-09-08T22:30:00Z")


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["hour,ci_lca", "0,1"], "no column 'datetime_utc'"),
        (["datetime_utc,ci_lca"], "no rows"),
        (["datetime_utc,ci_lca", "yesterday,1"], ":2: 'yesterday'"),
        (["datetime_utc,ci_lca", "2023-01-01T00:00:00Z,many"], ":2:"),
        (["datetime_utc,ci_lca", "2023-01-01T00:00:00Z,-5"], "between 0 and 2000"),
        (["datetime_utc,ci_lca", "2023-01-01T00:00:00Z,nan"], "between 0 and 2000"),
        (["datetime_utc,ci_lca", "2023-01-01T01:00Z,5", "2023-01-01T00:00Z,5"], ":3: times must rise"),
    ],
)
def test_a_malformed_trace_is_refused_with_its_line(lines: list[str], says: str) -> None:
    with pytest.raises(InvalidConfiguration, match=says):
        parse_series(lines, name="x.csv")


def test_implausible_values() -> None:
    values = (0.0, -1.0, math.nan, math.inf, 2000.1, 1.0, 2000.0)
    assert [is_plausible(value) for value in values] == [False] * 5 + [True] * 2


# --- replay and the static value


def test_a_static_signal_says_so() -> None:
    now = opened(Carbon(grams_co2e_per_kwh=50.0)).now()
    assert (now.grams_co2e_per_kwh, now.source, now.age_s) == (50.0, "static", 0.0)


def test_a_replay_starts_where_told_and_runs_at_its_speed() -> None:
    clock = HandClock()
    config = Carbon(provider="csv", csv=TRACE, start_utc="2023-09-04T05:00:00Z", speedup=3600.0)
    signal = opened(config, clock)
    rows = [line.split(",") for line in TRACE.read_text().splitlines()[1:]]
    assert signal.now().grams_co2e_per_kwh == float(rows[5][2])
    clock.now_s += 3.5
    now = signal.now()
    assert (now.grams_co2e_per_kwh, now.source) == (float(rows[8][2]), "csv")
    assert now.age_s == pytest.approx(0.5)


@pytest.mark.parametrize(
    "config",
    [
        Carbon(provider="csv", csv=Path("/nowhere.csv"), grams_co2e_per_kwh=50.0),
        Carbon(provider="csv", grams_co2e_per_kwh=50.0),
        Carbon(provider="csv", csv=TRACE, start_utc="soon", grams_co2e_per_kwh=50.0),
        Carbon(provider="http", grams_co2e_per_kwh=50.0),
        Carbon(provider="http", url="file:///etc/passwd", grams_co2e_per_kwh=50.0),
    ],
)
def test_a_signal_that_cannot_be_opened_gives_way_to_the_static_value(config: Carbon) -> None:
    now = opened(config).now()
    assert now.grams_co2e_per_kwh == 50.0
    assert now.source.startswith(f"static (fallback: {config.provider}: ")


# --- HTTP, against a real server


@asynccontextmanager
async def server(answer: Callable[[], web.Response]) -> AsyncIterator[str]:
    async def handle(_: web.Request) -> web.Response:
        return answer()

    app = web.Application()
    app.router.add_get("/", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    try:
        yield f"http://{host}:{port}/"
    finally:
        await runner.cleanup()


def polled(url: str, clock: HandClock, field: str = "carbonIntensity") -> PolledSignal:
    return PolledSignal(url, field, fallback_grams=436.0, refresh_s=300.0, max_age_s=7200.0, clock=clock)


async def test_a_good_answer_is_used_with_its_age_and_given_up_when_it_is_old() -> None:
    clock = HandClock()
    async with server(lambda: web.json_response([{"rating": 65}])) as url, aiohttp.ClientSession() as session:
        signal = polled(url, clock, "0.rating")
        assert signal.now().source == "static (fallback: http: no answer yet)"
        assert await signal.refresh(session) is None
        clock.now_s += 100
        now = signal.now()
        assert (now.grams_co2e_per_kwh, now.source, now.age_s) == (65.0, "http", 100.0)
    async with aiohttp.ClientSession() as session:
        assert await signal.refresh(session) is not None, "the server is gone"
        assert signal.now().source == "http", "the last good value is kept"
        clock.now_s += 7200
        now = signal.now()
        assert now.grams_co2e_per_kwh == 436.0
        assert now.source.startswith("static (fallback: http is 7300 s old")


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda: web.Response(status=503), "status 503"),
        (lambda: web.Response(status=302, headers={"Location": "http://127.0.0.1:1/"}), "status 302"),
        (lambda: web.Response(text="<html>"), "Expecting value"),
        (lambda: web.Response(body=b"\xff\xfe\x00"), ""),
        (lambda: web.json_response({"other": 1}), "no 'carbonIntensity'"),
        (lambda: web.json_response({"carbonIntensity": "12"}), "not a number"),
        (lambda: web.json_response({"carbonIntensity": True}), "not a number"),
        (lambda: web.json_response({"carbonIntensity": -3}), "implausible"),
        (lambda: web.json_response({"carbonIntensity": 436_000}), "implausible"),
        (lambda: web.Response(text='{"carbonIntensity": NaN}'), "implausible"),
        (lambda: web.Response(body=b" " * (2**20 + 1)), "above 1048576 bytes"),
        (lambda: web.Response(text="[" * 100_000), "nested too deeply"),
        (lambda: web.Response(text='{"carbonIntensity": 1' + "0" * 400 + "}"), "too large"),
    ],
)
async def test_a_bad_answer_changes_nothing(answer: Callable[[], web.Response], says: str) -> None:
    async with server(answer) as url, aiohttp.ClientSession() as session:
        signal = polled(url, HandClock())
        trouble = await signal.refresh(session)
        assert trouble is not None
        assert says in trouble
        assert signal.now().grams_co2e_per_kwh == 436.0
        assert trouble in signal.now().source


async def test_a_tenfold_jump_is_believed_only_when_it_comes_twice() -> None:
    answers = iter([400, 30, 410, 30, 31])
    async with (
        server(lambda: web.json_response({"carbonIntensity": next(answers)})) as url,
        aiohttp.ClientSession() as session,
    ):
        signal = polled(url, HandClock())
        seen = []
        for _ in range(5):
            await signal.refresh(session)
            seen.append(signal.now().grams_co2e_per_kwh)
        assert seen == [400, 400, 410, 410, 31]


async def test_a_source_that_never_answers_does_not_hold_anyone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(_: web.Request) -> web.Response:
        await asyncio.Event().wait()
        return web.Response()

    app = web.Application()
    app.router.add_get("/", hang)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    timeout = aiohttp.ClientTimeout(total=0.2)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        signal = polled(f"http://127.0.0.1:{runner.addresses[0][1]}/", HandClock())
        assert "no answer" in (await signal.refresh(session) or "")
    await runner.cleanup()


def test_numbers_are_found_by_path() -> None:
    document = json.loads('{"data": [{"intensity": {"forecast": 190, "actual": 188.5}}]}')
    assert number_at(document, "data.0.intensity.actual") == 188.5
    with pytest.raises(LookupError):
        number_at(document, "data.1.intensity.actual")
