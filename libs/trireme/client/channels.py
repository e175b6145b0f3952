"""Which gateway to call, and how."""

from __future__ import annotations

import random
from collections.abc import Sequence

from trireme.errors import InvalidConfiguration

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", 16 * 2**20),
    ("grpc.max_send_message_length", 16 * 2**20),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.enable_retries", 0),
    # A gateway that comes back is tried again soon.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]

_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0


class Addresses:
    """Gateways in turn; the one that answered last is asked first."""

    def __init__(self, addresses: Sequence[str]) -> None:
        """Raises InvalidConfiguration: there is none."""
        if isinstance(addresses, str) or not addresses:
            raise InvalidConfiguration("give a list with at least one gateway address", param="addresses")
        self._addresses = list(addresses)
        self._position = random.randrange(len(self._addresses))
        self._failures = 0

    @property
    def current(self) -> str:
        """The gateway to call."""
        return self._addresses[self._position]

    def advance(self, failed: str) -> float:
        """`failed` did not answer: ask the next one; returns the seconds to wait first.

        There is no wait until all were tried. Of many calls that lose one gateway together, the
        first moves on and the others follow.
        """
        if failed == self.current:
            self._position = (self._position + 1) % len(self._addresses)
            self._failures += 1
        rounds = self._failures // len(self._addresses)
        if rounds == 0:
            return 0.0
        longest_s: float = min(_LONGEST_PAUSE_S, _PAUSE_S * 2 ** min(rounds, 10))
        return longest_s * random.uniform(0.5, 1.0)

    def answered(self, address: str) -> None:
        """This gateway works."""
        if address == self.current:
            self._failures = 0
