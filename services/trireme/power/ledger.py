"""The node's ledger: one account per metered device, the last hour, and the facts taken in."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trireme.policies.energy_attribution import (
    UJ_PER_J,
    Account,
    EngineUse,
    Limits,
    MeterWindow,
    Rule,
    Window,
    advance,
    opened,
)
from trireme.wire.bus.v1.facts_pb2 import Measurement

VERSION = 1
MINUTE_S = 60
HOUR_MINUTES = 60
MAX_WINDOW_S = 3600.0
MAX_JOULES = 1e9
"""More than a thousand GPUs draw in an hour: a larger bill for one window is a broken fact."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A cumulative reading of one meter."""

    energy_uj: int
    at_s: float
    epoch: str


@dataclass(frozen=True, slots=True)
class Totals:
    """The accounts' sums, as far as the last hour needs them."""

    metered_uj: int = 0
    billed_uj: int = 0
    idle_uj: int = 0
    metered_g: float = 0.0
    billed_g: float = 0.0
    idle_g: float = 0.0
    billed_engine_s: float = 0.0

    def less(self, other: Totals) -> Totals:
        return Totals(*(a - b for a, b in zip(self.values(), other.values(), strict=True)))

    def plus(self, other: Totals) -> Totals:
        return Totals(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, item.name) for item in dataclasses.fields(self))


@dataclass(slots=True, kw_only=True)
class DeviceBook:
    """One metered device: its account, the reading it stands at, and its last hour."""

    meter: str
    account: Account
    last: Reading | None = None
    """Where the next window starts; None until the meter answers."""
    minutes: dict[int, Totals] = field(default_factory=dict)
    """What each of the last 60 minutes added, by minutes since 1970."""

    @property
    def totals(self) -> Totals:
        return Totals(*(getattr(self.account, item.name) for item in dataclasses.fields(Totals)))

    def last_hour(self, now_s: float) -> Totals:
        """What the last 60 minutes added."""
        oldest = int(now_s // MINUTE_S) - HOUR_MINUTES + 1
        spans = [span for minute, span in self.minutes.items() if minute >= oldest]
        total = Totals()
        for span in spans:
            total = total.plus(span)
        return total

    def turn(
        self,
        *,
        now_s: float,
        reading: Reading | None,
        uses: Sequence[EngineUse],
        grams_co2e_per_kwh: float,
        limits: Limits,
        rule: Rule,
    ) -> None:
        """End a window: take the reading (None: it failed) and the facts that came since."""
        before = self.totals
        self.account = advance(
            self.account,
            now_s=now_s,
            meter=self._window(reading, grams_co2e_per_kwh),
            uses=uses,
            limits=limits,
            rule=rule,
        )
        minute = int(now_s // MINUTE_S)
        added = self.totals.less(before)
        self.minutes[minute] = self.minutes.get(minute, Totals()).plus(added)
        self.minutes = {m: t for m, t in self.minutes.items() if m > minute - HOUR_MINUTES}

    def _window(self, reading: Reading | None, grams_co2e_per_kwh: float) -> MeterWindow | None:
        last = self.last
        if reading is None:
            return None
        if last is None or reading.epoch != last.epoch or reading.energy_uj < last.energy_uj:
            # The counter began anew: what it missed stays unmetered, from the last window to here.
            self.last = reading
            return None
        if reading.at_s <= last.at_s:
            return None  # no time passed; the next reading covers this one
        self.last = reading
        return MeterWindow(
            start_s=last.at_s,
            end_s=reading.at_s,
            energy_uj=reading.energy_uj - last.energy_uj,
            grams_co2e_per_kwh=grams_co2e_per_kwh,
        )


@dataclass(slots=True, kw_only=True)
class Ledger:
    """All metered devices of one node."""

    books: dict[str, DeviceBook] = field(default_factory=dict)
    duplicate_facts: int = 0
    refused_facts: int = 0

    def open_book(self, device: str, meter: str, *, now_s: float) -> DeviceBook:
        """The device's book; a new one where there was none or it was kept by another kind of meter."""
        book = self.books.get(device)
        if book is None or book.meter != meter:
            book = self.books[device] = DeviceBook(meter=meter, account=opened(now_s))
        return book

    def to_json(self) -> str:
        """All of it, for `from_json`."""
        books = {
            device: {
                "meter": book.meter,
                "account": dataclasses.asdict(book.account),
                "last": None if book.last is None else dataclasses.asdict(book.last),
                "minutes": {str(minute): totals.values() for minute, totals in book.minutes.items()},
            }
            for device, book in self.books.items()
        }
        return json.dumps(
            {
                "version": VERSION,
                "books": books,
                "duplicate_facts": self.duplicate_facts,
                "refused_facts": self.refused_facts,
            }
        )


def from_json(text: str) -> Ledger:
    """What `Ledger.to_json` wrote.

    Raises:
        ValueError: it is of another version, or damaged.
    """
    try:
        state = json.loads(text)
        if state["version"] != VERSION:
            raise ValueError(f"version {state['version']}, not {VERSION}")
        return Ledger(
            books={device: _book(book) for device, book in state["books"].items()},
            duplicate_facts=state["duplicate_facts"],
            refused_facts=state["refused_facts"],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"damaged: {error!r}") from error


def _book(state: Mapping[str, Any]) -> DeviceBook:
    account = dict(state["account"])
    account["windows"] = tuple(Window(**window) for window in account["windows"])
    account["recent"] = tuple((own_uj, engine_s) for own_uj, engine_s in account["recent"])
    return DeviceBook(
        meter=state["meter"],
        account=Account(**account),
        last=None if state["last"] is None else Reading(**state["last"]),
        minutes={int(minute): Totals(*values) for minute, values in state["minutes"].items()},
    )


def engine_use(fact: Measurement) -> EngineUse | None:
    """The engine use that a measurement states; None where a number is out of range."""
    engine = fact.engine
    amounts = (engine.busy_s, engine.billed_engine_s, engine.billed_joules, fact.at_unix_s)
    sound = (
        bool(fact.id)
        and all(math.isfinite(amount) and amount >= 0 for amount in amounts)
        and 0 < fact.window_s <= MAX_WINDOW_S
        and engine.busy_s <= MAX_WINDOW_S
        and engine.billed_engine_s <= MAX_WINDOW_S
        and engine.billed_joules <= MAX_JOULES
    )
    if not sound:
        return None
    return EngineUse(
        end_s=fact.at_unix_s,
        window_s=fact.window_s,
        busy_s=engine.busy_s,
        billed_engine_s=engine.billed_engine_s,
        billed_uj=round(engine.billed_joules * UJ_PER_J),
    )
