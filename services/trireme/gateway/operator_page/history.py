"""The last hour of a few numbers, in memory: enough for a curve, and bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

SPAN_S = 3600.0
PERIOD_S = 5.0


class History:
    """Samples of the last hour, one every PERIOD_S."""

    def __init__(self) -> None:
        self._samples: deque[dict[str, float]] = deque(maxlen=int(SPAN_S / PERIOD_S))
        self._before: tuple[float, float] | None = None
        """(when, decode tokens) of the sample before."""

    def add(self, at_unix_s: float, totals: Mapping[str, float]) -> None:
        """Keep a look at the fleet.

        Args:
            totals: see `fleet_picture.totals`; decode_tokens becomes a rate, which is 0 where the count fell,
                as it does when a worker starts anew.
        """
        tokens, rate = totals["decode_tokens"], 0.0
        if self._before is not None and at_unix_s > self._before[0]:
            rate = max(0.0, tokens - self._before[1]) / (at_unix_s - self._before[0])
        self._before = at_unix_s, tokens
        kept = {name: value for name, value in totals.items() if name != "decode_tokens"}
        self._samples.append({"at_unix_s": at_unix_s, "tokens_per_s": rate, **kept})

    def since(self, at_unix_s: float) -> list[dict[str, float]]:
        """The samples after a moment, oldest first."""
        return [sample for sample in self._samples if sample["at_unix_s"] > at_unix_s]
