"""DRAM and SSD of a node (or of a pool of nodes) with a disk of finite speed, moved by the live `plan`.

Holds no clock: every call says the time, which never goes back. The owner calls `advance` no later than
`next_event_s` and learns which jobs have their KV. Bytes per tier never exceed its capacity.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from trireme.policies.kv_items import Item, QueuedJob, State, TierIndex
from trireme.policies.kv_tiering import Action, Capacity, Command, plan

Part = tuple[int, int]
"""(item id, bytes); a chain is a sequence of parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierPolicy:
    """What the planner is told; the rest is the same for all."""

    sees_queue: bool = True
    """Look-ahead; without it the plan is LRU with fetching on demand."""
    by_last_use: bool = True
    """False: by the time of saving (FIFO)."""
    is_guarded: bool = True
    is_inclusive: bool = True
    """A fetched item keeps its SSD copy while there is room."""


LOOK_AHEAD = TierPolicy()
UNGUARDED = TierPolicy(is_guarded=False, is_inclusive=False)
LRU = TierPolicy(sees_queue=False)
FIFO = TierPolicy(sees_queue=False, by_last_use=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class TierSpec:
    """Sizes and speeds."""

    capacity: Capacity
    disk_read_bytes_s: float
    disk_write_bytes_s: float
    write_buffer_bytes: int = 0
    """Device memory for KV of ended jobs that DRAM has no room for yet; what does not fit is not stored."""
    ttl_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Found:
    """The leading parts of a chain that were there when its job started."""

    parts: int
    dram_bytes: int
    ssd_bytes: int
    is_ready: bool
    """Nothing has to come from SSD first."""


@dataclass(slots=True)
class TierCounters:
    """Since the start, in bytes."""

    demand_read_bytes: int = 0
    """From SSD, for a job that had started."""
    ahead_read_bytes: int = 0
    """From SSD, for a job in the queue."""
    written_bytes: int = 0
    dropped_bytes: int = 0
    """Left the store: no tier holds it any more."""
    unsaved_bytes: int = 0
    """Not stored, since neither DRAM nor the write buffer had room."""
    plans: int = 0
    commands: int = 0
    most_dram_bytes: int = 0
    most_ssd_bytes: int = 0


@dataclass(slots=True)
class _Disk:
    """One transfer at a time; those that a job waits for go first."""

    bytes_s: float
    waiting: list[tuple[int, int, int]] = field(default_factory=list)
    current: int | None = None
    ends_s: float = math.inf


class KvTiers:
    """The tiers of one node over simulated time."""

    def __init__(
        self,
        spec: TierSpec,
        policy: TierPolicy = LOOK_AHEAD,
        *,
        return_s: Callable[[int, float], float] | None = None,
    ) -> None:
        """`return_s(item, now)` predicts when an idle item is used again; None: nothing is known."""
        self.spec = spec
        self.policy = policy
        self.index: TierIndex[int] = TierIndex()
        self.counters = TierCounters()
        self._return_s = return_s
        self._reads = _Disk(spec.disk_read_bytes_s)
        self._writes = _Disk(spec.disk_write_bytes_s)
        self._sequence = 0
        self._pins: dict[int, int] = {}
        self._jobs: dict[str, tuple[int, ...]] = {}
        self._missing: dict[str, int] = {}
        self._waiters: dict[int, list[str]] = {}
        self._streamed: set[int] = set()
        self._ready: list[str] = []
        self._unwritten: deque[Item[int]] = deque()
        self._unwritten_ids: set[int] = set()
        self._unwritten_bytes = 0

    def next_event_s(self) -> float:
        """When the next copy ends; inf where none is in flight."""
        return min(self._reads.ends_s, self._writes.ends_s)

    def advance(self, now_s: float) -> list[str]:
        """End the copies that are due; returns the started jobs whose KV is complete since the last call."""
        is_changed = False
        while (at_s := self.next_event_s()) <= now_s:
            is_changed = True
            if self._reads.ends_s == at_s:
                self._end_read(at_s)
            else:
                self._end_write(at_s)
        if is_changed:
            self._replan(now_s)
        ready, self._ready = self._ready, []
        return ready

    def enqueue(self, job_id: str, chain: Sequence[Part], *, use_s: float, now_s: float) -> None:
        """A job waits, and is expected to start at `use_s`."""
        if self.policy.sees_queue:
            self.index.enqueue(
                QueuedJob(job_id=job_id, use_s=use_s, item_ids=tuple(item for item, _ in chain))
            )
            self._replan(now_s)

    def start(self, job_id: str, chain: Sequence[Part], *, now_s: float) -> Found:
        """A job starts: its leading parts stay in place until `release`; those on SSD are read first."""
        if self.policy.sees_queue:
            self.index.start(job_id)
        held: list[int] = []
        dram_bytes = ssd_bytes = 0
        late: list[int] = []
        for item_id, size_bytes in chain:
            item = self.index.get(item_id)
            if item is None:
                break
            held.append(item_id)
            if item.in_dram:
                dram_bytes += size_bytes
            else:
                ssd_bytes += size_bytes
                late.append(item_id)
            self._pin(item, now_s)
        self._jobs[job_id] = tuple(held)
        for item_id in late:
            self._waiters.setdefault(item_id, []).append(job_id)
            self._read_now(item_id, now_s)
        if late:
            self._missing[job_id] = len(late)
        self._replan(now_s)
        return Found(len(held), dram_bytes, ssd_bytes, not late)

    def release(self, job_id: str, *, now_s: float) -> None:
        """A job has its KV in device memory."""
        for item_id in self._jobs.pop(job_id):
            self._pins[item_id] -= 1
            if not self._pins[item_id]:
                del self._pins[item_id]
                item = self.index.get(item_id)
                assert item is not None
                self._put(replace(item, pinned=False))
        self._replan(now_s)

    def finish(self, job_id: str, saves: Sequence[Part], *, now_s: float) -> None:
        """A job ended; what it computed is stored, or waits in the write buffer for room in DRAM."""
        self.index.finish(job_id)
        for depth, (item_id, size_bytes) in enumerate(saves):
            held = self.index.get(item_id)
            if held is not None:
                self._put(self._used(held, now_s))
                continue
            if item_id in self._unwritten_ids:
                continue
            item = Item(item_id=item_id, size_bytes=size_bytes, in_dram=True, last_use_s=now_s, depth=depth)
            if not self._unwritten and self._fits(size_bytes):
                self._put(self._used(item, now_s))
            elif self._unwritten_bytes + size_bytes <= self.spec.write_buffer_bytes:
                self._unwritten.append(item)
                self._unwritten_ids.add(item_id)
                self._unwritten_bytes += size_bytes
            else:
                self.counters.unsaved_bytes += size_bytes
        self._replan(now_s)

    def _fits(self, size_bytes: int) -> bool:
        return self.index.dram_bytes + size_bytes <= self.spec.capacity.dram_bytes

    def _write_buffered(self, now_s: float) -> bool:
        """Move what fits from the write buffer to DRAM; whether anything did."""
        is_changed = False
        while self._unwritten and self._fits(self._unwritten[0].size_bytes):
            item = self._unwritten.popleft()
            self._unwritten_ids.discard(item.item_id)
            self._unwritten_bytes -= item.size_bytes
            self._put(self._used(item, now_s))
            is_changed = True
        return is_changed

    def _used(self, item: Item[int], now_s: float) -> Item[int]:
        return replace(
            item,
            last_use_s=now_s if self.policy.by_last_use else item.last_use_s,
            expires_at_s=now_s + self.spec.ttl_s,
            return_s=self._return_s(item.item_id, now_s) if self._return_s else math.inf,
        )

    def _put(self, item: Item[int]) -> None:
        self.index.put(item)
        self.counters.most_dram_bytes = max(self.counters.most_dram_bytes, self.index.dram_bytes)
        self.counters.most_ssd_bytes = max(self.counters.most_ssd_bytes, self.index.ssd_bytes)

    def _pin(self, item: Item[int], now_s: float) -> None:
        self._pins[item.item_id] = self._pins.get(item.item_id, 0) + 1
        self._put(replace(self._used(item, now_s), pinned=True))

    def _read_now(self, item_id: int, now_s: float) -> None:
        item = self.index.get(item_id)
        assert item is not None
        if item.state is State.FETCHING:
            # It waits in the disk's queue already: the copy that is found first there counts.
            self._submit(self._reads, item_id, 0, now_s)
            return
        if item_id in self._streamed:
            return
        self.counters.demand_read_bytes += item.size_bytes
        if self._fits(item.size_bytes):
            self._put(replace(item, state=State.FETCHING))
        else:
            self._streamed.add(item_id)  # straight to the device, since DRAM is full
        self._submit(self._reads, item_id, 0, now_s)

    def _submit(self, disk: _Disk, item_id: int, urgency: int, now_s: float) -> None:
        self._sequence += 1
        heapq.heappush(disk.waiting, (urgency, self._sequence, item_id))
        if disk.current is None:
            self._next_transfer(disk, now_s)

    def _next_transfer(self, disk: _Disk, now_s: float) -> None:
        disk.current, disk.ends_s = None, math.inf
        wanted = State.FETCHING if disk is self._reads else State.EVICTING
        while disk.waiting:
            _, _, item_id = heapq.heappop(disk.waiting)
            item = self.index.get(item_id)
            if item is not None and (
                item.state is wanted or (disk is self._reads and item_id in self._streamed)
            ):
                disk.current, disk.ends_s = item_id, now_s + item.size_bytes / disk.bytes_s
                return

    def _end_read(self, at_s: float) -> None:
        item_id = self._reads.current
        assert item_id is not None
        item = self.index.get(item_id)
        assert item is not None
        if item_id in self._streamed:
            self._streamed.discard(item_id)
        else:
            is_copy_kept = self.policy.is_inclusive
            self._put(replace(item, state=State.RESIDENT, in_dram=True, on_ssd=is_copy_kept))
        for job_id in self._waiters.pop(item_id, ()):
            self._missing[job_id] -= 1
            if not self._missing[job_id]:
                del self._missing[job_id]
                self._ready.append(job_id)
        self._next_transfer(self._reads, at_s)

    def _end_write(self, at_s: float) -> None:
        item_id = self._writes.current
        assert item_id is not None
        item = self.index.get(item_id)
        assert item is not None
        # Somebody came for it meanwhile: DRAM keeps it too, and later eviction costs nothing.
        is_kept = self.policy.is_inclusive and (item.pinned or self.index.is_queued(item_id))
        self._put(replace(item, state=State.RESIDENT, on_ssd=True, in_dram=item.pinned or is_kept))
        self._next_transfer(self._writes, at_s)

    def _replan(self, now_s: float) -> None:
        self._carry_out_plan(now_s)
        while self._write_buffered(now_s):
            self._carry_out_plan(now_s)

    def _carry_out_plan(self, now_s: float) -> None:
        free_bytes = self.spec.capacity.dram_bytes - self.index.dram_bytes - self._unwritten_bytes
        commands = plan(
            self.index,
            self.spec.capacity,
            now_s=now_s,
            dram_free_bytes=free_bytes,
            is_guarded=self.policy.is_guarded,
        )
        self.counters.plans += 1
        self.counters.commands += len(commands)
        for command in commands:
            item = self.index.get(command.item_id)
            assert item is not None
            match command.action:
                case Action.FETCH:
                    self._fetch(item, now_s)
                case Action.EVICT:
                    self._evict(item, command, now_s)
                case Action.DROP:
                    self._drop(item, command)

    def _fetch(self, item: Item[int], now_s: float) -> None:
        capacity = self.spec.capacity
        if self.index.dram_bytes + item.size_bytes <= capacity.dram_bytes - capacity.low_free_bytes:
            self.counters.ahead_read_bytes += item.size_bytes
            self._put(replace(item, state=State.FETCHING))
            self._submit(self._reads, item.item_id, 1, now_s)

    def _evict(self, item: Item[int], command: Command[int], now_s: float) -> None:
        if command.is_copy_needed:
            self.counters.written_bytes += item.size_bytes
            self._put(replace(item, state=State.EVICTING))
            self._submit(self._writes, item.item_id, 0, now_s)
        else:
            self._put(replace(item, in_dram=False))

    def _drop(self, item: Item[int], command: Command[int]) -> None:
        left = replace(
            item,
            in_dram=item.in_dram and not command.from_dram,
            on_ssd=item.on_ssd and not command.from_ssd,
        )
        if left.in_dram or left.on_ssd:
            self._put(left)
        else:
            self.counters.dropped_bytes += item.size_bytes
            self.index.forget(item.item_id)
