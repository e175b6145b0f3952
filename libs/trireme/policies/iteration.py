"""Which sequences the engine's next iteration runs, and which KV moves: the words that all policies speak.

Pure: no clock, no I/O. The engine and the simulator drive one `IterationScheduler` alike:

    add(job)                             on arrival
    decide(budget, view)                 before an iteration: who runs, which blocks are copied
    charge(ran, seconds)                 after it: its wall time, to every member
    remove(sequence_id)                  when a sequence ends, fails or is cancelled

Preemption happens between iterations only. `schedulers.make_scheduler` builds the policies; how each
orders is told in `arrival_order` (fcfs, priority), `mlfq` and `known_order` (srpt, fixed).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from trireme.policies.iteration_profile import IterationProfile


class Location(enum.Enum):
    """Where a sequence's KV is."""

    NONE = "none"
    """Nowhere: it was not started, or its KV was lost. Running it computes all of `num_tokens`."""
    DEVICE = "device"
    """It can run."""
    HOST = "host"
    """It can run after a copy to the device."""
    MOVING = "moving"
    """A copy, in either direction, is in flight: it can neither run nor be moved now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is known of a sequence when it arrives; told once."""

    sequence_id: str
    arrival_s: float
    """Of the client's request, on the clock of `now_s`; earlier than now if it waited elsewhere."""
    priority: int = 0
    """Larger is more urgent; only the priority policy looks at it."""
    urgency: int = 0
    """Levels that it joins above (below, if negative) the one its length tells; only mlfq looks at it."""
    new_tokens: int
    """Prompt tokens to compute: the uncached suffix. At least 1."""
    cached_tokens: int = 0
    """Prompt tokens found in some cache: the context that the suffix attends to."""
    load_stall_s: float = 0.0
    """Expected wait for cached KV that layer-wise loading does not hide."""


class SequenceView(NamedTuple):
    """A sequence as it is now; asked for candidates only. A tuple: these are made every iteration."""

    num_tokens: int
    """Tokens to compute until it can be sampled; 1 while decoding."""
    num_blocks: int
    """Device blocks that running it takes beyond those it holds. On HOST: all that it needs there."""
    held_blocks: int
    """Device blocks that become available when it gives them up."""
    location: Location
    next_block: bytes | None = None
    """Hash of the first shareable block it would compute; None if it would fill none."""
    is_block_pending: bool = False
    """Another sequence that is on the device is computing `next_block`."""


ViewOf = Callable[[str], SequenceView]
"""Asks for one sequence; it must know every job that was added and not removed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The means of one iteration."""

    token_budget: int
    """Tokens it may compute; at least `max_sequences`."""
    max_sequences: int
    """Sequences that may run in it."""
    free_blocks: int
    """Device blocks that can be written now."""
    draining_blocks: int = 0
    """Device blocks that a copy still reads; they become free when it has ended."""
    host_free_blocks: int = 0
    """Host blocks for preempted KV: free, or held by KV that may be dropped for it."""
    host_blocks: int = 0
    """All host blocks for preempted KV; 0: there is no host tier, and victims are recomputed."""
    watermark_blocks: int = 0
    """Blocks that admission leaves free, so that decoding does not preempt at once."""
    max_passes: int = 64
    """Iterations in which later sequences may overtake a waiting one that does not fit."""
    link_blocks_per_s: float = math.inf
    """Blocks that can be copied to the device per second."""


class Run(NamedTuple):
    """A sequence that runs in this iteration."""

    sequence_id: str
    num_tokens: int


class Preemption(NamedTuple):
    """A sequence that stops, and why, in one line."""

    sequence_id: str
    reason: str


class LevelChange(NamedTuple):
    """A demotion (to a larger number) or a promotion (to a smaller one), and why, in one line."""

    sequence_id: str
    old_level: int
    new_level: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationDecision:
    """What to do, and why. Nobody is named twice among `runs`, `paused`, `swap_out`, `swap_in`, `evicted`."""

    runs: tuple[Run, ...]
    """Most urgent first. Their blocks come to at most the free ones and those of `evicted`, except for
    `waits_for_copies`."""
    admitted: frozenset[str] = frozenset()
    """Those of `runs` that had no KV."""
    paused: tuple[Preemption, ...] = ()
    """Ran in the last iteration, keep their device blocks, do not run now."""
    swap_out: tuple[Preemption, ...] = ()
    """Copy their blocks from device to host; they wait there."""
    swap_in: tuple[str, ...] = ()
    """Copy their blocks from host to device, in this order; they can run once they have arrived."""
    evicted: tuple[Preemption, ...] = ()
    """Give up their KV without a copy, because the host is full: what they had is computed again."""
    passed: tuple[str, ...] = ()
    """Waiting sequences that do not fit and were overtaken."""
    promoted: tuple[LevelChange, ...] = ()
    waits_for_copies: bool = False
    """Nothing else could run: the first of `runs` or `swap_in` uses blocks that are still draining, so its
    allocation must wait for the copies that read them."""
    reason: str = ""
    """One line for the trace."""


class Steady(NamedTuple):
    """While those that ran decode, and nobody arrives, ends or moves, every next decision equals the last, as
    long as it is asked for before these are spent."""

    seconds: float
    """Charged since the decision."""
    iterations: float
    """Since the decision."""
    blocks: int
    """Taken from the free ones by those that run. Negative: the next decision may differ in any case."""


class IterationScheduler(Protocol):
    """A policy with its queue. Not thread-safe; every method's time is that of one clock."""

    @property
    def profile_missing(self) -> int:
        """Jobs that were placed without a usable profile."""

    def add(self, job: Job, *, now_s: float) -> str:
        """Let a job wait; its reason says where it stands. The id must be new."""

    def remove(self, sequence_id: str) -> None:
        """Forget a job, waiting or running; nothing happens if it is not here."""

    def decide(self, budget: Budget, view: ViewOf, *, now_s: float) -> IterationDecision:
        """What the next iteration runs and which KV moves; the scheduler takes it as done."""

    def charge(
        self, ran: Sequence[Run], seconds: float, *, now_s: float, iterations: int = 1
    ) -> tuple[LevelChange, ...]:
        """Bill wall time to every sequence that ran: of one iteration, or of equal ones played as one."""

    def steady(self) -> Steady:
        """How long the last decision stays the answer; for simulators, which then skip the asking."""

    def next_use_s(self, sequence_id: str, *, now_s: float) -> float:
        """Seconds until it is expected to run; 0 if it runs now, infinity if it is not here."""

    def order(self) -> Iterator[str]:
        """Everybody who waits, next first, lazily. Do not call the scheduler while walking it."""

    def use_profile(self, profile: IterationProfile | None) -> None:
        """From now on iterations take as long as this says: learnt anew, or the clock has changed."""
