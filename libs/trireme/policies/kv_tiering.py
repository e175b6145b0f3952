"""What moves between DRAM and SSD, and what goes: fetching and evicting by looking ahead in the queue.

For the owner of the tiers (the kvstore service, or the simulator's tier model):

    index = TierIndex()                       # once; tell it every change (kv_items.py)
    index.put(Item(item_id=run, size_bytes=..., in_dram=True, last_use_s=now_s, expires_at_s=now_s + ttl_s))
    index.enqueue(QueuedJob(job_id=..., use_s=expected_start_s, item_ids=chain))    # or follow(whole queue)
    for command in plan(index, Capacity(dram_bytes=..., ssd_bytes=...), now_s=now_s): ...

and carries the commands out in order, telling the index as states change:
    EVICT   copies to SSD: put(EVICTING), at its end put(on_ssd, not in_dram). `is_copy_needed` is false where
            the SSD copy is valid: then only DRAM is given back, at once.
    FETCH   put(FETCHING), at its end put(in_dram, on_ssd). It counts on the room of EVICTs before it; a FETCH
            that does not fit yet may be left out: the next plan names it again.
    DROP    deletes the copies it names; `forget` where none is left.
Call it on every change of the queue, when a copy ends, when DRAM runs low, and now and then for expiry. It
costs O(k log n) for k commands, whatever the number of items; with nothing to do, some microseconds.

Two guards keep fetching and evicting from chasing each other: nothing is evicted or dropped for something
with a farther use, and a valid SSD copy is kept (inclusive SSD) until the SSD runs full.

Pure: no I/O, no clock. Source: CachedAttention (ATC 2024), scheduler-aware fetching and eviction; page 02 of
the design, 2.5 and 2.6; the guards, the watermarks and the one next-use key are ours.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic

from trireme.policies.kv_items import K, TierIndex, UseKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Sizes of the tiers, and how much of DRAM is kept free for what comes in."""

    dram_bytes: int
    ssd_bytes: int
    """0 where there is no SSD tier: then victims are dropped."""
    is_ssd_writable: bool = True
    """False while the SSD is full of other things, slow or failing: then victims are dropped."""
    low_free: float = 0.10
    """Below this share of free DRAM, evicting starts."""
    high_free: float = 0.15
    """Evicting goes on up to this share; fetching stops at it, so that it does not set off evicting."""

    @property
    def window_bytes(self) -> int:
        """Most that the fetch window may hold in DRAM."""
        return self.dram_bytes - self.high_free_bytes

    @property
    def low_free_bytes(self) -> int:
        return math.ceil(self.dram_bytes * self.low_free)

    @property
    def urgent_free_bytes(self) -> int:
        """Half of `low_free_bytes`. Below it, only giving up valid copies is fast enough."""
        return self.low_free_bytes // 2

    @property
    def high_free_bytes(self) -> int:
        return math.ceil(self.dram_bytes * self.high_free)


class Action(enum.Enum):
    """What to do with an item."""

    FETCH = "fetch"
    EVICT = "evict"
    DROP = "drop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Command(Generic[K]):
    """One step of a plan."""

    action: Action
    item_id: K
    size_bytes: int
    is_copy_needed: bool = False
    """EVICT: whether the bytes must be written to SSD."""
    from_dram: bool = False
    """DROP: whether the DRAM copy goes."""
    from_ssd: bool = False
    """DROP: whether the SSD copy goes."""
    reason: str


def plan(
    index: TierIndex[K],
    capacity: Capacity,
    *,
    now_s: float,
    dram_free_bytes: int | None = None,
    is_guarded: bool = True,
) -> tuple[Command[K], ...]:
    """Commands that bring the tiers where the queue wants them, in the order to carry them out.

    Args:
        index: items and queue as they are; not changed.
        capacity: sizes and watermarks.
        now_s: same clock as the index' times.
        dram_free_bytes: what the allocator has free, where that is not the capacity less the items' bytes.
        is_guarded: False lets a fetch put out what is needed before it: only to show what the guard is for.

    Dropped is first what expired. Then DRAM is brought above its watermark, farthest use first; then what
    the jobs in the fetch window wait for comes in, nearest first, for which only farther items give way.
    Planning again after all commands were carried out gives none.
    """
    return _Planning(index, capacity, now_s, dram_free_bytes, is_guarded).commands()


