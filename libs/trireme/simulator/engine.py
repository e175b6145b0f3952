"""One engine on the virtual clock: asks the live iteration scheduler, moves blocks, takes the model's time.

The order of an iteration is that of the live engine: decide, start the copies that the decision names,
compute, charge, sample, end what has all its tokens. Copies go over one link per direction while the
engine computes; a sequence runs only when its own have ended.

Fast-forward: while every member decodes, the scheduler says for how long its answer stays the same
(`steady`), and nobody arrives, ends, moves or runs out of blocks, the iterations between are the same
decision at times that the model gives. They are played as one event and charged their sum, which is exact
(`requests.TICK_S`). An arrival cuts the run at the end of the iteration it falls into.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from simpy import Environment

from trireme.errors import InvalidConfiguration
from trireme.policies.iteration import (
    Budget,
    IterationDecision,
    IterationScheduler,
    Job,
    Location,
    Run,
    SequenceView,
)
from trireme.policies.mlfq import MlfqScheduler
from trireme.simulator.block_moves import BlockMoves
from trireme.simulator.engine_config import EngineConfig, Swapping
from trireme.simulator.engine_model import EngineModel
from trireme.simulator.events import ITERATION, Call
from trireme.simulator.requests import on_tick
from trireme.simulator.result import Counters
from trireme.simulator.reuse import Reuse
from trireme.simulator.sequences import Pools, Sequence

_NO_ENDS: NDArray[np.float64] = np.empty(0)
LONGEST_RUN = 4096
"""Iterations played as one event, at most: bounds the arrays."""


class Engine:
    """Sequences in, finished sequences out.

    Args:
        env: the clock.
        model: the time of an iteration.
        scheduler: a live iteration scheduler of its own.
        on_end: called with each sequence when its last token is there.
        find: called when one starts: what lower tiers give it; `kv_arrived` must follow if not ready.
        on_first_token: called when its first is.
    """

    def __init__(
        self,
        env: Environment,
        config: EngineConfig,
        model: EngineModel,
        scheduler: IterationScheduler,
        *,
        on_end: Callable[[Sequence], None],
        find: Callable[[Sequence], Reuse] | None = None,
    ) -> None:
        self.env = env
        self.config = config
        self.model = model
        self.scheduler = scheduler
        self.counters = Counters()
        self.pools = Pools(config.num_blocks, config.host_blocks)
        self.sequences: dict[str, Sequence] = {}
        self.running = 0
        """Members of the present batch."""
        block_bytes = max(1, config.block_tokens * model.kv_bytes_per_token)
        self._moves = BlockMoves(
            env,
            self.pools,
            self.counters,
            block_tokens=config.block_tokens,
            block_bytes=block_bytes,
            link_bytes_per_s=model.link_bytes_per_s,
            on_moved=self._wake,
        )
        self._link_blocks_per_s = model.link_bytes_per_s / block_bytes
        self._watermark_blocks = int(config.watermark * config.num_blocks)
        self._on_end = on_end
        self._find = find
        self._keeps_reserve = bool(config.host_blocks) and config.swapping is Swapping.PROACTIVE
        """The scheduler counts decisions for its reserve of blocks, so that each charge must follow one."""
        self._runs: tuple[Run, ...] = ()
        self._ends_s: NDArray[np.float64] | None = None
        """When the iterations of a fast-forwarded run end, after `_started_s`; None: it cannot be cut."""
        self._run_ends_s: NDArray[np.float64] | None = None
        """The same, and still there when it was cut."""
        self._charged = 0
        """Of the present iterations, those that are billed already."""
        self._charged_runs: tuple[Run, ...] = ()
        """The members in the scheduler's present order."""
        self._started_s = 0.0
        self._seconds = 0.0
        self._iterations = 0
        self._pending: Call | None = None
        """The end of what computes now; None: idle."""
        self._waits_since_s: float | None = None
        """Somebody is here and nobody can run before a copy ends."""

    def submit(self, sequence: Sequence) -> None:
        """A sequence arrives.

        Raises:
            InvalidConfiguration: it can never fit.
        """
        request = sequence.request
        needed = self._blocks_for(request.prompt_tokens + request.answer_tokens)
        if needed > self.config.num_blocks:
            raise InvalidConfiguration(
                f"request {request.request_id} needs {needed} blocks of KV and the device has "
                f"{self.config.num_blocks}: give more with --kv-blocks",
                param="--kv-blocks",
            )
        self.sequences[sequence.sequence_id] = sequence
        sequence.computed = sequence.cached_tokens
        job = Job(
            sequence_id=sequence.sequence_id,
            arrival_s=sequence.arrival_s,
            new_tokens=request.prompt_tokens - sequence.cached_tokens,
            cached_tokens=sequence.cached_tokens,
            load_stall_s=sequence.stall_s,
        )
        if self._ends_s is not None:
            # What was computed by now comes before the arrival, as it would if it was played one by one.
            self._charge(int(np.searchsorted(self._ends_s, self.env.now - self._started_s, side="left")))
        self.scheduler.add(job, now_s=self.env.now)
        self._wake()

    @property
    def waiting(self) -> int:
        """Sequences that are here and not in the present batch."""
        return len(self.sequences) - self.running

    def _wake(self) -> None:
        """Something changed: decide anew, at once if idle, else when the present iteration ends."""
        if self._pending is None:
            # After everything else that happens at this instant.
            self._pending = Call(self.env, 0.0, self._end, priority=ITERATION)
        elif self._ends_s is not None:
            self._cut()

    def _cut(self) -> None:
        """End a fast-forwarded run with the iteration that computes now."""
        assert self._ends_s is not None and self._pending is not None
        place = int(np.searchsorted(self._ends_s, self.env.now - self._started_s, side="left"))
        if place + 1 < self._iterations:
            self._pending.cancel()
            self._take(place + 1, float(self._ends_s[place]))
        self._ends_s = None

    def _take(self, iterations: int, seconds: float) -> None:
        self._iterations = iterations
        self._seconds = seconds
        delay_s = self._started_s + seconds - self.env.now
        self._pending = Call(self.env, delay_s, self._end, priority=ITERATION)

    def _end(self) -> None:
        """The present iterations are over; begin the next."""
        self._pending = None
        self._ends_s = None
        runs = self._runs
        if runs:
            self._settle(runs)
        self.running = 0
        self._runs = ()
        if self.sequences:
            self._begin()

    def _settle(self, runs: tuple[Run, ...]) -> None:
        now_s = self.env.now
        iterations = self._iterations
        counters = self.counters
        counters.iterations += iterations
        counters.busy_s += self._seconds
        sequences = self.sequences
        size = self.config.block_tokens
        ended: list[Sequence] = []
        for sequence_id, num_tokens in runs:
            sequence = sequences[sequence_id]
            computed = sequence.computed + num_tokens
            if computed == sequence.target:
                if not sequence.generated:
                    sequence.first_token_s = now_s
                computed += iterations - 1
                blocks = -(-computed // size)
                if blocks > sequence.blocks:
                    self.pools.device_free -= blocks - sequence.blocks
                    sequence.blocks = blocks
                sequence.generated += iterations
                sequence.target += iterations
            sequence.computed = computed
            if computed > sequence.most_computed:
                sequence.most_computed = computed
            if sequence.generated == sequence.answer_tokens:
                ended.append(sequence)
        self._charge(iterations)
        for sequence in ended:
            self._finish(sequence, now_s)

    def _finish(self, sequence: Sequence, now_s: float) -> None:
        sequence.finish_s = now_s
        self.pools.device_free += sequence.blocks
        sequence.blocks = 0
        sequence.location = Location.NONE
        del self.sequences[sequence.sequence_id]
        self.scheduler.remove(sequence.sequence_id)
        self._on_end(sequence)

    def _begin(self) -> None:
        """Decide, move, and compute."""
        if self._waits_since_s is not None:
            self.counters.stalled_s += self.env.now - self._waits_since_s
            self._waits_since_s = None
        decision = self.scheduler.decide(self._budget(), self._view, now_s=self.env.now)
        self.counters.decisions += 1
        self._moves.carry_out(decision, self.sequences)
        runs, stall_s = self._started(decision)
        if not runs:
            # A copy that ends, or an arrival, wakes it.
            assert self._moves.in_flight or decision.evicted, f"the scheduler runs nobody: {decision.reason}"
            self._waits_since_s = self.env.now
            if not self._moves.in_flight:
                self._wake()
            return
        self._compute(runs, stall_s)

    def _budget(self) -> Budget:
        pools = self.pools
        config = self.config
        return Budget(
            token_budget=config.token_budget,
            max_sequences=config.max_sequences,
            free_blocks=pools.device_free,
            draining_blocks=pools.device_draining,
            host_free_blocks=pools.host_free,
            host_blocks=pools.host_blocks,
            watermark_blocks=self._watermark_blocks,
            max_passes=config.max_passes,
            link_blocks_per_s=self._link_blocks_per_s,
        )

    def _started(self, decision: IterationDecision) -> tuple[tuple[Run, ...], float]:
        """Those that run, without those whose KV has to come first; and the wait for what is loaded."""
        if not decision.admitted:
            return decision.runs, 0.0
        runs: list[Run] = []
        stall_s = 0.0
        for sequence_id, count in decision.runs:
            sequence = self.sequences[sequence_id]
            if sequence_id in decision.admitted:
                assert sequence.location is Location.NONE
                sequence.location = Location.DEVICE
                if self._find is not None and not sequence.preemptions:
                    found = self._find(sequence)
                    sequence.cached_tokens = sequence.computed = sequence.most_computed = found.tokens
                    count = min(count, sequence.target - found.tokens)
                    stall_s = max(stall_s, on_tick(found.stall_s))
                    if not found.is_ready:
                        self._moves.await_kv(sequence)
                        continue
            runs.append(Run(sequence_id, count))
        return tuple(runs), stall_s

    def kv_arrived(self, sequence: Sequence) -> None:
        """What a sequence waited for is on the device."""
        self._moves.arrived(sequence)

    def _compute(self, runs: tuple[Run, ...], stall_s: float) -> None:
        """Take the model's time for the batch, or for as many iterations of it as are sure to be alike."""
        sequences = self.sequences
        size = self.config.block_tokens
        new_tokens = kv_tokens = pairs = taken = 0
        longest = LONGEST_RUN if self.config.fast_forward else 1
        # Written out: this loop is most of the simulator's own time.
        for sequence_id, count in runs:
            sequence = sequences[sequence_id]
            start, target = sequence.computed, sequence.target
            end = start + count
            blocks = -(-target // size)
            if blocks > sequence.blocks:
                taken += blocks - sequence.blocks
                sequence.blocks = blocks
            if count == 1 and end == target and sequence.generated:
                left = sequence.answer_tokens - sequence.generated
                if left < longest:
                    longest = left
                pairs += end
            else:
                longest = 1
                pairs += count * start + count * (count + 1) // 2
            if start < sequence.most_computed:
                sequence.recomputed_tokens += min(sequence.most_computed, end) - start
            new_tokens += count
            kv_tokens += end
        self.pools.device_free -= taken
        self._runs = self._charged_runs = runs
        self._charged = 0
        self.running = len(runs)
        wait_s = max(stall_s, self._moves.draining_s())
        if self.config.swapping is Swapping.REACTIVE:
            wait_s = max(wait_s, self._moves.copying_s())
        self.counters.stalled_s += wait_s
        self._started_s = self.env.now + wait_s
        if longest > 1 and not self._moves.in_flight:
            ends_s = self._alike_ends_s(runs, kv_tokens, longest)
            if len(ends_s) > 1:
                self._ends_s = self._run_ends_s = ends_s
                self._take(len(ends_s), float(ends_s[-1]))
                return
        self._run_ends_s = None
        self._take(1, self.model.iteration_s(len(runs), new_tokens, kv_tokens, pairs))

    def _alike_ends_s(self, runs: tuple[Run, ...], kv_tokens: int, longest: int) -> NDArray[np.float64]:
        """Ends of the iterations, after the first starts, for which the scheduler would decide the same."""
        steady = self.scheduler.steady()
        if steady.blocks < 0:
            return _NO_ENDS
        # Where nobody waits everybody runs on, whatever the charges do to the order: only room can lack.
        is_everybody = len(runs) == len(self.sequences) and not self._keeps_reserve
        if not is_everybody:
            longest = int(min(longest, steady.iterations))
        iterations = self._within_blocks(runs, steady.blocks, longest)
        if iterations == 1:
            return _NO_ENDS
        ends_s = self.model.decode_ends_s(len(runs), kv_tokens, iterations)
        if is_everybody:
            return ends_s
        # The iteration whose charge goes beyond what is allowed is the last: then the answer changes.
        return ends_s[: int(np.searchsorted(ends_s, steady.seconds, side="right")) + 1]

    def _charge(self, iterations: int) -> None:
        """Bill the first so many of the present ones, as far as they are not billed yet.

        Piece by piece, so that whoever is demoted on the way is demoted in the right iteration.
        """
        scheduler, ends_s = self.scheduler, self._run_ends_s
        while self._charged < iterations:
            first, runs = self._charged, self._charged_runs
            count, end_s = iterations - first, self._seconds
            if ends_s is not None:
                begin_s = float(ends_s[first - 1]) if first else 0.0
                spent = int(np.searchsorted(ends_s, begin_s + scheduler.steady().seconds, side="right"))
                count = max(1, min(count, spent + 1 - first))
                end_s = float(ends_s[first + count - 1])
                seconds = end_s - begin_s
            else:
                seconds = end_s
            self._charged += count
            changes = scheduler.charge(runs, seconds, now_s=self._started_s + end_s, iterations=count)
            self.counters.level_changes += len(changes)
            if changes and ends_s is not None and isinstance(scheduler, MlfqScheduler):
                self._charged_runs = _reordered(runs, scheduler, {change.sequence_id for change in changes})

    def _within_blocks(self, runs: tuple[Run, ...], blocks: int, longest: int) -> int:
        """The most iterations for which the members' growth takes no more than so many blocks."""
        size = self.config.block_tokens
        members = [self.sequences[sequence_id] for sequence_id, _ in runs]
        rooms = [sequence.blocks * size - sequence.target for sequence in members]

        def taken(iterations: int) -> int:
            return sum(-(-(iterations - 1 - room) // size) for room in rooms if iterations - 1 > room)

        if taken(longest) <= blocks:
            return longest
        fits, exceeds = 1, longest
        while exceeds - fits > 1:
            middle = (fits + exceeds) // 2
            if taken(middle) <= blocks:
                fits = middle
            else:
                exceeds = middle
        return fits

    def _view(self, sequence_id: str) -> SequenceView:
        sequence = self.sequences[sequence_id]
        held = sequence.blocks if sequence.location is Location.DEVICE else 0
        return SequenceView(
            sequence.target - sequence.computed,
            -(-sequence.target // self.config.block_tokens) - held,
            held,
            sequence.location,
        )

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.config.block_tokens)


def _reordered(runs: tuple[Run, ...], scheduler: MlfqScheduler, demoted: set[str]) -> tuple[Run, ...]:
    """As the scheduler would name them next: by level, and whoever was just demoted last in its level."""
    return tuple(sorted(runs, key=lambda run: (scheduler.level_of(run[0]), run[0] in demoted)))
