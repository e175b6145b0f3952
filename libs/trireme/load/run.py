"""Runs a plan: open loop at its own times, or closed loop with so many in flight."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trireme.load.drivers import Driver
from trireme.load.outcome import Outcome
from trireme.load.plan import PlannedRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The outcomes of a plan, in its order, and how long it took."""

    outcomes: tuple[Outcome, ...]
    duration_s: float


def _ignore(outcome: Outcome) -> None:
    return None


async def run_open_loop(
    plan: Sequence[PlannedRequest], driver: Driver, *, on_end: Callable[[Outcome], None] = _ignore
) -> Run:
    """Send each request at its time, whatever became of the others."""
    started_s = time.monotonic()

    async def send(planned: PlannedRequest) -> Outcome:
        await asyncio.sleep(max(0.0, started_s + planned.at_s - time.monotonic()))
        outcome = await driver(planned)
        on_end(outcome)
        return outcome

    outcomes = await asyncio.gather(*(send(planned) for planned in plan))
    return Run(outcomes=tuple(outcomes), duration_s=time.monotonic() - started_s)


async def run_closed_loop(
    plan: Sequence[PlannedRequest],
    driver: Driver,
    *,
    concurrency: int,
    on_end: Callable[[Outcome], None] = _ignore,
) -> Run:
    """Keep `concurrency` requests in flight until the plan is done."""
    started_s = time.monotonic()
    outcomes: dict[int, Outcome] = {}
    waiting = iter(plan)

    async def work() -> None:
        for planned in waiting:
            outcomes[planned.index] = outcome = await driver(planned)
            on_end(outcome)

    await asyncio.gather(*(work() for _ in range(min(concurrency, len(plan)))))
    ordered = tuple(outcomes[planned.index] for planned in plan)
    return Run(outcomes=ordered, duration_s=time.monotonic() - started_s)
