"""Form the next batch from a queue in order, and move KV for it: FastServe, sections 4.2 and 4.3.

Most urgent first, over those that ran last and those that wait alike, until the batch is full:

- A decoding sequence takes one token. Prompts share what decoding leaves of the token budget, in order,
  in chunks; a prompt that is cut keeps its KV, and whoever is more urgent goes first at the next iteration.
- One on the device runs if it gets the blocks that it grows by; one on the host is copied in and runs once
  it has arrived; one without KV is admitted. Blocks are taken from those that stand behind, see `kv_swap`.
- Blocks that copies still read are set aside for their taker, which runs when they are free: nobody waits
  for a copy, unless nothing else could run at all.
- At most `MAX_SKIPS` sequences that do not fit are skipped; then only those on the device are considered.
  One that was overtaken in `max_passes` iterations lets nobody but those pass any more.
- While less than a tenth of the host's blocks is free, nobody without KV is admitted beside others; nor one
  that the host could not take in turn, unless there is room for it on the device as things are.
- A sequence whose next block another one is computing waits for it, and then shares it; but not for ever.

Then the idle reserve is topped up by moving out who is needed last, or, if nobody had to move out, those
that are needed next are brought back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from heapq import merge
from itertools import islice
from typing import NamedTuple

from trireme.policies.iteration import (
    Budget,
    IterationDecision,
    Location,
    Preemption,
    Run,
    SequenceView,
    ViewOf,
)
from trireme.policies.kv_swap import BurstReserve, Fit, Room, by_enst_descending
from trireme.policies.run_queue import Entry, Key, RunQueue, Walk

MAX_SKIPS = 8
MAX_PENDING = 32
"""Sequences looked at that wait for somebody else's block."""
HOST_GUARD = 0.1

_DEVICE, _HOST, _FRESH = 1, 2, 3
"""Streams of the walk; 0 are those that ran last."""


class SwapRules(NamedTuple):
    """What decides which KV moves."""

    burst: BurstReserve
    execute_s: Callable[[Key], float]
    """T_execute of one that waits."""
    soon_promoted: Callable[[], Sequence[tuple[float, Key]]] = tuple
    """(ENST, key) of those whose promotion comes before their turn."""
    jobs_above: Callable[[Key], int] = lambda key: 0
    """At least so many jobs, running or waiting, stand before one that waits."""
    is_proactive: bool = True
    """Keep a reserve idle and bring back ahead of need; else move only what the batch needs now."""
    link_blocks: float = float("inf")
    """Blocks that may be brought back ahead of need in one iteration; one sequence always may."""


class _Claim(NamedTuple):
    key: Key
    seen: SequenceView


