"""What the movement of KV has come to since the engine was built."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class KvCounters:
    """Counted on the engine's thread, when a copy is over."""

    swapped_out_blocks: int = 0
    """Copied from device to host; what the host still had was not copied again."""
    swapped_in_blocks: int = 0
    swap_out_bytes: int = 0
    swap_in_bytes: int = 0
    swap_out_s: float = 0.0
    """Time of the copies, which run beside the steps."""
    swap_in_s: float = 0.0
    lost_sequences: int = 0
    """Whose KV a copy lost: computed again."""
    context_cuts: int = 0
    """Times that a sequence lost its oldest tokens while it was answered."""
    rerotated_blocks: int = 0
    """Whose keys were turned to other positions instead of being computed."""
    preload_blocks: int = 0
    preload_corrupt: int = 0
    """Payloads that were short or had another checksum; each cut its prefix off."""
