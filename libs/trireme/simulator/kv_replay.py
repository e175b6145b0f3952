"""Replays turns against a pool of servers with one queue, with or without a KV store behind it.

A job takes a prefill unit for as long as its KV is being read, loaded and the rest computed, then decodes in
one of the slots. So a better hit rate shortens the queue, and a stall lengthens it, as in life.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from trireme.policies.kv_load import finish_s, layers_to_preload
from trireme.simulator.kv_tiers import KvTiers, Part
from trireme.simulator.kv_turns import Turn, TurnTrace


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A pool of equal servers that share one store. The times are those of a modelled device."""

    servers: int
    slots: int
    """Jobs per server that prefill or decode at once."""
    num_layers: int
    kv_bytes_per_token: int
    prefill_s_per_token: float
    attention_s_per_pair: float
    """Per new token and token before it."""
    decode_s: float
    link_bytes_s: float
    """DRAM to device, per server."""
    buffer_layers: int = 0
    """Layers that the read buffer takes while a job waits."""

    def prefill_s(self, new_tokens: int, cached_tokens: int) -> float:
        """Seconds to prefill `new_tokens` after `cached_tokens`, alone."""
        pairs = new_tokens * (cached_tokens + new_tokens / 2)
        return self.prefill_s_per_token * new_tokens + self.attention_s_per_pair * pairs


LLAMA_13B_A100 = Machine(
    servers=1,
    slots=24,
    num_layers=40,
    kv_bytes_per_token=819_200,
    prefill_s_per_token=26e9 / (0.5 * 312e12),
    attention_s_per_pair=4 * 5120 * 40 / (0.5 * 312e12),
    decode_s=0.025,
    link_bytes_s=26e9,
    buffer_layers=15,
)
"""Like LLaMA-13B in FP16: 2 x 13e9 operations per token at half of an A100's peak, its KV over PCIe 4."""


@dataclass(slots=True)
class Served:
    """What became of one turn."""

    arrival_s: float
    start_s: float = 0.0
    first_token_s: float = 0.0
    reusable_tokens: int = 0
    """Leading tokens that a store without limits would hold."""
    dram_tokens: int = 0
    ssd_tokens: int = 0
    depth: int = 0
    """Jobs in the queue when it arrived."""

    @property
    def hit_tokens(self) -> int:
        return self.dram_tokens + self.ssd_tokens


@dataclass(slots=True)
class Replayed:
    """One replay's turns, in the trace's order, and what the tiers did."""

    turns: list[Served]
    tiers: KvTiers | None
    prefill_tokens: int = 0
    busy_s: float = 0.0
    """Prefill units taken, stalls included."""
    stalled_s: float = 0.0
    """Part of `busy_s` in which nothing computes."""
    end_s: float = 0.0
    over_time: list[tuple[float, int, int, int]] = field(default_factory=list)
    """(time, jobs in the queue, DRAM bytes, SSD bytes), sampled."""


class Foresight:
    """When items are used again, from the trace itself: what Belady's rule needs.

    Exact for turns that come at a recorded time, and for the next turn of a session once the answer before
    it is there; a session's later turns are taken to come when they were recorded.
    """

    def __init__(self, trace: TurnTrace) -> None:
        self._users = trace.users
        self._next = [0] * len(trace.users)
        self.arrival_s = [turn.request.arrival_s for turn in trace.turns]
        self.has_arrived = [False] * len(trace.turns)

    def return_s(self, item: int, now_s: float) -> float:
        """The expected arrival of the next turn with the item; inf where there is none."""
        users, place = self._users[item], self._next[item]
        while place < len(users) and self.has_arrived[users[place]]:
            place += 1
        self._next[item] = place
        return max(now_s, self.arrival_s[users[place]]) if place < len(users) else math.inf


@dataclass(slots=True)
class _Running:
    place: int
    hit_tokens: int
    taken_s: float


