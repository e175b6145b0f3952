"""Which worker, which variant, which queue: least expected finish time.

Pure. The scheduler and the simulator call `choose_worker` with equal arguments and get
equal decisions. An estimate is the sum of three parts: the wait for a slot behind what
is assigned already, the prompt tokens that no cache holds, and the answer tokens at the
speed that the worker's batch allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

UNMEASURED_PREFILL_TOKENS_PER_S = 2000.0
UNMEASURED_DECODE_TOKENS_PER_S = 100.0
"""Stand in until a worker has measured itself; equal for all, so they only set the scale."""
SLOWEST_TOKENS_PER_S = 1e-3
"""What a worker reports below this counts as this: times stay finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedRequest:
    """What routing needs to know of a request."""

    request_id: str
    prompt_tokens: int
    expected_answer_tokens: float
    """Per choice."""
    choices: int
    urgency: int
    """0 interactive, 1 standard, 2 batch."""
    avoid_worker_ids: frozenset[str] = frozenset()
    """Workers that just failed it; used only where nobody else is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One variant on one worker, as the scheduler sees it now."""

    worker_id: str
    variant: str
    assigned_requests: int
    """Assigned and not ended, by all schedulers, on the whole worker."""
    assigned_tokens: int
    """Upper estimate of their prompt and answer tokens."""
    running: int
    """Sequences in its batch when it last reported."""
    max_sequences: int
    queue_limit: int
    """Requests it may hold beyond its batch, so that it never idles between assignments."""
    prefill_tokens_per_s: float
    """0: not measured yet."""
    decode_tokens_per_s: float
    """Of one sequence in the present batch; 0: not measured yet."""
    cached_tokens: int
    """Leading prompt tokens of this request whose KV it holds."""
    preemptive: bool = False
    """Long requests make way for short ones there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Expected seconds for one request on one worker."""

    worker_id: str
    variant: str
    queue_s: float
    prefill_s: float
    decode_s: float
    cached_tokens: int

    @property
    def finish_s(self) -> float:
        return self.queue_s + self.prefill_s + self.decode_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Where a request goes, and why."""

    worker_id: str
    variant: str
    initial_queue: int
    cached_tokens: int
    reason: str
    estimates: tuple[Estimate, ...]
    """All candidates, best first."""


def estimate(request: RoutedRequest, view: WorkerView) -> Estimate:
    """Expected times of `request` on one worker."""
    prefill_rate = _rate(view.prefill_tokens_per_s, UNMEASURED_PREFILL_TOKENS_PER_S)
    decode_rate = _rate(view.decode_tokens_per_s, UNMEASURED_DECODE_TOKENS_PER_S)
    # A batch that grows slows each of its sequences; the worst case is in proportion.
    batch = min(view.assigned_requests + request.choices, view.max_sequences)
    slowdown = max(1.0, batch / max(1, view.running))
    sequence_rate = decode_rate / slowdown
    # Those beyond the batch wait until enough of the batch has ended.
    ahead = max(0, view.assigned_requests + request.choices - view.max_sequences)
    mean_tokens = view.assigned_tokens / max(1, view.assigned_requests)
    uncached = max(1, request.prompt_tokens - view.cached_tokens)
    if view.preemptive:
        # Before this one ends, each of those ahead gets no more service than it needs itself.
        mean_tokens = min(mean_tokens, uncached + request.expected_answer_tokens * request.choices)
    queue_s = ahead * mean_tokens / (sequence_rate * view.max_sequences)
    return Estimate(
        worker_id=view.worker_id,
        variant=view.variant,
        queue_s=queue_s,
        prefill_s=uncached / prefill_rate,
        decode_s=request.expected_answer_tokens / sequence_rate,
        cached_tokens=view.cached_tokens,
    )


def _rate(measured_per_s: float, unmeasured_per_s: float) -> float:
    return max(measured_per_s, SLOWEST_TOKENS_PER_S) if measured_per_s > 0 else unmeasured_per_s


def has_room(view: WorkerView) -> bool:
    """Whether the worker may be given one more request."""
    return view.assigned_requests < view.max_sequences + view.queue_limit


def choose_worker(request: RoutedRequest, views: Sequence[WorkerView]) -> Choice | None:
    """The worker with the least expected finish time, or None while nobody has room.

    A worker to be avoided is not considered while there is any other, with room or not: it may be
    dead already, and waiting for room costs less than finding that out.

    Ties go to fewer assigned requests, then to a hash of (request, worker), which spreads
    them evenly and repeats itself.
    """
    preferred = [view for view in views if view.worker_id not in request.avoid_worker_ids]
    considered = [view for view in preferred or views if has_room(view)]
    if not considered:
        return None
    ranked = sorted(
        ((estimate(request, view), view) for view in considered),
        key=lambda pair: (
            round(pair[0].finish_s, 6),
            pair[1].assigned_requests,
            _spread(request.request_id, pair[1].worker_id),
        ),
    )
    best, view = ranked[0]
    reason = (
        f"least finish time {best.finish_s:.3f} s of {len(considered)}: queue {best.queue_s:.3f}, "
        f"prefill {best.prefill_s:.3f} ({best.cached_tokens} of {request.prompt_tokens} tokens cached), "
        f"decode {best.decode_s:.3f}; {view.assigned_requests} assigned there"
    )
    return Choice(
        worker_id=best.worker_id,
        variant=best.variant,
        initial_queue=request.urgency,
        cached_tokens=best.cached_tokens,
        reason=reason,
        estimates=tuple(pair[0] for pair in ranked),
    )


def _spread(request_id: str, worker_id: str) -> bytes:
    return blake2b(f"{request_id}/{worker_id}".encode(), digest_size=8).digest()
