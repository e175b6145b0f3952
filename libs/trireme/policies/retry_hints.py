"""When refused clients should come back: not before there is room, and not all at once.

Pure bookkeeping. Room that was promised to one refused client is not promised to the next: each
hint of a tenant lies behind the one before it by what the refused request itself will take of the
tenant's part of the fleet. So of many clients that obey, about as many come back as are served.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LONGEST_S = 60.0
"""Clients of OpenAI's library do not wait for a hint beyond two minutes."""
JITTER = 0.1
"""Share of a hint that is added at random."""
MAX_TENANTS = 4096


@dataclass(slots=True)
class RetryHints:
    """The promises of one gateway."""

    shortest_s: float
    """No hint is shorter."""
    _promised_until_s: dict[str, float] = field(default_factory=dict)

    def next(self, tenant: str, *, room_in_s: float, takes_s: float, now_s: float, draw: float) -> float:
        """Seconds until this tenant's client should come back.

        Args:
            room_in_s: when there is room for it, if nobody else comes.
            takes_s: how long the tenant's part of the fleet works on such a request.
            draw: uniform in 0..1.
        """
        promised_s = self._promised_until_s.pop(tenant, now_s) - now_s
        hint_s = max(room_in_s, promised_s, self.shortest_s)
        until_s = now_s + min(hint_s, LONGEST_S) + min(takes_s, LONGEST_S)
        # Kept in the order of use: the tenants that were refused longest ago are forgotten first.
        self._promised_until_s[tenant] = min(until_s, now_s + LONGEST_S)
        if len(self._promised_until_s) > MAX_TENANTS:
            del self._promised_until_s[next(iter(self._promised_until_s))]
        return min(LONGEST_S, hint_s * (1.0 + JITTER * draw))
