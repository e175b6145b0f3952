"""The fleet on the virtual clock: requests arrive, are routed to workers, and end.

Routing is the live `choose_worker` on views built as the live scheduler builds them; a request for which
no worker has room waits in order of arrival. With one tenant and one class the live dispatcher's fair
order is that order.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from simpy import Environment

from trireme.errors import InvalidConfiguration
from trireme.policies.iteration import IterationScheduler
from trireme.policies.routing import RoutedRequest, WorkerView, choose_worker
from trireme.simulator import sequences
from trireme.simulator.engine import Engine
from trireme.simulator.engine_config import EngineConfig
from trireme.simulator.engine_model import EngineModel
from trireme.simulator.events import ARRIVAL, COPIED, Call
from trireme.simulator.requests import TICK_S, Request, checked, on_tick
from trireme.simulator.result import Moment, Result
from trireme.simulator.reuse import KvReuse, Reuse

RemainingS = Callable[[str], float]
"""Seconds that a sequence still computes if it decodes in a full batch: what an oracle knows."""
SchedulerFactory = Callable[[RemainingS], IterationScheduler]
"""Builds the iteration scheduler of one worker."""

NOMINAL_CONTEXT_TOKENS = 512
"""Context at which a worker's decode speed is told to routing."""
ANSWER_SMOOTHING = 0.05
"""Weight of the newest answer in the expected length; as in the live scheduler."""
MOMENTS = 600
"""Points of a timeline: so many at least and twice as many at most, where the run is long enough."""
MIN_PERIOD_S = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetConfig:
    """A fleet of equal workers.

    Raises:
        InvalidConfiguration: there is no worker, or a delay is negative.
    """

    engine: EngineConfig = field(default_factory=EngineConfig)
    workers: int = 1
    queue_limit: int | None = None
    """Requests that a worker may hold beyond its batch; None: as many as come."""
    request_overhead_s: float = 0.0
    """From the client's call to the engine, and from the engine's last token to the client, together."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise InvalidConfiguration(f"{self.workers} workers serve nobody", param="--workers")
        if self.queue_limit is not None and self.queue_limit < 0:
            raise InvalidConfiguration("the queue limit must not be negative", param="--queue-limit")
        if not 0 <= self.request_overhead_s < math.inf:
            raise InvalidConfiguration("the overhead of a request must be finite and not negative")


class Fleet:
    """One simulation; `run` plays it to its end.

    Args:
        requests: in any order.
        scheduler_factory: called once per worker.
        is_preemptive: what routing is told of these schedulers.
        reuse: what lower tiers give a request; None: every prompt is computed.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        config: FleetConfig,
        model: EngineModel,
        scheduler_factory: SchedulerFactory,
        *,
        is_preemptive: bool = False,
        reuse: KvReuse | None = None,
    ) -> None:
        self.env = Environment()
        self.config = config
        self.model = model
        self.reuse = reuse
        self._is_preemptive = is_preemptive
        self._full_decode_s = model.decode_s(config.engine.max_sequences, NOMINAL_CONTEXT_TOKENS)
        self.engines = [
            Engine(
                self.env,
                config.engine,
                model,
                scheduler_factory(self._remaining_s),
                on_end=self._ended,
                find=None if reuse is None else self._find,
            )
            for _ in range(config.workers)
        ]
        self._requests = checked(requests)
        self._sequences: dict[str, sequences.Sequence] = {}
        self._followers: dict[str, list[Request]] = defaultdict(list)
        self._arriving = iter([r for r in self._requests if not r.after])
        for request in self._requests:
            if request.after:
                self._followers[request.after].append(request)
        self._held: deque[sequences.Sequence] = deque()
        """Arrived, and no worker has room."""
        self._assigned = [0] * config.workers
        self._assigned_tokens = [0] * config.workers
        self._expected_answer = 0.0
        self._prefill_tokens_per_s = 1 / model.prefill_s(config.engine.token_budget)
        self._prefill_tokens_per_s *= config.engine.token_budget
        self._overhead_in_s = on_tick(config.request_overhead_s / 2)
        self._tiers_s = math.inf
        """When the tiers will be advanced next."""
        self._ended_count = 0
        self._timeline: list[Moment] = []

    def run(self) -> Result:
        """Play all requests to their end."""
        self._next_arrival()
        span_s = self._requests[-1].arrival_s - self._requests[0].arrival_s
        self._watch(max(on_tick(span_s / MOMENTS), on_tick(MIN_PERIOD_S)))
        self.env.run()
        assert self._ended_count == len(self._requests), "some requests never ended"
        return Result.of(
            [self._sequences[request.request_id] for request in self._requests],
            timeline=self._timeline,
            counters=[engine.counters for engine in self.engines],
        )

    def _remaining_s(self, sequence_id: str) -> float:
        sequence = self._sequences[sequence_id]
        left = sequence.answer_tokens - sequence.generated
        if sequence.generated:
            return left * self._full_decode_s
        prompt = sequence.request.prompt_tokens - sequence.cached_tokens
        return self.model.prefill_s(prompt, sequence.cached_tokens) + (left - 1) * self._full_decode_s

    # Requests come and go.

    def _next_arrival(self) -> None:
        request = next(self._arriving, None)
        if request is not None:
            delay_s = request.arrival_s - self.env.now
            Call(self.env, delay_s, lambda: self._arrive_in_order(request), priority=ARRIVAL)

    def _arrive_in_order(self, request: Request) -> None:
        self._next_arrival()
        self._arrive(request)

    def _arrive(self, request: Request) -> None:
        sequence = sequences.Sequence(request, arrival_s=self.env.now)
        self._sequences[request.request_id] = sequence
        if self._overhead_in_s:
            Call(self.env, self._overhead_in_s, lambda: self._dispatch(sequence), priority=ARRIVAL)
        else:
            self._dispatch(sequence)

    def _dispatch(self, sequence: sequences.Sequence) -> None:
        if self._held or not self._assign(sequence):
            self._held.append(sequence)

    def _assign(self, sequence: sequences.Sequence) -> bool:
        """Give it to a worker; False while none has room."""
        request = sequence.request
        if self.config.workers == 1:
            limit = self.config.queue_limit
            if limit is not None and self._assigned[0] >= self.config.engine.max_sequences + limit:
                return False
            place = 0
        else:
            views = [self._view(index) for index in range(self.config.workers)]
            answer = self._expected_answer or float(request.answer_tokens)
            routed = RoutedRequest(
                request_id=request.request_id,
                prompt_tokens=request.prompt_tokens,
                expected_answer_tokens=min(answer, request.answer_tokens),
                choices=1,
                urgency=1,
            )
            choice = choose_worker(routed, views)
            if choice is None:
                return False
            place = int(choice.worker_id)
        sequence.worker = place
        self._assigned[place] += 1
        self._assigned_tokens[place] += request.prompt_tokens + request.answer_tokens
        if self.reuse is not None:
            expected = self.reuse.arrived(request, now_s=self.env.now)
            sequence.cached_tokens, sequence.stall_s = expected.tokens, expected.stall_s
            self._follow_tiers()
        self.engines[place].submit(sequence)
        return True

    def _view(self, place: int) -> WorkerView:
        engine = self.engines[place]
        config = self.config.engine
        limit = self.config.queue_limit
        return WorkerView(
            worker_id=str(place),
            variant=self.model.name,
            assigned_requests=self._assigned[place],
            assigned_tokens=self._assigned_tokens[place],
            running=engine.running,
            max_sequences=config.max_sequences,
            queue_limit=len(self._requests) if limit is None else limit,
            prefill_tokens_per_s=self._prefill_tokens_per_s,
            decode_tokens_per_s=1 / self.model.decode_s(max(1, engine.running), NOMINAL_CONTEXT_TOKENS),
            preemptive=self._is_preemptive,
            cached_tokens=0,  # the tiers are behind all workers alike
        )

    def _ended(self, sequence: sequences.Sequence) -> None:
        request = sequence.request
        place = sequence.worker
        self._ended_count += 1
        self._assigned[place] -= 1
        self._assigned_tokens[place] -= request.prompt_tokens + request.answer_tokens
        answer = float(request.answer_tokens)
        known = self._expected_answer or answer
        self._expected_answer = (1 - ANSWER_SMOOTHING) * known + ANSWER_SMOOTHING * answer
        if self.reuse is not None:
            self.reuse.ended(request, now_s=self.env.now)
            self._follow_tiers()
        sequence.finish_s += self._overhead_in_s
        sequence.first_token_s += self._overhead_in_s
        for follower in self._followers.pop(request.request_id, ()):
            delay_s = self._overhead_in_s + follower.think_s
            Call(self.env, delay_s, lambda follower=follower: self._arrive(follower), priority=ARRIVAL)  # type: ignore[misc]
        while self._held and self._assign(self._held[0]):
            self._held.popleft()

    # Lower tiers.

    def _find(self, sequence: sequences.Sequence) -> Reuse:
        assert self.reuse is not None
        found = self.reuse.started(sequence.request, now_s=self.env.now)
        self._follow_tiers()
        return found

    def _follow_tiers(self) -> None:
        """Be there when the tiers' next transfer ends."""
        assert self.reuse is not None
        next_s = self.reuse.next_event_s()
        if next_s < self._tiers_s:
            self._tiers_s = max(self.env.now, math.ceil(next_s / TICK_S) * TICK_S)
            Call(self.env, self._tiers_s - self.env.now, self._advance_tiers, priority=COPIED)

    def _advance_tiers(self) -> None:
        assert self.reuse is not None
        self._tiers_s = math.inf
        for request_id in self.reuse.advance(self.env.now):
            sequence = self._sequences[request_id]
            self.engines[sequence.worker].kv_arrived(sequence)
        self._follow_tiers()

    # What plots show.

    def _watch(self, period_s: float) -> None:
        engines = self.engines
        if len(self._timeline) == 2 * MOMENTS:
            del self._timeline[1::2]
            period_s *= 2
        self._timeline.append(
            Moment(
                at_s=self.env.now,
                waiting=sum(engine.waiting for engine in engines) + len(self._held),
                running=sum(engine.running for engine in engines),
                device_blocks=sum(engine.pools.device_held for engine in engines),
                host_blocks=sum(engine.pools.host_held for engine in engines),
                tiers={} if self.reuse is None else self.reuse.levels(),
            )
        )
        if self._ended_count < len(self._requests):
            Call(self.env, period_s, lambda: self._watch(period_s), priority=ARRIVAL)