class _Planning(Generic[K]):
    """One plan in the making: what would be free after the commands so far."""

    def __init__(
        self,
        index: TierIndex[K],
        capacity: Capacity,
        now_s: float,
        dram_free_bytes: int | None,
        is_guarded: bool,
    ) -> None:
        self._index = index
        self._capacity = capacity
        self._now_s = now_s
        free_bytes = capacity.dram_bytes - index.dram_bytes if dram_free_bytes is None else dram_free_bytes
        self._dram_free = free_bytes + index.draining_bytes
        self._ssd_free = capacity.ssd_bytes - index.ssd_bytes
        self._is_guarded = is_guarded
        self._can_copy = capacity.ssd_bytes > 0 and capacity.is_ssd_writable
        mean_bytes = index.mean_job_bytes()
        self._fetch_window = index.first_jobs_key(max(1, capacity.window_bytes // mean_bytes))
        self._keep_window = index.first_jobs_key((capacity.window_bytes + capacity.ssd_bytes) // mean_bytes)
        self._commands: list[Command[K]] = []
        self._taken: set[int] = set()
        """Numbers of items that a command moves or drops."""
        self._single: set[int] = set()
        """Numbers of items whose SSD copy is dropped while DRAM keeps one."""
        self._dram_victims = _Walk(reversed(index.dram_victims))
        self._ssd_victims = _Walk(reversed(index.ssd_victims))
        self._duplicates = _Walk(iter(index.duplicates))
        self._nearest_evicted: UseKey = (math.inf, math.inf, 0, 0)
        """Of those that a later plan may fetch again."""

    def commands(self) -> tuple[Command[K], ...]:
        self._drop_expired()
        if self._dram_free < self._capacity.low_free_bytes:
            self._refill()
        if self._dram_free - self._index.draining_bytes < self._capacity.urgent_free_bytes:
            self._refill_at_once()
        self._fetch()
        return tuple(self._commands)

    def _drop_expired(self) -> None:
        for expires_at_s, number in self._index.expiring:
            if expires_at_s > self._now_s:
                break
            self._drop(number, "not used for its time to live")

    def _refill(self) -> None:
        reason = f"less than {self._capacity.low_free:.0%} of DRAM is free"
        while self._dram_free < self._capacity.high_free_bytes:
            key = self._next_victim()
            if key is None:
                break
            self._evict(key, reason)

    def _refill_at_once(self) -> None:
        """Where the disk is slower than what comes in, give up what it holds a valid copy of."""
        missing_bytes = self._capacity.urgent_free_bytes + self._index.draining_bytes - self._dram_free
        for key in reversed(self._index.duplicates):
            if missing_bytes <= 0:
                break
            if key[3] not in self._taken and key[3] not in self._single:
                missing_bytes -= self._index.record(key[3]).item.size_bytes
                self._evict(key, "what leaves DRAM is not on SSD in time")

    def _fetch(self) -> None:
        high_bytes, window_bytes = self._capacity.high_free_bytes, self._capacity.window_bytes
        for key in self._index.wanted:
            if key[:2] > self._fetch_window or (self._is_guarded and key > self._nearest_evicted):
                break
            item = self._index.record(key[3]).item
            if key[3] in self._taken or item.size_bytes > window_bytes:
                continue
            if not self._make_dram_room(item.size_bytes + high_bytes, key):
                break
            self._taken.add(key[3])
            self._dram_free -= item.size_bytes
            self._commands.append(
                Command(
                    action=Action.FETCH,
                    item_id=item.item_id,
                    size_bytes=item.size_bytes,
                    reason=f"a job that waits for it starts in {key[0] - self._now_s:.1f} s",
                )
            )

    def _next_victim(self) -> UseKey | None:
        """What leaves DRAM next: the farthest use."""
        for key in self._dram_victims:
            if key[3] not in self._taken:
                return key
        return None

    def _make_dram_room(self, free_bytes: int, wanted: UseKey) -> bool:
        """Evict what has a farther use until so much is free; nothing where that is out of reach."""
        victims: list[UseKey] = []
        freed_bytes = self._dram_free
        while freed_bytes < free_bytes:
            key = self._next_victim()
            if key is None or (self._is_guarded and key <= wanted):
                self._dram_victims.put_back([*victims, key] if key else victims)
                return False
            victims.append(key)
            freed_bytes += self._index.record(key[3]).item.size_bytes
        for key in victims:
            self._evict(key, f"makes room for one that is needed in {wanted[0] - self._now_s:.1f} s")
        return self._dram_free - self._index.draining_bytes >= free_bytes

    def _evict(self, key: UseKey, reason: str) -> None:
        """Move an item out of DRAM; drop it where nothing on SSD is worth less."""
        item = self._index.record(key[3]).item
        reason = f"{reason}; {self._expectation(key)}"
        is_copy_needed = not item.on_ssd or key[3] in self._single
        if is_copy_needed and not self._make_ssd_room(item.size_bytes, key):
            if key[:2] > self._keep_window:
                self._drop(key[3], f"{reason}; no room on SSD")
            else:
                # What is nearer may not be dropped either, so only valid SSD copies can help from here on.
                self._dram_victims = _Walk(other for other in reversed(self._index.duplicates) if other < key)
            return
        if is_copy_needed:
            self._ssd_free -= item.size_bytes
        self._dram_free += item.size_bytes
        self._taken.add(key[3])
        if self._index.record(key[3]).is_queued and item.size_bytes <= self._capacity.window_bytes:
            self._nearest_evicted = min(self._nearest_evicted, key)
        self._commands.append(
            Command(
                action=Action.EVICT,
                item_id=item.item_id,
                size_bytes=item.size_bytes,
                is_copy_needed=is_copy_needed,
                reason=reason,
            )
        )

    def _make_ssd_room(self, size_bytes: int, wanted: UseKey) -> bool:
        """Delete SSD copies: those that DRAM holds too, then what has a farther use outside the window."""
        if not self._can_copy:
            return False
        copies: list[UseKey] = []
        dropped: list[UseKey] = []
        freed_bytes = self._ssd_free
        for key in self._duplicates if freed_bytes < size_bytes else ():
            if key[3] not in self._taken:
                copies.append(key)
                freed_bytes += self._index.record(key[3]).item.size_bytes
                if freed_bytes >= size_bytes:
                    break
        for key in self._ssd_victims if freed_bytes < size_bytes else ():
            if key <= wanted or key[:2] <= self._keep_window:
                self._ssd_victims.put_back([key])
                break
            if key[3] not in self._taken:
                dropped.append(key)
                freed_bytes += self._index.record(key[3]).item.size_bytes
                if freed_bytes >= size_bytes:
                    break
        if freed_bytes < size_bytes:
            self._duplicates.put_back(copies)
            self._ssd_victims.put_back(dropped)
            return False
        for key in copies:
            self._drop_duplicate(key[3])
        for key in dropped:
            self._drop(key[3], f"SSD is full; {self._expectation(key)}")
        return True

    def _drop_duplicate(self, number: int) -> None:
        item = self._index.record(number).item
        self._single.add(number)
        self._ssd_free += item.size_bytes
        self._commands.append(
            Command(
                action=Action.DROP,
                item_id=item.item_id,
                size_bytes=item.size_bytes,
                from_ssd=True,
                reason="SSD is full and DRAM holds it too",
            )
        )

    def _drop(self, number: int, reason: str) -> None:
        item = self._index.record(number).item
        from_ssd = item.on_ssd and number not in self._single
        self._taken.add(number)
        if item.in_dram:
            self._dram_free += item.size_bytes
        if from_ssd:
            self._ssd_free += item.size_bytes
        self._commands.append(
            Command(
                action=Action.DROP,
                item_id=item.item_id,
                size_bytes=item.size_bytes,
                from_dram=item.in_dram,
                from_ssd=from_ssd,
                reason=reason,
            )
        )

    def _expectation(self, key: UseKey) -> str:
        if key[0] < math.inf:
            return f"expected in {key[0] - self._now_s:.1f} s"
        return f"not expected, last used {self._now_s + key[1]:.1f} s ago"


class _Walk:
    """Keys one after another; some can be put back."""

    def __init__(self, keys: Iterator[UseKey]) -> None:
        self._keys = keys
        self._back: deque[UseKey] = deque()

    def __iter__(self) -> Iterator[UseKey]:
        return self

    def __next__(self) -> UseKey:
        return self._back.popleft() if self._back else next(self._keys)

    def put_back(self, keys: Sequence[UseKey]) -> None:
        self._back.extendleft(reversed(keys))
