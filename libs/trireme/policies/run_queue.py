"""Everybody who waits, in the order in which they should run, and everybody who ran last.

Waiting jobs stand in one of three sorted sets by where their KV is believed to be, so that an iteration
touches only those that it takes: not those that wait without KV, however many they are. The engine's
`SequenceView` has the last word; a belief that proves wrong is corrected when the job is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator

from trireme.policies.iteration import Job, Location
from trireme.policies.sorted_keys import SortedKeys

Key = tuple[float, int, str]
"""(rank, ticket, sequence id), next first. The rank is a level, or a length; tickets are distinct."""


class Entry:
    """A job in the queue. `rank` and `ticket` may change only while it stands in no set."""

    __slots__ = (
        "computed_tokens",
        "is_prefilling",
        "job",
        "join_level",
        "key",
        "last_s",
        "location",
        "passes",
        "seat",
        "used_s",
    )

    def __init__(self, job: Job, key: Key, last_s: float) -> None:
        self.job = job
        self.key = key
        self.last_s = last_s
        """When its last iteration ended; its arrival before the first."""
        self.used_s = 0.0
        """Charged since it entered its level."""
        self.join_level = 1
        self.seat = 0
        """Its place in the line of its level; see `mlfq`."""
        self.location = Location.NONE
        """Believed: NONE, DEVICE or HOST. One that is being copied is where the copy ends."""
        self.computed_tokens = job.cached_tokens
        self.is_prefilling = True
        self.passes = 0
        """Iterations in which it did not fit and a later one was admitted."""

    @property
    def level(self) -> int:
        """The rank, where ranks are levels."""
        return int(self.key[0])


class RunQueue:
    """All jobs of one scheduler."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.members: dict[str, Entry] = {}
        """The last batch, without those that have ended. They stand in no set."""
        self.steady_blocks = -1
        """Blocks that the members may take until the next decision can differ; negative: it can at once."""
        self.fresh: SortedKeys[Key] = SortedKeys()
        """Without KV."""
        self.device: SortedKeys[Key] = SortedKeys()
        self.host: SortedKeys[Key] = SortedKeys()
        self._sets = {Location.NONE: self.fresh, Location.DEVICE: self.device, Location.HOST: self.host}

    def add(self, entry: Entry) -> None:
        """A new job waits."""
        sequence_id = entry.job.sequence_id
        assert sequence_id not in self.entries, f"{sequence_id} is here already"
        self.entries[sequence_id] = entry
        self.fresh.add(entry.key)

    def remove(self, sequence_id: str) -> Entry | None:
        """Forget a job; None if it is not here."""
        entry = self.entries.pop(sequence_id, None)
        if entry is not None and self.members.pop(sequence_id, None) is None:
            self.leave(entry)
        return entry

    def wait(self, entry: Entry, location: Location) -> None:
        """Stand in the set of this place (not MOVING)."""
        entry.location = location
        self._sets[location].add(entry.key)

    def leave(self, entry: Entry) -> None:
        """Stand in no set any more."""
        self._sets[entry.location].discard(entry.key)

    def member_keys(self) -> list[Key]:
        """The last batch, in order."""
        return sorted([entry.key for entry in self.members.values()])

    def waiting(self) -> Iterator[str]:
        """Everybody who waits, next first, lazily."""
        return (key[2] for key in Walk(iter(self.device), iter(self.host), iter(self.fresh)))


class Walk(Iterator[Key]):
    """One ascending walk over several ascending streams, any of which may be dropped on the way."""

    def __init__(self, *streams: Iterator[Key]) -> None:
        self._streams = streams
        self._heads = [next(stream, None) for stream in streams]
        self._current = 0
        self._limit: Key | None = _BEFORE_ALL
        """The least head of the other streams; None: there are none."""

    def __next__(self) -> Key:
        head = self._heads[self._current]
        if head is None or (self._limit is not None and head > self._limit):
            self._choose()
            head = self._heads[self._current]
            if head is None:
                raise StopIteration
        self._heads[self._current] = next(self._streams[self._current], None)
        return head

    def drop(self, index: int) -> None:
        """Leave out what is left of a stream."""
        self._heads[index] = None
        self._limit = _BEFORE_ALL

    def _choose(self) -> None:
        heads = sorted([(head, index) for index, head in enumerate(self._heads) if head is not None])
        if heads:
            self._current = heads[0][1]
        self._limit = heads[1][0] if len(heads) > 1 else None


_BEFORE_ALL: Key = (float("-inf"), 0, "")
