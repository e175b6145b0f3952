"""Whether a request may join the queue; when to come back where it may not.

Pure. The queue is served by urgency, and within one urgency tenants take turns by tokens
(`fair_sharing`). So what is served before a newcomer is everything more urgent, its tenant's own
backlog, and of each other tenant's backlog no more than its own tenant gets, times the other's
weight over its own: who floods the queue waits behind itself. A request whose expected wait exceeds
what its class allows is refused at once, which costs it nothing but the call; waiting in vain would
cost the time as well.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

from trireme.policies.brown_out import FALL_S, Level

BATCH_URGENCY = 2
RESERVED_SHARE = 1 / 8
"""Of the queue's places: the last ones are for tenants that hold less than their part."""


class Refusal(enum.Enum):
    """Why a request was refused."""

    NO_WORKER = "no_worker"
    """Its model has not been served for longer than its class may wait."""
    QUEUE_FULL = "queue_full"
    TENANT_SHARE = "tenant_share"
    """The queue is nearly full, and its tenant holds its part of it."""
    BROWN_OUT = "brown_out"
    """What it asks for is given up at the present brown-out level."""
    FIRST_TOKEN_GOAL = "first_token_goal"
    """Its first token would come later than its class allows."""
    DEADLINE = "deadline"
    """Its answer would end after its own deadline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """What one tenant has waiting at one urgency, for one model."""

    tenant: str
    urgency: int
    """0 interactive, 1 standard, 2 batch."""
    requests: int
    tokens: float
    """Expected prompt and answer tokens."""
    weight: float = 1.0
    """The tenant's: its part of the fleet over that of a tenant of weight 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueView:
    """One model's queue now, and how fast it empties."""

    backlogs: Sequence[Backlog]
    tokens_per_s: float
    """What leaves it while somebody waits; 0: nothing can."""
    mean_tokens: float
    """Of a request that leaves it."""
    free_places: int = 0
    """Sequences that its workers could run beside those that they have."""
    handed_over_tokens: float = 0.0
    """At workers, but not started."""
    outage_s: float = 0.0
    """Since when nobody serves the model, or nothing leaves the queue; 0: it is served."""
    fleet_requests: int = 0
    """Waiting for all models."""
    fleet_weight: float = 1.0
    """Of the tenants that wait, for any model, and of the one that asks."""
    tenant_requests: int = 0
    """Waiting for all models, of the tenant that asks."""
    level: Level = Level.NORMAL


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request, as admission sees it."""

    tenant: str
    urgency: int
    tokens: float
    """Expected prompt and answer tokens."""
    first_token_s: float
    """How long its class may wait for the first token."""
    serve_s: float = 0.0
    """From its start to its end, expected."""
    remaining_s: float = math.inf
    """Until its own deadline."""
    weight: float = 1.0
    """Its tenant's."""
    extras: bool = False
    """Asks for several choices or for log-probabilities."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The decision, and what it rests on."""

    refusal: Refusal | None
    reason: str
    wait_s: float
    """Expected until the first token."""
    retry_after_s: float = 0.0
    """Of a refused request: when there is room for it, if nobody else comes."""
    most_tokens: float = math.inf
    """Of an admitted one: the largest backlog of its tenant at its urgency that it may join."""


def share_of_queue(max_requests: int, *, weight: float, fleet_weight: float) -> int:
    """Requests that a tenant may hold of a nearly full queue; a part of weight 1 is a newcomer's."""
    return max(1, math.floor(max_requests * weight / (fleet_weight + 1.0)))


def shared_from(max_requests: int) -> int:
    """From so many waiting requests on, tenants that hold their share are refused."""
    return max_requests - int(max_requests * RESERVED_SHARE)


def tokens_ahead(ask: Ask, queue: QueueView) -> float:
    """Tokens that are served before the request starts; none where a place is free for it."""
    if sum(backlog.requests for backlog in queue.backlogs) < queue.free_places:
        return 0.0
    own = sum(b.tokens for b in queue.backlogs if b.tenant == ask.tenant and b.urgency == ask.urgency)
    ahead = queue.handed_over_tokens + own
    for backlog in queue.backlogs:
        if backlog.urgency < ask.urgency:
            ahead += backlog.tokens
        elif backlog.urgency == ask.urgency and backlog.tenant != ask.tenant:
            ahead += min(backlog.tokens, (own + ask.tokens) * backlog.weight / ask.weight)
    return ahead


