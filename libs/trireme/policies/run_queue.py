"""Everybody who waits, in the order in which they should run, and everybody who ran last.

Waiting jobs stand in one of three sorted sets by where their KV is believed to be, so that an iteration
touches only those that it takes: not those that wait without KV, however many they are. The engine's
`SequenceView` has the last word; a belief that proves wrong is corrected when the job is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator

from trireme.policies.iteration import Job, Location, Run
from trireme.policies.sorted_keys import SortedKeys

Key = tuple[float, int, str]
"""(rank, ticket, sequence id), next first. The rank is a level, or a length; tickets are distinct."""


class Entry:
    """A job in the queue. `rank` and `ticket` may change only while it stands in no set."""

    __slots__ = (
        "computed_tokens",
        "demand_s",
        "job",
        "join_level",
        "key",
        "last_s",
        "location",
        "passes",
        "seat",
        "single",
        "used_s",
    )

    def __init__(self, job: Job, key: Key, last_s: float) -> None:
        self.job = job
        self.key = key
        self.last_s = last_s
        """When its last iteration ended; its arrival before the first."""
        self.used_s = 0.0
        """Charged since it entered its level."""
        self.demand_s = 0.0
        """Its share of the iterations it ran in, since it came."""
        self.single = Run(job.sequence_id, 1)
        """Decoding: made once."""
        self.join_level = 1
        self.seat = 0
        """Its place in the line of its level; see `mlfq`."""
        self.location = Location.NONE
        """Believed: NONE, DEVICE or HOST. One that is being copied is where the copy ends."""
        self.computed_tokens = job.cached_tokens
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
        """The last batch, without those that have ended. They stand in no set, and on the device."""
        self.prefilling: set[str] = set()
        """Those of the last batch that were not decoding."""
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


class Walk:
    """One ascending walk over several ascending streams, any of which may be dropped on the way."""

    def __init__(self, *streams: Iterator[Key]) -> None:
        self.stream = 0
        """Which stream the last key came from."""
        self._streams = streams
        self._dropped: set[int] = set()

    def drop(self, index: int) -> None:
        """Leave out what is left of a stream."""
        self._dropped.add(index)

    def __iter__(self) -> Iterator[Key]:
        streams = self._streams
        dropped = self._dropped
        heads = [next(stream, None) for stream in streams]
        while True:
            left = sorted(
                [(head, at) for at, head in enumerate(heads) if head is not None and at not in dropped]
            )
            if not left:
                return
            head: Key | None
            head, index = left[0]
            limit = left[1][0] if len(left) > 1 else None
            stream = streams[index]
            num_dropped = len(dropped)
            self.stream = index
            while head is not None and (limit is None or head < limit) and len(dropped) == num_dropped:
                following = next(stream, None)
                yield head
                head = following
            heads[index] = head
