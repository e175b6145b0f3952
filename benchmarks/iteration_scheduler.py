"""What the iteration scheduler itself costs per iteration, from 10 to 100,000 queued jobs.

    python -m benchmarks.iteration_scheduler [--iterations 1000] [--batch 64]

Jobs of many lengths are queued, some started and then preempted (their KV on the device or on the host), and
iterations are driven as an engine does, with a bounded device: each job that ends is replaced by another, so
the queue keeps its length. Copies take two iterations.

Timed, in processor time of the thread, are `decide` and `charge`, beside them `add` and `remove`. `decide`
asks for each sequence that it considers; what the answers cost here is in it, and told as "views".
In "churn" the quantum is one iteration, so that members change all the time; in "long" it is a hundred.
"""

from __future__ import annotations

import argparse
import gc
import math
import random
import statistics
import time
from collections import deque
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.fleet import write_result
from trireme.policies.iteration import Budget, Job, Location, SequenceView
from trireme.policies.iteration_profile import DecodePoint, IterationProfile, PrefillPoint
from trireme.policies.mlfq import MlfqSettings
from trireme.policies.schedulers import LIVE_POLICIES, make_scheduler

SIZES = (10, 100, 1_000, 10_000, 100_000)
BLOCK_TOKENS = 16
DECODE_S = 0.01
PROFILE = IterationProfile(
    tuple(PrefillPoint(n, 0, 0.01 + 1e-4 * n) for n in (16, 64, 256, 1024, 4096)),
    tuple(DecodePoint(batch, 256, DECODE_S) for batch in (1, 8, 64, 256)),
)


class State:
    """One sequence's tokens and blocks."""

    __slots__ = ("answer", "blocks", "computed", "location", "target")

    def __init__(self, prompt: int, answer: int) -> None:
        self.target = prompt
        self.answer = answer
        self.computed = 0
        self.blocks = 0
        self.location = Location.NONE


class Times(NamedTuple):
    """Seconds of each call."""

    decide: list[float]
    charge: list[float]
    add: list[float]
    remove: list[float]


