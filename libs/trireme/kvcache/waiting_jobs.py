"""The requests that wait, as schedulers and workers tell them: whose blocks are needed next, and when.

Each source tells its own queue, whole or in part; the merged order is what the planner looks ahead in.
A job names blocks; the planner moves runs. So a job is resolved to the runs that hold its leading
blocks, again whenever its first missing block has appeared, and now and then from the beginning.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from trireme.kvcache.block_codec import BlockKey
from trireme.kvcache.stored_blocks import Block
from trireme.policies.kv_items import QueuedJob

SOURCE_S = 10.0
"""A source that says nothing for so long is dead, and its queue with it."""
MAX_JOBS = 1024
"""Jobs of one source that are looked at; the queue beyond is too far away to matter."""
_RESOLVE_S = 2.0


@dataclass(frozen=True, slots=True)
class WaitingJob:
    """One request in a source's queue."""

    job_id: str
    start_s: float
    """When it is expected to start, by the store's clock."""


class _Chain:
    """A job's blocks, and the runs that hold the leading ones."""

    __slots__ = ("keys", "resolved_at_s", "resolved_blocks", "runs")

    def __init__(self, keys: Sequence[BlockKey]) -> None:
        self.keys = keys
        self.runs: tuple[int, ...] = ()
        self.resolved_blocks = 0
        self.resolved_at_s = float("-inf")

    def resolve(self, blocks: Mapping[BlockKey, Block], *, now_s: float) -> bool:
        """Bring the runs up to date; whether they changed."""
        missing = self.resolved_blocks < len(self.keys) and self.keys[self.resolved_blocks] in blocks
        if not missing and now_s - self.resolved_at_s < _RESOLVE_S:
            return False
        numbers: dict[int, None] = {}
        count = 0
        for key in self.keys:
            block = blocks.get(key)
            if block is None or block.run is None:
                break
            numbers[block.run.number] = None
            count += 1
        before, self.runs = self.runs, tuple(numbers)
        self.resolved_blocks, self.resolved_at_s = count, now_s
        return self.runs != before


@dataclass(slots=True)
class _Source:
    heard_s: float
    order: list[WaitingJob] = field(default_factory=list)
    chains: dict[str, _Chain] = field(default_factory=dict)


class WaitingJobs:
    """The queues of all sources."""

    def __init__(self) -> None:
        self._sources: dict[str, _Source] = {}
        self._is_changed = False
        self._queue: list[QueuedJob[int]] = []

    def __len__(self) -> int:
        return len(self._queue)

    def hear(
        self,
        source: str,
        order: Sequence[WaitingJob],
        chains: Mapping[str, Sequence[BlockKey]],
        *,
        now_s: float,
    ) -> None:
        """A source's queue now, soonest first, and the blocks of those jobs it tells for the first time."""
        state = self._sources.setdefault(source, _Source(now_s))
        state.heard_s = now_s
        state.order = list(order[:MAX_JOBS])
        named = {job.job_id for job in state.order}
        state.chains = {job_id: chain for job_id, chain in state.chains.items() if job_id in named}
        for job_id, keys in chains.items():
            known = state.chains.get(job_id)
            if job_id in named and (known is None or known.keys != keys):
                state.chains[job_id] = _Chain(keys)
        self._is_changed = True

    def unresolved(self, *, within_s: float, now_s: float) -> Iterator[Sequence[BlockKey]]:
        """The missing blocks of jobs that start soon, nearest first."""
        for source in self._sources.values():
            for job in source.order:
                chain = source.chains.get(job.job_id)
                if chain and chain.resolved_blocks < len(chain.keys) and job.start_s <= now_s + within_s:
                    yield chain.keys[chain.resolved_blocks :]

    def refresh(self, blocks: Mapping[BlockKey, Block], *, now_s: float) -> Sequence[QueuedJob[int]] | None:
        """The merged queue, soonest first; None where it is as it was."""
        silent = [name for name, each in self._sources.items() if now_s - each.heard_s > SOURCE_S]
        for name in silent:
            del self._sources[name]
        changed = self._is_changed or bool(silent)
        for source in self._sources.values():
            for chain in source.chains.values():
                changed |= chain.resolve(blocks, now_s=now_s)
        if not changed:
            return None
        self._is_changed = False
        merged: dict[str, QueuedJob[int]] = {}
        queues = [self._queue_of(source) for source in self._sources.values()]
        for job in heapq.merge(*queues, key=lambda each: each.use_s):
            # A job that two sources name is where it starts first.
            merged.setdefault(job.job_id, job)
        self._queue = list(merged.values())
        return self._queue

    def _queue_of(self, source: _Source) -> Iterator[QueuedJob[int]]:
        start_s = 0.0
        for job in source.order:
            chain = source.chains.get(job.job_id)
            # The order is the source's word; its estimates may waver.
            start_s = max(start_s, job.start_s)
            if chain is not None and chain.runs:
                yield QueuedJob(job_id=job.job_id, use_s=start_s, item_ids=chain.runs)
