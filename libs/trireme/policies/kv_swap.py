"""When a preempted sequence will run again, and whose KV leaves the device to make room.

The order of all moves is the estimated next scheduled time (ENST) of FastServe, section 4.3:

    T_execute(i) = 1/B * sum over jobs j of higher levels of (q_pj + ... + q_(pi - 1))
    ENST(i)      = min(T_promote(i), T_execute(i)), at least 0

T_execute rises with the level and needs only the number of jobs per level, so the queue's own order is the
order of ENST; those few that starvation promotion will reach first are sorted in among them.

The largest ENST leaves first, the smallest comes back first. A victim goes to the host; only where the host
has no room for it, and a running sequence cannot go on otherwise, its KV is dropped and computed again.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence

from trireme.policies.iteration import Budget, Location, ViewOf
from trireme.policies.run_queue import Key

_MOST_UNSUITED = 32
"""Sequences seen in one search that turn out to be no victims: bounds its time."""
_MOST_LOOKS = 1024
"""Sequences looked at in one search, victims or not."""


class LevelLoad:
    """How many jobs each level holds, and what they were charged there: all that T_execute depends on.

    Args:
        quanta_s: of levels 1, 2, ..., finite.
    """

    def __init__(self, quanta_s: Sequence[float]) -> None:
        self.counts = [0] * (len(quanta_s) + 1)
        """By level; level 0 does not exist."""
        self._used_s = [0.0] * (len(quanta_s) + 1)
        self._quanta_s: tuple[float, ...] = ()
        self._sums: list[tuple[int, float, float]] | None = None
        self.use_quanta(quanta_s)

    def use_quanta(self, quanta_s: Sequence[float]) -> None:
        """Change the quanta, not their number."""
        self._quanta_s = (0.0, *quanta_s)
        self._sums = None

    def enter(self, level: int, used_s: float = 0.0) -> None:
        """One job more."""
        self.counts[level] += 1
        self._used_s[level] += used_s
        self._sums = None

    def leave(self, level: int, used_s: float) -> None:
        """One job less; `used_s` is what it was charged in this level."""
        self.counts[level] -= 1
        self._used_s[level] -= used_s
        self._sums = None

    def charge(self, level: int, seconds: float) -> None:
        """One job was charged."""
        self._used_s[level] += seconds
        self._sums = None

    def jobs_above(self, level: int) -> int:
        """Jobs of higher levels."""
        return self._level_sums()[level][0]

    def execute_s(self, level: int, batch: int) -> float:
        """T_execute of this level: all higher jobs burn their quanta down to it, `batch` at a time."""
        return self._level_sums()[level][1] / batch

    def execute_s_v2(self, level: int, batch: int, ahead: int) -> float:
        """The same less what higher jobs have burnt already, plus the quanta of `ahead` jobs of its level."""
        _, quanta_s, used_s = self._level_sums()[level]
        return max(0.0, quanta_s - used_s + ahead * self._quanta_s[level]) / batch

    def _level_sums(self) -> list[tuple[int, float, float]]:
        """By level: jobs above it, the quanta that they burn down to it, what they burnt of them."""
        if self._sums is None:
            jobs, quanta_s, used_s = 0, 0.0, 0.0
            self._sums = [(0, 0.0, 0.0)]
            for count, quantum_s, charged_s in zip(
                self.counts[1:], self._quanta_s[1:], self._used_s[1:], strict=True
            ):
                self._sums.append((jobs, quanta_s, used_s))
                jobs += count
                quanta_s += jobs * quantum_s
                used_s += charged_s
        return self._sums


class BurstReserve:
    """Device blocks to keep idle, so that a burst of new prompts does not wait for copies.

    Args:
        window: iterations that are remembered.
        refresh: iterations after which the percentile is taken anew.
    """

    def __init__(self, window: int = 128, refresh: int = 16) -> None:
        self._window = window
        self._admitted: deque[int] = deque(maxlen=window)
        self._refresh = refresh
        self._num_new = 0
        self._p95 = 0

    def pass_by(self, iterations: int) -> None:
        """As many iterations without a new prompt."""
        for _ in range(min(iterations, 2 * self._window)):
            self.observe(0)

    def observe(self, admitted_blocks: int) -> None:
        """Blocks that new prompts took in an iteration."""
        self._admitted.append(admitted_blocks)
        self._num_new += 1
        if self._num_new >= self._refresh:
            self._num_new = 0
            self._p95 = sorted(self._admitted)[(95 * len(self._admitted) - 1) // 100]

    def blocks(self, batch: int) -> int:
        """One block for each member to grow into, and the 95th percentile of what an iteration admits."""
        return batch + self._p95


class Fit(enum.Enum):
    """Whether a sequence gets the blocks it needs."""

    NOW = "now"
    SOON = "soon"
    """They are set aside for it, but copies still read some of them."""
    NEVER = "never"
    """Not by moving those that stand behind it."""


class Room:
    """The device's blocks while one decision is made: who gets them, and who must go for it.

    Args:
        view: of the engine.
        victims: those that may go, first the one that is needed last.
        placed: those that run or arrive in this decision, never victims. The caller adds to them.
        spared: was evicted last; somebody else is evicted instead, if there is anybody else.
    """

    def __init__(
        self,
        budget: Budget,
        view: ViewOf,
        victims: Iterator[Key],
        placed: tuple[Container[str], Container[str]],
        spared: str | None = None,
    ) -> None:
        self.now = budget.free_blocks
        """Blocks left that can be written at once."""
        self.soon = budget.draining_blocks
        """Blocks left that are being copied out, or will be."""
        self.host = budget.host_free_blocks
        self.swap_out: dict[str, str] = {}
        """Reasons by sequence."""
        self.evicted: dict[str, str] = {}
        self.gone: set[str] = set()
        """All victims."""
        self._view = view
        self._victims = victims
        self._unused: list[tuple[Key, int]] = []
        """Possible victims that were looked at and not needed: (key, blocks)."""
        self._runs, self._placed = placed
        self._spared = spared

    def make(self, key: Key, blocks: int, *, may_evict: bool = False) -> Fit:
        """Give a sequence its blocks, at the cost of those that stand behind it; else change nothing."""
        if blocks > self.now:
            missing = blocks - self.now - self.soon
            if missing > 0 and not self._reclaim(key, missing, blocks, may_evict=may_evict):
                return Fit.NEVER
        if blocks <= self.now:
            self.now -= blocks
            return Fit.NOW
        self.soon -= blocks - self.now
        self.now = 0
        return Fit.SOON

    def top_up(self, reserve: int) -> None:
        """Move waiting sequences out until `reserve` blocks are idle or on their way to it."""
        if self.now + self.soon >= reserve or not self.host:
            return
        reason = f"{self.now + self.soon} blocks are idle, {reserve} are kept for new prompts"
        for key, blocks in self._candidates():
            if blocks <= self.host:
                self._swap_out(key[2], blocks, reason)
                if self.now + self.soon >= reserve:
                    return

    def _reclaim(self, key: Key, missing: int, needed: int, *, may_evict: bool) -> bool:
        if not (self.host or may_evict):
            return False
        host = self.host
        looked_at: list[tuple[Key, int]] = []
        chosen: list[tuple[Key, int, bool]] = []
        spared: tuple[Key, int, bool] | None = None
        for victim, blocks in self._candidates():
            looked_at.append((victim, blocks))
            swaps = blocks <= host
            if victim > key and victim[2] == self._spared and not swaps and may_evict:
                spared = (victim, blocks, False)
            elif victim > key and (swaps or may_evict):
                chosen.append((victim, blocks, swaps))
                host -= blocks if swaps else 0
                missing -= blocks
                if missing <= 0:
                    break
            elif len(looked_at) - len(chosen) == _MOST_UNSUITED:
                break
        if missing > 0 and spared is not None:
            chosen.append(spared)
            missing -= spared[1]
        if missing > 0:
            self._unused[:0] = looked_at
            return False
        gone = {victim for victim, _, _ in chosen}
        self._unused[:0] = [pair for pair in looked_at if pair[0] not in gone]
        reason = f"{key[2]} needs {needed} blocks, {self.now} are free, and this one is needed last"
        for victim, blocks, swaps in chosen:
            if swaps:
                self._swap_out(victim[2], blocks, reason)
            else:
                self.evicted[victim[2]] = f"{reason}; the host has room for {host}"
                self.gone.add(victim[2])
                self.now += blocks
        return True

    def _swap_out(self, sequence_id: str, blocks: int, reason: str) -> None:
        self.swap_out[sequence_id] = reason
        self.gone.add(sequence_id)
        self.host -= blocks
        self.soon += blocks

    def _candidates(self) -> Iterator[tuple[Key, int]]:
        """Possible victims with their blocks; taken from the lists as they come."""
        while self._unused:
            key, blocks = self._unused.pop(0)
            if key[2] not in self._runs and key[2] not in self._placed:
                yield key, blocks
        for _ in range(_MOST_LOOKS):
            found = next(self._victims, None)
            if found is None:
                return
            if found[2] not in self._runs and found[2] not in self._placed:
                seen = self._view(found[2])
                if seen.location is Location.DEVICE and seen.held_blocks > 0:
                    yield found, seen.held_blocks


def by_enst_descending(
    keys: Iterator[Key], soon_promoted: Sequence[tuple[float, Key]], execute_s: Callable[[Key], float]
) -> Iterator[Key]:
    """Largest ENST first.

    Args:
        keys: in descending order of the queue.
        soon_promoted: (ENST, key) of those whose promotion comes before their turn.
        execute_s: of the others.
    """
    later = sorted(soon_promoted)
    named = {key for _, key in later}
    for key in keys:
        if key in named:
            continue
        while later and later[-1][0] > execute_s(key):
            yield later.pop()[1]
        yield key
    while later:
        yield later.pop()[1]