class Pools:
    """Just enough of an engine to answer a scheduler."""

    def __init__(self, device: int, host: int) -> None:
        self.states: dict[str, State] = {}
        self.free = device
        self.draining = 0
        self.host = host
        self.host_free = host
        self.copies: deque[tuple[int, str, Location, int]] = deque()
        self.iteration = 0

    def view(self, name: str) -> SequenceView:
        state = self.states[name]
        held = state.blocks if state.location is Location.DEVICE else 0
        needed = -(-state.target // BLOCK_TOKENS)
        return SequenceView(state.target - state.computed, needed - held, held, state.location)

    def arrived(self) -> None:
        """Copies take two iterations."""
        while self.copies and self.copies[0][0] <= self.iteration:
            _, name, to, blocks = self.copies.popleft()
            state = self.states[name]
            state.location = to
            if to is Location.HOST:
                self.draining -= blocks
                self.free += blocks
            else:
                self.host_free += blocks

    def evict(self, name: str) -> None:
        state = self.states[name]
        self.free += state.blocks
        state.blocks = state.computed = 0
        state.location = Location.NONE

    def swap_out(self, name: str) -> None:
        state = self.states[name]
        state.location = Location.MOVING
        self.draining += state.blocks
        self.host_free -= state.blocks
        self.copies.append((self.iteration + 2, name, Location.HOST, state.blocks))

    def swap_in(self, name: str) -> None:
        state = self.states[name]
        held, state.blocks = state.blocks, -(-state.target // BLOCK_TOKENS)
        self.free -= state.blocks
        state.location = Location.MOVING
        self.copies.append((self.iteration + 2, name, Location.DEVICE, held))

    def run(self, name: str, count: int) -> bool:
        """Whether it ended."""
        state = self.states[name]
        state.location = Location.DEVICE
        grown = -(-state.target // BLOCK_TOKENS) - state.blocks
        self.free -= grown
        state.blocks += grown
        state.computed += count
        if state.computed < state.target:
            return False
        state.target += 1
        state.answer -= 1
        return state.answer <= 0


def drive(policy: str, queued: int, *, batch: int, iterations: int, quantum_s: float, seed: int) -> Times:
    """Time so many iterations with so many jobs in the queue."""
    rng = random.Random(seed)
    pools = Pools(device=64 * batch, host=10**9)
    settings = MlfqSettings(quantum_s=quantum_s)
    scheduler = make_scheduler(policy, PROFILE, settings=settings)
    times = Times([], [], [], [])
    now_s = 0.0
    names = iter(range(10**9))

    def arrive() -> None:
        name = f"{next(names)}"
        state = State(int(math.exp(rng.uniform(3, 7))), int(math.exp(rng.uniform(1, 6))))
        pools.states[name] = state
        job = Job(sequence_id=name, arrival_s=now_s, priority=rng.randrange(3), new_tokens=state.target)
        started = time.thread_time()
        scheduler.add(job, now_s=now_s)
        times.add.append(time.thread_time() - started)

    def iterate(seconds: float) -> None:
        pools.iteration += 1
        pools.arrived()
        started = time.thread_time()
        budget = Budget(
            token_budget=max(512, batch),
            max_sequences=batch,
            free_blocks=pools.free,
            draining_blocks=pools.draining,
            host_free_blocks=pools.host_free,
            host_blocks=pools.host,
        )
        decision = scheduler.decide(budget, pools.view, now_s=now_s)
        times.decide.append(time.thread_time() - started)
        for name, _ in decision.evicted:
            pools.evict(name)
        for name, _ in decision.swap_out:
            pools.swap_out(name)
        for name in decision.swap_in:
            pools.swap_in(name)
        ended = [name for name, count in decision.runs if pools.run(name, count)]
        started = time.thread_time()
        scheduler.charge(decision.runs, seconds, now_s=now_s + seconds)
        times.charge.append(time.thread_time() - started)
        for name in ended:
            started = time.thread_time()
            scheduler.remove(name)
            times.remove.append(time.thread_time() - started)
            state = pools.states.pop(name)
            pools.free += state.blocks
        for _ in ended:
            arrive()

    # A quarter has run before: arrivals come in between.
    for number in range(queued + batch):
        arrive()
        if number % 4 == 0 and queued <= 10_000:
            now_s += DECODE_S
            iterate(DECODE_S)
    for _ in range(4 * batch):
        now_s += DECODE_S
        iterate(DECODE_S)
    for kind in times:
        kind.clear()
    gc.collect()
    gc.disable()
    for _ in range(iterations):
        now_s += DECODE_S
        iterate(DECODE_S)
    gc.enable()
    return times


def row(times: Times) -> dict[str, float]:
    """Microseconds."""
    both = sorted(decide + charge for decide, charge in zip(times.decide, times.charge, strict=True))
    return {
        "decide_p50_us": _median_us(times.decide),
        "charge_p50_us": _median_us(times.charge),
        "both_p99_us": round(1e6 * both[int(0.99 * len(both))], 1),
        "add_p50_us": _median_us(times.add),
        "remove_p50_us": _median_us(times.remove),
    }


def _median_us(seconds: list[float]) -> float:
    return round(1e6 * statistics.median(seconds), 1) if seconds else math.nan


def views_us(batch: int) -> float:
    """What as many views as a batch has members cost here."""
    pools = Pools(1, 1)
    pools.states = {f"{number}": State(100, 100) for number in range(batch)}
    seconds = []
    for _ in range(1000):
        started = time.thread_time()
        for name in pools.states:
            pools.view(name)
        seconds.append(time.thread_time() - started)
    return _median_us(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    table = Table(title=f"microseconds per call, batch {arguments.batch}")
    for column in ("policy", "case", "queued", "decide", "charge", "both p99", "add", "remove"):
        table.add_column(column, justify="left" if column in ("policy", "case") else "right")
    rows: list[dict[str, Any]] = []
    cases = [("mlfq", "churn", DECODE_S), ("mlfq", "long", 100 * DECODE_S)]
    cases += [(policy, "", DECODE_S) for policy in LIVE_POLICIES if policy != "mlfq"]
    for policy, case, quantum_s in cases:
        for queued in SIZES:
            found = row(
                drive(
                    policy,
                    queued,
                    batch=arguments.batch,
                    iterations=arguments.iterations,
                    quantum_s=quantum_s,
                    seed=arguments.seed,
                )
            )
            rows.append({"policy": policy, "case": case, "queued": queued} | found)
            table.add_row(policy, case, f"{queued:,}", *(f"{value:.1f}" for value in found.values()))
    Console().print(table)
    figures = {"batch": arguments.batch, "views_us": views_us(arguments.batch), "rows": rows}
    print(f"views of a batch: {figures['views_us']} us", write_result("iteration_scheduler", figures))


if __name__ == "__main__":
    main()
