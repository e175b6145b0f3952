"""From names and numbers, as the command line and the benchmarks give them, to simulations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trireme.errors import InvalidConfiguration
from trireme.policies.iteration import IterationScheduler
from trireme.policies.kv_tiering import Capacity
from trireme.policies.mlfq import MlfqSettings
from trireme.policies.schedulers import POLICIES, PREEMPTIVE_POLICIES, make_scheduler
from trireme.simulator import operators, traces, workloads
from trireme.simulator.engine_config import Swapping
from trireme.simulator.engine_model import EngineModel, from_file
from trireme.simulator.fleet import Fleet, FleetConfig, RemainingS
from trireme.simulator.kv_tiers import LOOK_AHEAD, LRU, KvTiers, TierSpec
from trireme.simulator.requests import Request, rescaled
from trireme.simulator.result import Result
from trireme.simulator.reuse import KvReuse, TierReuse

GENERATED_REQUESTS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSpec:
    """Which requests come when."""

    trace: str
    """A name of `traces.SHIPPED`, of `workloads.MIXES`, or a file."""
    requests: int | None = None
    """Of a trace, the first ones; of a mix, so many. None: all of a trace."""
    rate_rps: float | None = None
    cv: float | None = None
    """Draw the gaps anew, with this coefficient of variation; None: a trace's own."""
    prompt_factor: float = 1.0
    answer_factor: float = 1.0
    sessions_per_s: float = 0.1
    is_closed: bool = False
    seed: int = 0


def workload_of(spec: WorkloadSpec) -> list[Request]:
    """The requests.

    Raises:
        InvalidConfiguration: there is no such trace, it is malformed, or numbers contradict each other.
    """
    for name, value in (
        ("--rate", spec.rate_rps),
        ("--cv", spec.cv),
        ("--sessions-per-s", spec.sessions_per_s),
    ):
        if value is not None and not value > 0:
            raise InvalidConfiguration(f"{name} is {value}; it must be positive", param=name)
    mix = workloads.MIXES.get(spec.trace)
    if mix is not None or spec.cv is not None:
        if spec.rate_rps is None:
            raise InvalidConfiguration("generated arrivals need a --rate", param="--rate")
        lengths: workloads.Lengths
        if mix is not None:
            lengths, count = mix, spec.requests or GENERATED_REQUESTS
        else:
            recorded = traces.read(traces.find(spec.trace))
            lengths, count = workloads.sampled_lengths(recorded), spec.requests or len(recorded)
        requests = workloads.generate(
            count=count, rate_rps=spec.rate_rps, lengths=lengths, seed=spec.seed, cv=spec.cv or 1.0
        )
        return rescaled(requests, prompt_factor=spec.prompt_factor, answer_factor=spec.answer_factor)
    requests = traces.read(
        traces.find(spec.trace),
        limit=spec.requests,
        sessions_per_s=spec.sessions_per_s,
        closed=spec.is_closed,
        seed=spec.seed,
    )
    return rescaled(
        requests,
        rate_rps=spec.rate_rps,
        prompt_factor=spec.prompt_factor,
        answer_factor=spec.answer_factor,
    )


def model_of(name: str) -> EngineModel:
    """A published GPU's model, or that of a measured profile's file.

    Raises:
        InvalidConfiguration: it is neither.
    """
    return from_file(Path(name)) if Path(name).is_file() else operators.published(name)


def policies_of(policy: str, compare: str) -> tuple[str, ...]:
    """All named policies once, those to compare with first.

    Raises:
        InvalidConfiguration: one is unknown.
    """
    named = [name.strip() for name in compare.split(",") if name.strip()]
    names = tuple(dict.fromkeys([*named, policy]))
    for name in names:
        if name not in POLICIES:
            raise InvalidConfiguration(
                f"there is no policy {name!r}: give some of {', '.join(POLICIES)}", param="--policy"
            )
    return names


