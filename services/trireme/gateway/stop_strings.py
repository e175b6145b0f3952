"""Find stop strings in text that comes in pieces, whatever the pieces' borders.

The match is the one that ends first; of two that end together, the one that starts first. What
could still become a match is held back, so no character of a stop string is ever shown.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Watches one answer for its stop strings."""

    __slots__ = ("_firsts", "_held", "_longest", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._firsts = frozenset(stop[0] for stop in stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that may be shown now, and the stop string that matched, if one did."""
        text = self._held + text
        best: tuple[int, int] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best):
                best = (start + len(stop), start)
        if best is not None:
            end, start = best
            self._held = ""
            return text[:start], text[start:end]
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._firsts:
                rest = text[start:]
                if any(stop.startswith(rest) for stop in self._stops):
                    self._held = rest
                    return text[:start], None
        self._held = ""
        return text, None

    def finish(self) -> str:
        """What was held back and did not become a match."""
        held, self._held = self._held, ""
        return held
