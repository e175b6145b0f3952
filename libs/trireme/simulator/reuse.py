"""What caches and lower tiers give a request: the face that the fleet asks, and the one without any."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from trireme.simulator.requests import Request


class Reuse(NamedTuple):
    """Leading prompt tokens that need not be computed."""

    tokens: int
    stall_s: float
    """Wait for their keys and values that computing the rest does not hide."""


class KvReuse(Protocol):
    """Remembers what workers and tiers hold. Times never go back."""

    def resident_tokens(self, request: Request, *, worker: int) -> int:
        """What routing is told that the worker holds."""

    def arrived(self, request: Request, *, worker: int, now_s: float) -> Reuse:
        """The request waits at a worker: what it will find, by what is known now."""

    def started(self, request: Request, *, worker: int, now_s: float) -> Reuse:
        """Its first iteration begins: what it finds."""

    def ended(self, request: Request, *, worker: int, now_s: float) -> None:
        """It has its answer: prompt and answer can be found from now on."""

    def levels(self) -> dict[str, int]:
        """Bytes by tier, for plots."""


class _NoReuse:
    """Every prompt is computed."""

    def resident_tokens(self, request: Request, *, worker: int) -> int:
        return 0

    def arrived(self, request: Request, *, worker: int, now_s: float) -> Reuse:
        return Reuse(0, 0.0)

    def started(self, request: Request, *, worker: int, now_s: float) -> Reuse:
        return Reuse(0, 0.0)

    def ended(self, request: Request, *, worker: int, now_s: float) -> None:
        return None

    def levels(self) -> dict[str, int]:
        return {}


NO_REUSE: KvReuse = _NoReuse()