def decide(ask: Ask, queue: QueueView, *, max_requests: int) -> Verdict:
    """Admit or refuse, with the reason in one line."""
    if queue.outage_s > 0.0 or queue.tokens_per_s <= 0.0:
        return _decide_unserved(ask, queue, max_requests)
    rate = queue.tokens_per_s
    ahead = tokens_ahead(ask, queue)
    wait_s = ahead / rate
    one_s = max(queue.mean_tokens, 1.0) / rate
    full = _full(ask, queue, max_requests, wait_s=wait_s, one_s=one_s)
    if full is not None:
        return full
    browned = _browned_out(ask, queue.level, wait_s)
    if browned is not None:
        return browned
    if wait_s > ask.first_token_s:
        return Verdict(
            refusal=Refusal.FIRST_TOKEN_GOAL,
            reason=f"the first token would come in {wait_s:.1f} s: {ahead:.0f} tokens are ahead and "
            f"{rate:.0f} are served per second, and its class may wait {ask.first_token_s:g} s",
            wait_s=wait_s,
            retry_after_s=wait_s - ask.first_token_s,
        )
    if wait_s + ask.serve_s > ask.remaining_s:
        return Verdict(
            refusal=Refusal.DEADLINE,
            reason=f"the answer would end in {wait_s + ask.serve_s:.1f} s, after the request's deadline "
            f"in {max(0.0, ask.remaining_s):.1f} s",
            wait_s=wait_s,
            retry_after_s=max(0.0, wait_s + ask.serve_s - max(0.0, ask.remaining_s)),
        )
    return Verdict(
        refusal=None,
        reason=f"the first token is expected in {wait_s:.1f} s of {ask.first_token_s:g} s",
        wait_s=wait_s,
        most_tokens=_most_tokens(ask, queue, ahead),
    )


def pressure(queue: QueueView, *, first_token_s: Sequence[float]) -> float:
    """The longest expected wait of interactive and standard work over what its class may wait."""
    if queue.outage_s > 0.0 or queue.tokens_per_s <= 0.0:
        return 0.0  # Nothing that could be given up would bring a worker back.
    if sum(backlog.requests for backlog in queue.backlogs) < queue.free_places:
        return 0.0
    worst, tokens = 0.0, queue.handed_over_tokens
    for urgency in range(BATCH_URGENCY):
        tokens += sum(backlog.tokens for backlog in queue.backlogs if backlog.urgency == urgency)
        worst = max(worst, tokens / queue.tokens_per_s / first_token_s[urgency])
    return worst


def _decide_unserved(ask: Ask, queue: QueueView, max_requests: int) -> Verdict:
    # How long it lasts is not known: as long again as it has lasted is the best guess.
    wait_s = queue.outage_s
    full = _full(ask, queue, max_requests, wait_s=wait_s, one_s=wait_s)
    if full is not None:
        return full
    if wait_s > min(ask.first_token_s, ask.remaining_s):
        return Verdict(
            refusal=Refusal.NO_WORKER,
            reason=f"this model has not been served for {wait_s:.0f} s",
            wait_s=wait_s,
            retry_after_s=wait_s,
        )
    return Verdict(refusal=None, reason=f"waits for a worker since {wait_s:.0f} s", wait_s=wait_s)


def _full(ask: Ask, queue: QueueView, max_requests: int, *, wait_s: float, one_s: float) -> Verdict | None:
    waiting, held = queue.fleet_requests, queue.tenant_requests
    if waiting >= max_requests:
        return Verdict(
            refusal=Refusal.QUEUE_FULL,
            reason=f"{waiting} requests wait in the fleet, its limit",
            wait_s=wait_s,
            retry_after_s=(waiting - max_requests + 1) * one_s,
        )
    share = share_of_queue(max_requests, weight=ask.weight, fleet_weight=queue.fleet_weight)
    if waiting >= shared_from(max_requests) and held >= share:
        return Verdict(
            refusal=Refusal.TENANT_SHARE,
            reason=f"{waiting} requests wait in the fleet, and {held} of them are this tenant's, "
            f"whose share is {share}",
            wait_s=wait_s,
            # Its own requests leave in turn with the other tenants'.
            retry_after_s=(held - share + 1) * queue.fleet_weight / ask.weight * one_s,
        )
    return None


def _browned_out(ask: Ask, level: Level, wait_s: float) -> Verdict | None:
    if level >= Level.SHEDDING and ask.urgency >= BATCH_URGENCY:
        reason = "requests of the batch class are refused while the fleet is behind"
    elif level >= Level.ESSENTIAL and ask.extras:
        reason = "several choices and log-probabilities are refused while the fleet is behind: ask without"
    else:
        return None
    return Verdict(refusal=Refusal.BROWN_OUT, reason=reason, wait_s=wait_s, retry_after_s=max(FALL_S, wait_s))


def _most_tokens(ask: Ask, queue: QueueView, ahead: float) -> float:
    """The own backlog at which the wait is what the class allows, the others' being as they are."""
    own, others = 0.0, 0.0
    for backlog in queue.backlogs:
        if backlog.urgency != ask.urgency:
            continue
        if backlog.tenant == ask.tenant:
            own += backlog.tokens
    for backlog in queue.backlogs:
        if backlog.urgency == ask.urgency and backlog.tenant != ask.tenant:
            weight = backlog.weight / ask.weight
            others += weight if backlog.tokens > (own + ask.tokens) * weight else 0.0
    spare = ask.first_token_s * queue.tokens_per_s - ahead
    return own + spare / (1.0 + others)
