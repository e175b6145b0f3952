"""Fair sharing between tenants by virtual token counters.

Pure. Each tenant's counter grows by the weighted tokens it was served, over the tenant's own
weight; the waiting tenant with the smallest counter goes next, so a tenant that floods the fleet
waits behind itself, and tenants that always wait are served in proportion to their weights.
The order is work conserving: somebody is always next.

Source: Sheng et al., Fairness in Serving Large Language Models, OSDI 2024 (VTC, algorithm 2, and its
weighted variant).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

PROMPT_WEIGHT = 1.0
ANSWER_WEIGHT = 2.0
"""An answer token costs about an iteration; a prompt token shares one with its chunk."""

PROMOTION_S = (0.0, 20.0, 120.0)
"""Wait after which a request of each class (interactive, standard, batch) counts as interactive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A request as the order sees it."""

    request_id: str
    tenant: str
    urgency: int
    """0 interactive, 1 standard, 2 batch."""
    priority: int
    """Higher goes first within a tenant and an urgency."""
    admitted_s: float


def cost(*, prompt_tokens: int, answer_tokens: int, tenant_weight: float = 1.0) -> float:
    """Weighted tokens, as they count for a tenant: one of weight 2 is charged half."""
    return (PROMPT_WEIGHT * prompt_tokens + ANSWER_WEIGHT * answer_tokens) / tenant_weight


def lift(counters: Mapping[str, float], *, tenant: str, active: Iterable[str]) -> float:
    """The counter with which `tenant` joins the queue after an absence.

    An absent tenant saves up no credit: it starts no lower than the smallest counter of
    the tenants that wait or run now.
    """
    own = counters.get(tenant, 0.0)
    others = [counters.get(name, 0.0) for name in active if name != tenant]
    return max(own, min(others)) if others else own


def order_key(
    waiting: Waiting, *, counters: Mapping[str, float], now_s: float
) -> tuple[int, float, int, float, str]:
    """Sorts who goes next: urgency (with promotion), fair share, priority, age."""
    waited_s = now_s - waiting.admitted_s
    urgency = 0 if waited_s >= PROMOTION_S[waiting.urgency] else waiting.urgency
    counter = counters.get(waiting.tenant, 0.0)
    return (urgency, counter, -waiting.priority, waiting.admitted_s, waiting.request_id)
