"""What the tiers hold, as the planner sees it: items, the jobs that wait for them, and an index of both.

An item is the unit of moving: a session's whole KV, or a run of consecutive blocks of one hash chain (the
blocks that one turn saved, say). Runs keep the index small: blocks of one run are used together.

Every item has one next-use key, nearest first: the expected start of the first job that waits for it, else
its predicted return, else never; among items never expected, the one used last is the nearest. The end of a
chain is farther than its beginning, without which it is worthless.

Pure bookkeeping; the time is passed in. Source: CachedAttention (ATC 2024), its item table; page 02 of the
design, 2.1 and 2.6. The one key is ours (page 01, section 4).
"""

from __future__ import annotations

import enum
import math
from bisect import bisect_left, insort
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from trireme.policies.sorted_keys import SortedKeys

K = TypeVar("K", bound=Hashable)

UseKey = tuple[float, float, int, int]
"""(expected use, job number or minus last use, depth in the chain, item number); nearest first."""
JobKey = tuple[float, float]
"""(expected start, job number)."""


class State(enum.Enum):
    """What happens to an item now. Only a RESIDENT one may be read, moved or dropped."""

    RESIDENT = "resident"
    SAVING = "saving"
    """HBM -> DRAM: room in DRAM is taken."""
    FETCHING = "fetching"
    """SSD -> DRAM: room in DRAM is taken."""
    EVICTING = "evicting"
    """DRAM -> SSD: room on SSD is taken, room in DRAM not yet given back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item(Generic[K]):
    """One unit of KV: where its valid copies are, and what is known of its use."""

    item_id: K
    size_bytes: int
    in_dram: bool = False
    """A readable copy is in DRAM."""
    on_ssd: bool = False
    """A readable copy is on SSD; both may be true (inclusive SSD)."""
    state: State = State.RESIDENT
    last_use_s: float = 0.0
    expires_at_s: float = math.inf
    """From then on it is dropped unless a job waits for it or runs with it."""
    return_s: float = math.inf
    """When an idle item is expected to be used again, where something predicts it."""
    depth: int = 0
    """Position in its chain; among equals the end of a chain goes first."""
    pinned: bool = False
    """Leased to a reader: neither moved nor dropped."""
    tenant: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedJob(Generic[K]):
    """A waiting job: when it is expected to start, and its chain from the beginning."""

    job_id: str
    use_s: float
    item_ids: tuple[K, ...]


class Record(Generic[K]):
    """An item in the index, with the key it stands under."""

    __slots__ = ("is_queued", "is_running", "item", "key", "number")

    def __init__(self, item: Item[K], number: int) -> None:
        self.item = item
        self.number = number
        self.key: UseKey = (math.inf, 0.0, 0, number)
        self.is_queued = False
        self.is_running = False


class TierIndex(Generic[K]):
    """Items of both tiers and the jobs in the queue, by next use; O(log n) for each item that changes.

    The owner tells every change: `put` when an item appears, moves or changes state, `enqueue` and `start`
    when jobs do. Nothing here is scanned, so a change costs the same with 10^2 and 10^6 items.
    """

    def __init__(self) -> None:
        self._records: dict[K, Record[K]] = {}
        self._by_number: dict[int, Record[K]] = {}
        self._next_number = 0
        self._jobs: dict[str, tuple[JobKey, tuple[K, ...]]] = {}
        self._running: dict[str, tuple[K, ...]] = {}
        self._next_job = 0
        self._uses: dict[K, list[UseKey]] = {}
        self._runs: dict[K, int] = {}
        self.jobs: SortedKeys[JobKey] = SortedKeys()
        """Waiting jobs, the next one first."""
        self.dram_victims: SortedKeys[UseKey] = SortedKeys()
        """What may leave DRAM, nearest use first."""
        self.ssd_victims: SortedKeys[UseKey] = SortedKeys()
        """What is on SSD only and may leave it, nearest use first."""
        self.duplicates: SortedKeys[UseKey] = SortedKeys()
        """What DRAM holds and SSD too, nearest use first."""
        self.wanted: SortedKeys[UseKey] = SortedKeys()
        """What a job waits for and only SSD holds, nearest use first."""
        self.expiring: SortedKeys[tuple[float, int]] = SortedKeys()
        """(expiry, item number) of what no job waits for or runs with."""
        self.dram_bytes = 0
        self.ssd_bytes = 0
        self.draining_bytes = 0
        """Part of `dram_bytes` that evictions in flight will give back."""
        self.queued_bytes = 0
        """Held for waiting jobs, in any tier; each item once."""

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, item_id: K) -> bool:
        return item_id in self._records

    def __iter__(self) -> Iterator[Item[K]]:
        return (record.item for record in self._records.values())

    def get(self, item_id: K) -> Item[K] | None:
        """The item, as last told; None where there is none."""
        record = self._records.get(item_id)
        return record.item if record else None

    def record(self, number: int) -> Record[K]:
        """The item with a number that stands in one of the indexes."""
        return self._by_number[number]

    def next_use_s(self, item_id: K) -> float:
        """When the item is expected to be used: inf where nothing says so."""
        return self._records[item_id].key[0]

    def is_queued(self, item_id: K) -> bool:
        """Whether a job waits for the item."""
        return bool(self._uses.get(item_id))

    def is_running(self, item_id: K) -> bool:
        """Whether a job runs with the item."""
        return item_id in self._runs

    def job_key(self, job_id: str) -> JobKey:
        """Where a waiting job stands."""
        return self._jobs[job_id][0]

    def put(self, item: Item[K]) -> None:
        """An item is new, or differs from what was told before."""
        record = self._records.get(item.item_id)
        if record is None:
            record = Record(item, self._next_number)
            self._next_number += 1
            self._records[item.item_id] = record
            self._by_number[record.number] = record
        else:
            self._unlist(record)
            record.item = item
        self._list(record)

    def forget(self, item_id: K) -> None:
        """An item is in no tier any more. Jobs may go on naming it."""
        record = self._records.pop(item_id)
        self._unlist(record)
        del self._by_number[record.number]

    def enqueue(self, job: QueuedJob[K]) -> None:
        """A job waits; one of that id that waited or ran before is replaced. Items may appear later."""
        self.dequeue(job.job_id)
        self.finish(job.job_id)
        key = (job.use_s, self._next_job)
        self._next_job += 1
        self._jobs[job.job_id] = (key, job.item_ids)
        self.jobs.add(key)
        for depth, item_id in enumerate(job.item_ids):
            uses = self._uses.setdefault(item_id, [])
            insort(uses, (*key, depth, 0))
            if uses[0][1] == key[1]:
                self._relist(item_id)

    def dequeue(self, job_id: str) -> bool:
        """A job no longer waits; False where it did not."""
        key, item_ids = self._jobs.pop(job_id, (None, ()))
        if key is None:
            return False
        self.jobs.discard(key)
        for depth, item_id in enumerate(item_ids):
            uses = self._uses[item_id]
            position = bisect_left(uses, (*key, depth, 0))
            del uses[position]
            if not uses:
                del self._uses[item_id]
            if position == 0:
                self._relist(item_id)
        return True

    def start(self, job_id: str) -> None:
        """A waiting job runs: it frees its place in the queue, and its items do not expire."""
        _, item_ids = self._jobs.get(job_id, (None, ()))
        self.dequeue(job_id)
        self.finish(job_id)
        self._running[job_id] = item_ids
        for item_id in item_ids:
            self._runs[item_id] = self._runs.get(item_id, 0) + 1
            self._relist(item_id)

    def finish(self, job_id: str) -> None:
        """A running job ended; nothing where it did not run."""
        for item_id in self._running.pop(job_id, ()):
            self._runs[item_id] -= 1
            if not self._runs[item_id]:
                del self._runs[item_id]
            self._relist(item_id)

    def follow(self, queue: Sequence[QueuedJob[K]], *, now_s: float) -> None:
        """Take over the scheduler's queue, soonest first: what is not in it no longer waits.

        Costs O(len(queue)) comparisons, and O(log n) only for jobs that are new or have moved: a job that
        keeps its place between its neighbours keeps its key, although its estimated start drifts.
        """
        named = {job.job_id for job in queue}
        for job_id in [job_id for job_id in self._jobs if job_id not in named]:
            self.dequeue(job_id)
        before: JobKey = (-math.inf, -math.inf)
        for job in queue:
            key, item_ids = self._jobs.get(job.job_id, (None, ()))
            if (
                key is None
                or key <= before
                or item_ids != job.item_ids
                or abs(key[0] - job.use_s) > 1.0 + 0.5 * abs(job.use_s - now_s)
            ):
                self.enqueue(replace(job, use_s=max(job.use_s, before[0])))
                key = self._jobs[job.job_id][0]
            before = key

    def first_jobs_key(self, count: int) -> JobKey:
        """Key of the last of the first `count` jobs: items with a key not above it are in that window."""
        if count <= 0:
            return (-math.inf, -math.inf)
        return self.jobs[count - 1] if count <= len(self.jobs) else (math.inf, -math.inf)

    def mean_job_bytes(self) -> int:
        """Mean KV held per waiting job; at least 1."""
        return max(1, self.queued_bytes // max(1, len(self.jobs)))

    def _relist(self, item_id: K) -> None:
        record = self._records.get(item_id)
        if record is not None:
            self._unlist(record)
            self._list(record)

    def _list(self, record: Record[K]) -> None:
        item = record.item
        uses = self._uses.get(item.item_id)
        record.is_queued = bool(uses)
        record.is_running = item.item_id in self._runs
        if uses:
            record.key = (uses[0][0], uses[0][1], uses[0][2], record.number)
        else:
            record.key = (item.return_s, -item.last_use_s, item.depth, record.number)
        self._account(record, 1)
        for keys in self._lists_of(record):
            keys.add(record.key)
        if self._may_expire(record):
            self.expiring.add((item.expires_at_s, record.number))

    def _unlist(self, record: Record[K]) -> None:
        self._account(record, -1)
        for keys in self._lists_of(record):
            keys.discard(record.key)
        if self._may_expire(record):
            self.expiring.discard((record.item.expires_at_s, record.number))

    def _account(self, record: Record[K], sign: int) -> None:
        item, size_bytes = record.item, sign * record.item.size_bytes
        if item.in_dram or item.state in (State.SAVING, State.FETCHING):
            self.dram_bytes += size_bytes
        if item.on_ssd or item.state is State.EVICTING:
            self.ssd_bytes += size_bytes
        if item.state is State.EVICTING:
            self.draining_bytes += size_bytes
        if record.is_queued:
            self.queued_bytes += size_bytes

    def _lists_of(self, record: Record[K]) -> Iterable[SortedKeys[UseKey]]:
        item = record.item
        if item.state is not State.RESIDENT or item.pinned:
            return
        if item.in_dram:
            yield self.dram_victims
            if item.on_ssd:
                yield self.duplicates
        elif item.on_ssd:
            yield self.ssd_victims
            if record.is_queued:
                yield self.wanted

    def _may_expire(self, record: Record[K]) -> bool:
        item = record.item
        return (
            item.expires_at_s < math.inf
            and item.state is State.RESIDENT
            and not (item.pinned or record.is_queued or record.is_running)
        )
