"""How clean the grid is now. A signal always answers, and says where its answer is from."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp

from trireme.errors import InvalidConfiguration
from trireme.policies.carbon_intensity import Series, is_plausible, parse_series, unix_s
from trireme.runtime.clock import Clock
from trireme.runtime.fleet import Carbon

log = logging.getLogger(__name__)

TIMEOUT_S = 5.0
MAX_BODY_BYTES = 2**20
FIRST_RETRY_S = 5.0
MAX_JUMP = 10.0
"""A value this many times the last one, up or down, is believed only when it comes twice."""


@dataclass(frozen=True, slots=True)
class Intensity:
    """Carbon intensity with its provenance."""

    grams_co2e_per_kwh: float
    source: str
    """static, csv, http, or `static (fallback: why)`."""
    age_s: float


class CarbonSignal(Protocol):
    """Where the service reads the grid's carbon intensity."""

    def now(self) -> Intensity: ...

    async def run(self) -> None:
        """Keep the signal fresh, for ever."""
        ...


class StaticSignal:
    """One number from the configuration."""

    def __init__(self, grams_co2e_per_kwh: float, *, source: str = "static") -> None:
        self._value = Intensity(grams_co2e_per_kwh, source, 0.0)

    def now(self) -> Intensity:
        return self._value

    async def run(self) -> None:
        await asyncio.Event().wait()


class ReplayedSignal:
    """A file's series, from `start_s` on, `speedup` times as fast as the clock, in a circle."""

    def __init__(self, series: Series, *, start_s: float, speedup: float, clock: Clock) -> None:
        self._series = series
        self._start_s = start_s
        self._speedup = speedup
        self._clock = clock
        self._begun_s = clock.monotonic_s()

    def now(self) -> Intensity:
        passed_s = (self._clock.monotonic_s() - self._begun_s) * self._speedup
        value, age_s = self._series.at(self._start_s + passed_s)
        return Intensity(value, "csv", age_s / self._speedup)

    async def run(self) -> None:
        await asyncio.Event().wait()


class PolledSignal:
    """A JSON number behind a URL, asked for in the background; the last good value is kept."""

    def __init__(
        self,
        url: str,
        field: str,
        *,
        fallback_grams: float,
        refresh_s: float,
        max_age_s: float,
        clock: Clock,
    ) -> None:
        self._url = url
        self._field = field
        self._fallback_grams = fallback_grams
        self._refresh_s = refresh_s
        self._max_age_s = max_age_s
        self._clock = clock
        self._good: tuple[float, float] | None = None
        self._doubted: float | None = None
        self._trouble = "no answer yet"

    def now(self) -> Intensity:
        if self._good is None:
            return Intensity(self._fallback_grams, f"static (fallback: http: {self._trouble})", 0.0)
        value, at_s = self._good
        age_s = self._clock.monotonic_s() - at_s
        if age_s > self._max_age_s:
            return Intensity(
                self._fallback_grams, f"static (fallback: http is {age_s:.0f} s old: {self._trouble})", 0.0
            )
        return Intensity(value, "http", age_s)

    async def run(self) -> None:
        retry_s = FIRST_RETRY_S
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while True:
                trouble = await self.refresh(session)
                if trouble is None:
                    retry_s = FIRST_RETRY_S
                    await asyncio.sleep(self._refresh_s)
                    continue
                log.warning("carbon_signal_failed", extra={"reason": trouble, "retry_s": retry_s})
                await asyncio.sleep(min(retry_s, self._refresh_s))
                retry_s = min(retry_s * 2, max(self._refresh_s, FIRST_RETRY_S))

    async def refresh(self, session: aiohttp.ClientSession) -> str | None:
        """Ask once; None where a good value came, else what went wrong."""
        trouble = await self._ask(session)
        self._trouble = trouble or ""
        return trouble

    async def _ask(self, session: aiohttp.ClientSession) -> str | None:
        try:
            # A redirect could lead anywhere; whoever configures the URL names the final one.
            async with session.get(self._url, allow_redirects=False) as response:
                if response.status != 200:
                    return f"status {response.status}"
                body = await _read_at_most(response, MAX_BODY_BYTES)
        except TimeoutError:
            return f"no answer in {TIMEOUT_S:g} s"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return type(error).__name__
        if body is None:
            return f"answer above {MAX_BODY_BYTES} bytes"
        try:
            value = number_at(json.loads(body), self._field)
        except (ValueError, LookupError, OverflowError) as error:
            return str(error)
        except RecursionError:
            return "answer nested too deeply"
        if not is_plausible(value):
            return f"{value} g CO2e per kWh is implausible"
        if self._good is not None and not self._believable(value):
            self._doubted = value
            return f"{value} after {self._good[0]} g CO2e per kWh waits for a second answer"
        self._doubted = None
        self._good = (value, self._clock.monotonic_s())
        return None

    def _believable(self, value: float) -> bool:
        assert self._good is not None
        return any(
            1 / MAX_JUMP <= value / known <= MAX_JUMP for known in (self._good[0], self._doubted) if known
        )


