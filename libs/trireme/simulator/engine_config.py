"""How large a simulated engine is, and what it does with KV that must make room."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from trireme.errors import InvalidConfiguration


class Swapping(enum.Enum):
    """What happens to the KV of a preempted sequence whose blocks are needed."""

    PROACTIVE = "proactive"
    """Copied to the host while the engine computes, ahead of need."""
    REACTIVE = "reactive"
    """Copied to the host while the engine waits."""
    RECOMPUTE = "recompute"
    """Dropped, and computed again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Sizes of one engine.

    Raises:
        InvalidConfiguration: a value is out of range.
    """

    num_blocks: int = 4096
    """KV blocks on the device."""
    host_blocks: int = 0
    """KV blocks for swapped-out sequences."""
    block_tokens: int = 16
    max_sequences: int = 32
    token_budget: int = 512
    """Tokens of one iteration."""
    watermark: float = 0.01
    max_passes: int = 64
    swapping: Swapping = Swapping.PROACTIVE
    fast_forward: bool = True

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_tokens", "max_sequences"):
            if getattr(self, name) < 1:
                raise InvalidConfiguration(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.host_blocks < 0 or not 0 <= self.watermark < 1:
            raise InvalidConfiguration("host_blocks must not be negative and watermark be in [0, 1)")
        if self.token_budget < self.max_sequences:
            raise InvalidConfiguration(
                f"token_budget is {self.token_budget}; every one of {self.max_sequences} sequences must get "
                "a token per iteration"
            )