def simulate(
    requests: Sequence[Request],
    config: FleetConfig,
    model: EngineModel,
    policy: str,
    *,
    settings: MlfqSettings | None = None,
    reuse: KvReuse | None = None,
) -> Result:
    """Play the requests under one policy.

    Args:
        policy: a name of `schedulers.POLICIES`.
        settings: of mlfq and naive. Whether KV moves ahead of need follows `config`.
        reuse: what caches and tiers give; it is used up by this run.

    Raises:
        InvalidConfiguration: there is no such policy, or a request can never fit the device.
    """
    engine = config.engine
    is_proactive = engine.swapping is Swapping.PROACTIVE
    settings = replace(settings or MlfqSettings(), proactive=is_proactive)
    profile = model.profile()

    def scheduler_of(remaining: RemainingS) -> IterationScheduler:
        return make_scheduler(policy, profile, settings=settings, remaining=remaining)

    is_preemptive = policy in PREEMPTIVE_POLICIES
    return Fleet(requests, config, model, scheduler_of, is_preemptive=is_preemptive, reuse=reuse).run()


def tiers_of(
    requests: Sequence[Request],
    model: EngineModel,
    *,
    dram_gb: float,
    ssd_gb: float,
    disk_gb_per_s: float,
    sees_queue: bool = True,
) -> KvReuse | None:
    """DRAM and SSD behind the workers, for one simulation; None where there is no DRAM.

    Args:
        sees_queue: fetch and evict by looking ahead in the queue; else least recently used.

    Raises:
        InvalidConfiguration: a size is negative, the disk has no speed, or the trace names no prefix blocks.
    """
    if dram_gb < 0 or ssd_gb < 0 or disk_gb_per_s <= 0:
        raise InvalidConfiguration(
            "tiers must not be smaller than 0 and the disk must have a speed", param="--dram-gb"
        )
    if not dram_gb:
        return None
    if not all(request.block_tokens for request in requests) or not model.kv_bytes_per_token:
        raise InvalidConfiguration(
            "tiers need a trace that names prefix blocks (mooncake-conversation, agentic) and a profile that "
            "tells the bytes of a token's KV",
            param="--dram-gb",
        )
    spec = TierSpec(
        capacity=Capacity(dram_bytes=int(1e9 * dram_gb), ssd_bytes=int(1e9 * ssd_gb)),
        disk_read_bytes_s=1e9 * disk_gb_per_s,
        disk_write_bytes_s=1e9 * disk_gb_per_s,
    )
    return TierReuse(requests, KvTiers(spec, LOOK_AHEAD if sees_queue else LRU), model)


def facts_of(
    requests: Sequence[Request], config: FleetConfig, model: EngineModel, *, trace: str, seed: int
) -> dict[str, str]:
    """What a report says of its simulations."""
    engine = config.engine
    span_s = requests[-1].arrival_s - requests[0].arrival_s
    rate = (len(requests) - 1) / span_s if span_s else math.inf
    prompt = sum(request.prompt_tokens for request in requests) / len(requests)
    answer = sum(request.answer_tokens for request in requests) / len(requests)
    alone_s, full_s = model.decode_s(1, 512), model.decode_s(engine.max_sequences, 512)
    return {
        "requests": f"{len(requests):,} of {trace}, {rate:.3g} per second over {span_s:,.0f} s",
        "tokens": f"prompts {prompt:,.0f}, answers {answer:,.0f} on average",
        "engine": f"{model.name}: a decode iteration at 512 tokens of context takes "
        f"{1e3 * alone_s:.2f} ms for one sequence, {1e3 * full_s:.2f} ms for {engine.max_sequences}",
        "workers": f"{config.workers}, at most {engine.max_sequences} sequences and {engine.token_budget:,} "
        "tokens per iteration",
        "KV": f"{engine.num_blocks:,} blocks of {engine.block_tokens} tokens on the device, "
        f"{engine.host_blocks:,} on the host, {engine.swapping.value} swapping over "
        f"{model.link_bytes_per_s / 1e9:.3g} GB/s",
        "seed": str(seed),
    }