async def _read_at_most(response: aiohttp.ClientResponse, limit: int) -> bytes | None:
    body = bytearray()
    async for chunk in response.content.iter_chunked(65536):
        body.extend(chunk)
        if len(body) > limit:
            return None
    return bytes(body)


def number_at(document: Any, field: str) -> float:
    """The number at a dotted path such as `data.0.intensity.actual`; digits index lists.

    Raises:
        LookupError: the path leads nowhere or to something that is no number; names the part.
    """
    found = document
    for part in field.split("."):
        if isinstance(found, list) and part.isdigit() and int(part) < len(found):
            found = found[int(part)]
        elif isinstance(found, dict) and part in found:
            found = found[part]
        else:
            raise LookupError(f"the answer has no {part!r} of {field!r}")
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise LookupError(f"{field!r} is {type(found).__name__}, not a number")
    return float(found)


def open_signal(config: Carbon, clock: Clock, *, refresh_s: float, max_age_s: float) -> CarbonSignal:
    """The configured signal; one that cannot be opened gives way to the static value, loudly."""
    try:
        if config.provider == "csv":
            return _replayed(config, clock)
        if config.provider == "http":
            return _polled(config, clock, refresh_s=refresh_s, max_age_s=max_age_s)
    except InvalidConfiguration as error:
        log.error("carbon_signal_unusable", extra={"provider": config.provider, "reason": error.message})
        source = f"static (fallback: {config.provider}: {error.message})"
        return StaticSignal(config.grams_co2e_per_kwh, source=source)
    return StaticSignal(config.grams_co2e_per_kwh)


def _replayed(config: Carbon, clock: Clock) -> ReplayedSignal:
    if config.csv is None:
        raise InvalidConfiguration("power.carbon.csv is required with provider csv", param="power.carbon.csv")
    try:
        with config.csv.open(encoding="utf-8", newline="") as lines:
            series = parse_series(lines, name=config.csv.name)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfiguration(f"cannot read {config.csv.name}: {error}") from error
    now_s = clock.unix_s()
    start_s = series.same_hour(now_s) if config.start_utc is None else unix_s(config.start_utc)
    return ReplayedSignal(series, start_s=start_s, speedup=config.speedup, clock=clock)


def _polled(config: Carbon, clock: Clock, *, refresh_s: float, max_age_s: float) -> PolledSignal:
    if config.url is None or not config.url.startswith(("http://", "https://")):
        raise InvalidConfiguration(
            "power.carbon.url must be an http or https URL with provider http", param="power.carbon.url"
        )
    return PolledSignal(
        config.url,
        config.field,
        fallback_grams=config.grams_co2e_per_kwh,
        refresh_s=refresh_s,
        max_age_s=max_age_s,
        clock=clock,
    )
