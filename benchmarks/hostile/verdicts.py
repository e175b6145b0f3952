"""How a server took hostile calls: counted by kind and outcome; what must not be is kept in words."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

KEPT_FAULTS = 40


@dataclass
class Verdicts:
    """Of all calls so far."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    """Kind of call, then outcome, then how often."""
    faults: list[str] = field(default_factory=list)
    """Outcomes that must not be."""

    def note(self, kind: str, outcome: str, *, fault: str = "") -> None:
        """Count a call; `fault` says what was sent where the outcome must not be."""
        self.outcomes.setdefault(kind, Counter())[outcome] += 1
        if fault and len(self.faults) < KEPT_FAULTS:
            self.faults.append(f"{kind}: {outcome} to {fault[:1000]}")

    @property
    def calls(self) -> int:
        return sum(sum(counter.values()) for counter in self.outcomes.values())
