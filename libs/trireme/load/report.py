"""The figures of a run, under the names that the field's load generators use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from trireme.load.run import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Milliseconds over the successful requests; zeros where nothing was measured."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Goals:
    """A request is good when it meets all goals that are set, milliseconds."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One run. Throughputs are per second of the whole run."""

    requests: int
    failed: int
    errors: Mapping[str, int]
    duration_s: float
    prompt_tokens: int
    cached_prompt_tokens: int
    answer_tokens: int
    request_throughput: float
    output_throughput: float
    total_token_throughput: float
    goodput: float
    """Requests per second that met all goals."""
    ttft_ms: Distribution
    tpot_ms: Distribution
    itl_ms: Distribution
    e2e_ms: Distribution
    joules: float
    joules_per_token: float
    """Per answer token."""
    grams_co2e: float
    joules_per_1k_tokens: float
    """Per 1,000 prompt and answer tokens."""
    grams_co2e_per_1k_tokens: float
    pauses: int
    paused_s: float

    def as_json(self) -> dict[str, object]:
        """Plain values, for a file."""
        return asdict(self)


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of the ordered values lie, interpolated; 0 where there is none."""
    if not ordered:
        return 0.0
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def distribution(values_s: Sequence[float]) -> Distribution:
    """Milliseconds from seconds."""
    ordered = sorted(value * 1000 for value in values_s)
    mean = sum(ordered) / len(ordered) if ordered else 0.0
    p50, p90, p95, p99 = (percentile(ordered, share) for share in (0.5, 0.9, 0.95, 0.99))
    return Distribution(mean=mean, p50=p50, p90=p90, p95=p95, p99=p99, max=ordered[-1] if ordered else 0.0)


def summarise(run: Run, goals: Goals = Goals()) -> Report:
    """The figures of a run."""
    good = [outcome for outcome in run.outcomes if outcome.error is None]
    prompt_tokens = sum(outcome.prompt_tokens for outcome in good)
    answer_tokens = sum(outcome.answer_tokens for outcome in good)
    joules = sum(outcome.joules for outcome in good)
    grams = sum(outcome.grams_co2e for outcome in good)
    ttft_s = [outcome.ttft_s for outcome in good if outcome.ttft_s is not None]
    tpot_s = [outcome.tpot_s for outcome in good if outcome.tpot_s is not None]
    tokens = prompt_tokens + answer_tokens

    def meets(limit_ms: float | None, value_s: float | None) -> bool:
        return limit_ms is None or value_s is None or value_s * 1000 <= limit_ms

    met = [
        outcome
        for outcome in good
        if meets(goals.ttft_ms, outcome.ttft_s)
        and meets(goals.tpot_ms, outcome.tpot_s)
        and meets(goals.e2e_ms, outcome.e2e_s)
    ]
    return Report(
        requests=len(run.outcomes),
        failed=len(run.outcomes) - len(good),
        errors=dict(Counter(outcome.error for outcome in run.outcomes if outcome.error is not None)),
        duration_s=run.duration_s,
        prompt_tokens=prompt_tokens,
        cached_prompt_tokens=sum(outcome.cached_tokens for outcome in good),
        answer_tokens=answer_tokens,
        request_throughput=len(good) / run.duration_s,
        output_throughput=answer_tokens / run.duration_s,
        total_token_throughput=tokens / run.duration_s,
        goodput=len(met) / run.duration_s,
        ttft_ms=distribution(ttft_s),
        tpot_ms=distribution(tpot_s),
        itl_ms=distribution([gap for outcome in good for gap in outcome.gaps_s()]),
        e2e_ms=distribution([outcome.e2e_s for outcome in good]),
        joules=joules,
        joules_per_token=joules / answer_tokens if answer_tokens else 0.0,
        grams_co2e=grams,
        joules_per_1k_tokens=1000 * joules / tokens if tokens else 0.0,
        grams_co2e_per_1k_tokens=1000 * grams / tokens if tokens else 0.0,
        pauses=sum(outcome.pauses for outcome in good),
        paused_s=sum(outcome.paused_s for outcome in good),
    )
