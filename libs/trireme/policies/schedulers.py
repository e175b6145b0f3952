"""The iteration schedulers by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from trireme.errors import InvalidConfiguration
from trireme.policies.arrival_order import ArrivalOrderScheduler
from trireme.policies.iteration import IterationScheduler, Job
from trireme.policies.iteration_profile import IterationProfile
from trireme.policies.known_order import KnownOrderScheduler
from trireme.policies.mlfq import MlfqScheduler, MlfqSettings

LIVE_POLICIES = ("fcfs", "priority", "mlfq")
"""What a worker can be configured to use."""
POLICIES = (*LIVE_POLICIES, "naive", "fixed", "srpt")
"""All: those of a worker and those that they are compared with."""
PREEMPTIVE_POLICIES = frozenset({"mlfq", "naive", "srpt"})
"""A long request that runs does not hold up the short ones that come after it."""


def make_scheduler(
    policy: str,
    profile: IterationProfile | None = None,
    *,
    settings: MlfqSettings | None = None,
    remaining: Callable[[str], float] | None = None,
) -> IterationScheduler:
    """A new scheduler.

    Args:
        policy: one of POLICIES.
        profile: for mlfq and naive; None: all jobs join level 1, and are counted.
        settings: of mlfq and naive; srpt and fixed look at `proactive`.
        remaining: for srpt: time, or tokens, that a sequence still needs to its end, by its id.

    Raises:
        InvalidConfiguration: there is no such policy, or srpt is not told what remains.
    """
    settings = settings or MlfqSettings()
    match policy:
        case "fcfs":
            return ArrivalOrderScheduler(by_priority=False)
        case "priority":
            return ArrivalOrderScheduler(by_priority=True)
        case "mlfq":
            return MlfqScheduler(profile, settings)
        case "naive":
            return MlfqScheduler(profile, replace(settings, skip_join=False))
        case "fixed":
            return KnownOrderScheduler(_input_tokens, proactive=settings.proactive)
        case "srpt":
            if remaining is None:
                raise InvalidConfiguration("srpt must be told what remains of each sequence", param="policy")
            known = remaining
            return KnownOrderScheduler(lambda job: known(job.sequence_id), proactive=settings.proactive)
    raise InvalidConfiguration(
        f"policy is {policy!r}; it must be one of {', '.join(POLICIES)}", param="policy"
    )


def _input_tokens(job: Job) -> float:
    return job.new_tokens + job.cached_tokens
