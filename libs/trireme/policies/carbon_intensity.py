"""The grid's carbon intensity as a series over time, and which values can be true.

Pure: the caller reads files, clocks and the network.
"""

from __future__ import annotations

import bisect
import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from trireme.errors import InvalidConfiguration

MAX_GRAMS_CO2E_PER_KWH = 2000.0
"""No grid is dirtier: a larger number is a wrong unit or a broken source."""
HOUR_S = 3600.0
DAY_S = 86400.0


def is_plausible(grams_co2e_per_kwh: float) -> bool:
    """Whether a source's value can be an average intensity in g CO2e per kWh: 0 < value <= 2000."""
    return math.isfinite(grams_co2e_per_kwh) and 0.0 < grams_co2e_per_kwh <= MAX_GRAMS_CO2E_PER_KWH


def unix_s(text: str) -> float:
    """Seconds since 1970 of an ISO 8601 time; without an offset it is UTC.

    Raises:
        InvalidConfiguration: the text is not such a time.
    """
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise InvalidConfiguration(f"{text!r} is not an ISO 8601 time such as 2023-09-01T00:00:00Z") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


@dataclass(frozen=True, slots=True)
class Series:
    """Values that hold from their time until the next one's, replayed in a circle."""

    times_s: tuple[float, ...]
    """Seconds since 1970, strictly rising."""
    grams_co2e_per_kwh: tuple[float, ...]

    @property
    def span_s(self) -> float:
        """Length of the circle: to the end of the last value, which holds as long as the one before."""
        step_s = self.times_s[-1] - self.times_s[-2] if len(self.times_s) > 1 else HOUR_S
        return self.times_s[-1] - self.times_s[0] + step_s

    def at(self, time_s: float) -> tuple[float, float]:
        """(g CO2e per kWh, seconds since that value began) at a time, wrapped into the series."""
        wrapped_s = self.times_s[0] + (time_s - self.times_s[0]) % self.span_s
        index = max(0, bisect.bisect_right(self.times_s, wrapped_s) - 1)
        return self.grams_co2e_per_kwh[index], wrapped_s - self.times_s[index]

    def same_hour(self, now_s: float) -> float:
        """The first time in the series at the hour of day of `now_s`, and on its weekday if there is one."""
        week_s = 7 * DAY_S
        period_s = week_s if self.span_s >= week_s else DAY_S
        return self.times_s[0] + (now_s - self.times_s[0]) % period_s


def parse_series(lines: Iterable[str], *, name: str) -> Series:
    """Read CSV with the columns `datetime_utc` (ISO 8601, rising) and `ci_lca` (g CO2e per kWh).

    Raises:
        InvalidConfiguration: a column is absent, a value malformed or implausible, or a time
            does not rise; names the file and line.
    """
    reader = csv.DictReader(lines)
    missing = sorted({"datetime_utc", "ci_lca"} - set(reader.fieldnames or ()))
    if missing:
        raise InvalidConfiguration(f"{name}: no column {missing[0]!r}", param=name)
    times_s: list[float] = []
    values: list[float] = []
    for number, row in enumerate(reader, start=2):
        try:
            time_s, value = unix_s(row["datetime_utc"] or ""), float(row["ci_lca"] or "")
        except (InvalidConfiguration, ValueError) as error:
            raise InvalidConfiguration(f"{name}:{number}: {error}", param=name) from None
        if not is_plausible(value):
            raise InvalidConfiguration(
                f"{name}:{number}: {value} is not between 0 and {MAX_GRAMS_CO2E_PER_KWH:.0f} g CO2e per kWh",
                param=name,
            )
        if times_s and time_s <= times_s[-1]:
            raise InvalidConfiguration(f"{name}:{number}: times must rise", param=name)
        times_s.append(time_s)
        values.append(value)
    if not times_s:
        raise InvalidConfiguration(f"{name}: no rows", param=name)
    return Series(tuple(times_s), tuple(values))