class BatchFormation:
    """One decision while it is made."""

    def __init__(
        self, queue: RunQueue, budget: Budget, view: ViewOf, rules: SwapRules, spared: str | None
    ) -> None:
        self._queue = queue
        self._budget = budget
        self._view = view
        self._rules = rules
        members = queue.member_keys()
        self._walk = Walk(iter(members), iter(queue.device), iter(queue.host), iter(queue.fresh))
        self._keys = iter(self._walk)
        self._runs: dict[str, int] = {}
        self._placed: set[str] = set()
        """Those that do not run now and are promised blocks."""
        victims = self._victims(members)
        self._room = Room(budget, view, victims, (self._runs, self._placed), spared)
        self._tokens = budget.token_budget
        self._prefills: list[str] = []
        self._admitted: set[str] = set()
        self._swap_in: list[str] = []
        self._num_moving = 0
        self._claims: list[_Claim] = []
        self._claimed_tokens = 0
        """Of prompts that wait for copies: no more of them claim blocks than one iteration computes."""
        self._pause_reasons: dict[str, str] = {}
        self._found: dict[str, Location] = {}
        """Where sequences are that are not where they were believed to be."""
        self._misfits: list[Entry] = []
        self._passed: list[Entry] = []
        self._guarded: Key | None = None
        self._is_closed = False
        """Nobody is admitted or brought in any more."""
        self._num_pending = 0
        self._claimed_hashes: set[bytes] = set()
        self._admitted_blocks = 0
        self._waits_for_copies = False

    def decide(self) -> IterationDecision:
        """Form the batch, plan the moves, and take both as done in the queue."""
        self._fill()
        if not self._runs:
            self._run_anyway()
        if self._rules.is_proactive:
            self._room.top_up(self._rules.burst.blocks(len(self._runs)))
            if not self._room.gone and not self._claims:
                self._bring_back()
        self._rules.burst.observe(self._admitted_blocks)
        for entry in self._passed:
            entry.passes += 1
        return self._settled()

    def _fill(self) -> None:
        most = self._budget.max_sequences
        room, view, runs = self._room, self._view, self._runs
        entries, gone, device = self._queue.entries, self._room.gone, Location.DEVICE
        for key in self._keys:
            sequence_id = key[2]
            if sequence_id in gone:
                continue
            seen = view(sequence_id)
            num_tokens, num_blocks, _, location, _, _ = seen
            if (
                location is device
                and num_tokens == 1
                and num_blocks <= room.now
                and (self._tokens or self._give_token())
            ):
                # What nearly all do nearly always: decode, in place.
                if num_blocks:
                    room.now -= num_blocks
                self._tokens -= 1
                runs[sequence_id] = 1
            elif location is Location.MOVING:
                self._num_moving += 1
            else:
                if location is not entries[sequence_id].location:
                    self._found[sequence_id] = location
                if location is device:
                    self._continue(key, seen)
                elif location is Location.NONE:
                    self._admit(key, seen)
                else:
                    self._bring(key, seen)
            if len(runs) == most:
                return

    def _continue(self, key: Key, seen: SequenceView) -> None:
        """It is on the device."""
        if not self._tokens and not (seen.num_tokens == 1 and self._give_token()):
            self._pause_reasons[key[2]] = "those before it take all tokens"
            return
        fit = self._room.make(key, seen.num_blocks, may_evict=True) if seen.num_blocks else Fit.NOW
        if fit is Fit.NOW:
            self._run(key[2], seen)
        elif fit is Fit.SOON:
            self._claim(key, seen)
            self._pause_reasons[key[2]] = f"the {seen.num_blocks} blocks it needs are still being copied out"
        else:
            self._pause_reasons[key[2]] = f"it needs {seen.num_blocks} blocks, {self._room.now} are free"

    def _bring(self, key: Key, seen: SequenceView) -> None:
        """It is on the host."""
        if self._is_closed:
            return
        if self._num_placed() >= self._budget.max_sequences:
            self._walk.drop(_HOST)
            return
        fit = self._room.make(key, seen.num_blocks)
        if fit is Fit.NOW:
            self._swap_in.append(key[2])
            self._placed.add(key[2])
            self._overtake()
        elif fit is Fit.SOON:
            self._claim(key, seen)
        else:
            self._skip(key)

    def _admit(self, key: Key, seen: SequenceView) -> None:
        """It has no KV."""
        if self._is_closed:
            return
        if self._tokens <= self._claimed_tokens or self._num_placed() >= self._budget.max_sequences:
            self._walk.drop(_FRESH)
            return
        budget = self._budget
        if self._room.host < HOST_GUARD * budget.host_blocks:
            self._guarded = self._guarded or key
            self._walk.drop(_FRESH)
            return
        entry = self._queue.entries[key[2]]
        is_pending = seen.is_block_pending or seen.next_block in self._claimed_hashes
        if is_pending and entry.passes < budget.max_passes:
            entry.passes += 1
            self._num_pending += 1
            if self._num_pending == MAX_PENDING:
                self._walk.drop(_FRESH)
            return
        fit = Fit.NEVER
        if self._room.host >= seen.num_blocks or self._is_free(seen.num_blocks):
            fit = self._room.make(key, seen.num_blocks)
        if fit is Fit.NOW:
            self._start(key[2], seen)
        elif fit is Fit.SOON:
            self._claim(key, seen)
            self._claimed_tokens += seen.num_tokens
        else:
            self._skip(key)

    def _num_placed(self) -> int:
        """Those that run now, and those that will as soon as copies have ended."""
        return len(self._runs) + len(self._swap_in) + len(self._claims) + self._num_moving

    def _is_free(self, num_blocks: int) -> bool:
        """Nobody need leave for it, not even when those that run grow a little."""
        left = self._budget.watermark_blocks if self._runs else 0
        return num_blocks + left <= self._room.now + self._room.soon

    def _start(self, sequence_id: str, seen: SequenceView) -> None:
        self._run(sequence_id, seen)
        self._admitted.add(sequence_id)
        self._admitted_blocks += seen.num_blocks
        if seen.next_block is not None:
            self._claimed_hashes.add(seen.next_block)
        self._overtake()

    def _run(self, sequence_id: str, seen: SequenceView) -> None:
        count = min(seen.num_tokens, self._tokens)
        self._tokens -= count
        self._runs[sequence_id] = count
        if seen.num_tokens > 1:
            self._prefills.append(sequence_id)

    def _give_token(self) -> bool:
        """Decoding comes before prompts: the last prompt that takes two tokens gives one up."""
        for name in reversed(self._prefills):
            if self._runs[name] > 1:
                self._runs[name] -= 1
                self._tokens += 1
                return True
        return False

    def _claim(self, key: Key, seen: SequenceView) -> None:
        self._claims.append(_Claim(key, seen))
        self._placed.add(key[2])

    def _skip(self, key: Key) -> None:
        entry = self._queue.entries[key[2]]
        self._misfits.append(entry)
        if len(self._misfits) == MAX_SKIPS or entry.passes >= self._budget.max_passes:
            self._is_closed = True
            self._walk.drop(_HOST)
            self._walk.drop(_FRESH)

    def _overtake(self) -> None:
        self._passed = self._misfits.copy()

    def _run_anyway(self) -> None:
        """Nobody could run as things are: let one wait for copies, or pass the host guard."""
        if self._claims:
            (key, seen), *rest = self._claims
            self._claims = rest
            self._pause_reasons.pop(key[2], None)
            self._waits_for_copies = True
            if seen.location is Location.HOST:
                self._swap_in.append(key[2])
            elif seen.location is Location.NONE:
                self._start(key[2], seen)
            else:
                self._run(key[2], seen)
        elif self._guarded is not None and not self._swap_in and not self._num_moving:
            seen = self._view(self._guarded[2])
            fit = self._room.make(self._guarded, seen.num_blocks)
            if fit is not Fit.NEVER:
                self._waits_for_copies = fit is Fit.SOON
                self._start(self._guarded[2], seen)

    def _bring_back(self) -> None:
        """Of those next in the queue, copy in who is on the host, as long as the reserve stays."""
        reserve = self._rules.burst.blocks(len(self._runs))
        link_blocks = self._rules.link_blocks
        first_host = next(iter(self._queue.host), None)
        if self._room.now <= reserve or first_host is None:
            return
        entries, walk, most = self._queue.entries, self._walk, self._budget.max_sequences
        next_promoted = [key for _, key in sorted(self._rules.soon_promoted())]
        wanted = [key for key in next_promoted if entries[key[2]].location is Location.HOST]
        if self._rules.jobs_above(first_host) < 2 * most:
            following = islice(self._keys, most)
            wanted += [key for key in following if walk.stream == _HOST and key not in wanted]
        for key in wanted:
            if self._room.now <= reserve or link_blocks <= 0:
                return
            if key[2] in self._placed:
                continue
            seen = self._view(key[2])
            if seen.location is Location.HOST and seen.num_blocks + reserve <= self._room.now:
                self._room.make(key, seen.num_blocks)
                self._swap_in.append(key[2])
                self._placed.add(key[2])
                link_blocks -= seen.num_blocks

    def _steady_blocks(self) -> int:
        """Blocks left until somebody must move; negative where something is under way or may come back."""
        if self._num_moving or self._claims or self._num_pending or self._waits_for_copies:
            return -1
        if not self._rules.is_proactive:
            return self._room.now
        if len(self._queue.host):
            return -1
        reserve = self._rules.burst.blocks(len(self._runs)) if len(self._queue.device) else 0
        return self._room.now - reserve

    def _victims(self, members: list[Key]) -> Iterator[Key]:
        keys = merge(reversed(members), reversed(self._queue.device), reverse=True)
        # A generator, so that nothing is computed where nobody needs a victim.
        yield from by_enst_descending(keys, self._rules.soon_promoted(), self._rules.execute_s)

    def _settled(self) -> IterationDecision:
        """Tell the queue who stands where from now on."""
        queue, room, runs = self._queue, self._room, self._runs
        before = queue.members
        paused: list[Preemption] = []
        moved = dict.fromkeys(self._swap_in, Location.DEVICE)
        moved |= dict.fromkeys(room.swap_out, Location.HOST) | dict.fromkeys(room.evicted, Location.NONE)
        for sequence_id in moved.keys() | self._found.keys():
            if sequence_id not in before and sequence_id not in runs:
                entry = queue.entries[sequence_id]
                queue.leave(entry)
                queue.wait(entry, moved.get(sequence_id) or self._found[sequence_id])
        for sequence_id in [name for name in before if name not in runs]:
            entry = before[sequence_id]
            location = moved.get(sequence_id) or self._found.get(sequence_id, Location.DEVICE)
            queue.wait(entry, location)
            if location is Location.DEVICE and sequence_id not in moved:
                reason = self._pause_reasons.get(sequence_id) or f"{len(runs)} others stand before it"
                paused.append(Preemption(sequence_id, reason))
        for sequence_id in room.evicted:
            entry = queue.entries[sequence_id]
            entry.computed_tokens = 0
        entries = queue.entries
        for sequence_id in runs.keys() - before.keys():
            entry = entries[sequence_id]
            queue.leave(entry)
            entry.location = Location.DEVICE
            entry.passes = 0
        queue.members = members = {sequence_id: entries[sequence_id] for sequence_id in runs}
        queue.prefilling = self._admitted.union(self._prefills)
        queue.steady_blocks = -1 if moved else self._steady_blocks()
        num_tokens = self._budget.token_budget - self._tokens
        return IterationDecision(
            runs=tuple(
                [
                    entry.single if count == 1 else Run(entry.key[2], count)
                    for entry, count in zip(members.values(), runs.values(), strict=True)
                ]
            ),
            admitted=frozenset(self._admitted),
            paused=tuple(paused),
            swap_out=tuple([Preemption(*pair) for pair in room.swap_out.items()]),
            swap_in=tuple(self._swap_in),
            evicted=tuple([Preemption(*pair) for pair in room.evicted.items()]),
            passed=tuple([entry.job.sequence_id for entry in self._passed]),
            waits_for_copies=self._waits_for_copies,
            reason=(
                f"{len(runs)} run {num_tokens} tokens, {len(self._admitted)} admitted, {len(paused)} paused, "
                f"{len(room.swap_out)} out, {len(self._swap_in)} in, {len(room.evicted)} evicted, "
                f"{room.now} blocks free, {room.soon} soon"
            ),
        )