class Replay:
    """One run. `run` may be called once."""

    def __init__(
        self,
        trace: TurnTrace,
        machine: Machine,
        tiers: KvTiers | None,
        *,
        foresight: Foresight | None = None,
        sample_s: float = 5.0,
    ) -> None:
        """`foresight` is kept up to date here; whoever gave `tiers` its `return_s` decides if it counts."""
        self._trace = trace
        self._machine = machine
        self._tiers = tiers
        self._foresight = foresight
        self._sample_s = sample_s
        self._events: list[tuple[float, int, str, int]] = []
        self._sequence = 0
        self._queue: deque[int] = deque()
        self._free_units = machine.servers
        self._free_slots = machine.servers * machine.slots
        self._running: dict[str, _Running] = {}
        self._seen: set[int] = set()
        self._tier_event_s = math.inf
        self._followers: dict[str, list[int]] = {}
        self.result = Replayed([Served(turn.request.arrival_s) for turn in trace.turns], tiers)

    def run(self) -> Replayed:
        """Play all turns to the end of the last."""
        for place, turn in enumerate(self._trace.turns):
            if turn.request.after:
                self._followers.setdefault(turn.request.after, []).append(place)
            else:
                self._at(turn.request.arrival_s, "arrive", place)
        next_sample_s = 0.0
        while self._events:
            now_s, _, kind, place = heapq.heappop(self._events)
            if now_s >= next_sample_s:
                self._sample(now_s)
                next_sample_s = now_s + self._sample_s
            if self._tiers is not None:
                for job_id in self._tiers.advance(now_s):
                    self._prefill(job_id, now_s)
            if kind == "arrive":
                self._arrive(place, now_s)
            elif kind == "first token":
                self._first_token(place, now_s)
            elif kind == "done":
                self._done(place, now_s)
            self._dispatch(now_s)
            self._wake_for_tiers()
            self.result.end_s = now_s
        return self.result

    def _at(self, time_s: float, kind: str, place: int) -> None:
        self._sequence += 1
        heapq.heappush(self._events, (time_s, self._sequence, kind, place))

    def _wake_for_tiers(self) -> None:
        if self._tiers is None:
            return
        next_s = self._tiers.next_event_s()
        if next_s != self._tier_event_s:
            self._tier_event_s = next_s
            if next_s < math.inf:
                self._at(next_s, "copy", -1)

    def _sample(self, now_s: float) -> None:
        index = self._tiers.index if self._tiers else None
        self.result.over_time.append(
            (now_s, len(self._queue), index.dram_bytes if index else 0, index.ssd_bytes if index else 0)
        )

    def _parts(self, items: Sequence[int]) -> list[Part]:
        size = self._machine.kv_bytes_per_token
        return [(item, self._trace.item_tokens[item] * size) for item in items]

    def _arrive(self, place: int, now_s: float) -> None:
        served = self.result.turns[place]
        served.arrival_s, served.depth = now_s, len(self._queue)
        self._queue.append(place)
        if self._foresight is not None:
            self._foresight.has_arrived[place] = True
        turn = self._trace.turns[place]
        if self._tiers is not None and (served.depth or not self._has_room()):
            self._tiers.enqueue(turn.request.request_id, self._parts(turn.chain), use_s=now_s, now_s=now_s)

    def _has_room(self) -> bool:
        return self._free_units > 0 and self._free_slots > 0

    def _dispatch(self, now_s: float) -> None:
        while self._queue and self._has_room():
            place = self._queue.popleft()
            self._free_units -= 1
            self._free_slots -= 1
            turn, served = self._trace.turns[place], self.result.turns[place]
            served.start_s = now_s
            served.reusable_tokens = self._reusable_tokens(turn)
            job_id = turn.request.request_id
            self._running[job_id] = _Running(place, 0, now_s)
            if self._tiers is None:
                self._prefill(job_id, now_s)
                continue
            parts = self._parts(turn.chain)
            found = self._tiers.start(job_id, parts, now_s=now_s)
            size = self._machine.kv_bytes_per_token
            served.dram_tokens, served.ssd_tokens = found.dram_bytes // size, found.ssd_bytes // size
            self._running[job_id].hit_tokens = served.hit_tokens
            if found.is_ready:
                self._prefill(job_id, now_s)

    def _reusable_tokens(self, turn: Turn) -> int:
        tokens = 0
        for item in turn.chain:
            if item not in self._seen:
                break
            tokens += self._trace.item_tokens[item]
        return tokens

    def _prefill(self, job_id: str, now_s: float) -> None:
        machine, running = self._machine, self._running[job_id]
        request, served = self._trace.turns[running.place].request, self.result.turns[running.place]
        # The last prompt token is always computed, for its logits.
        cached = min(running.hit_tokens, request.prompt_tokens - 1)
        layers, new = machine.num_layers, request.prompt_tokens - cached
        compute_s = machine.prefill_s(new, cached) / layers
        load_s = cached * machine.kv_bytes_per_token / layers / machine.link_bytes_s
        wished = min(machine.buffer_layers, layers_to_preload(load_s, compute_s, layers))
        waited_s = now_s - served.arrival_s
        preloaded = min(wished, int(waited_s / load_s)) if load_s > 0 else 0
        taken_s = finish_s(load_s, compute_s, layers, preloaded=preloaded)
        self.result.prefill_tokens += new
        self.result.stalled_s += now_s - running.taken_s + taken_s - layers * compute_s
        self._at(now_s + taken_s, "first token", running.place)

    def _first_token(self, place: int, now_s: float) -> None:
        turn, served = self._trace.turns[place], self.result.turns[place]
        served.first_token_s = now_s
        self.result.busy_s += now_s - served.start_s
        self._free_units += 1
        if self._tiers is not None:
            self._tiers.release(turn.request.request_id, now_s=now_s)
        self._at(now_s + (turn.request.answer_tokens - 1) * self._machine.decode_s, "done", place)

    def _done(self, place: int, now_s: float) -> None:
        turn = self._trace.turns[place]
        self._free_slots += 1
        self._seen.update(turn.saves)
        job_id = turn.request.request_id
        del self._running[job_id]
        for follower in self._followers.pop(job_id, ()):
            arrival_s = now_s + self._trace.turns[follower].request.think_s
            self._at(arrival_s, "arrive", follower)
            if self._foresight is not None:
                self._foresight.arrival_s[follower] = arrival_s
        if self._tiers is not None:
            self._tiers.finish(job_id, self._parts(turn.saves), now_s=now_s)
