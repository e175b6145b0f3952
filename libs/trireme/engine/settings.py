"""What an engine is given when it is built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from trireme.errors import InvalidConfiguration
from trireme.policies.mlfq import MlfqSettings
from trireme.policies.schedulers import LIVE_POLICIES
from trireme.policies.speculation import SpeculationSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Raises InvalidConfiguration: a value is out of range."""

    num_blocks: int
    """KV blocks; `kv_cache.block_bytes` says what one costs."""
    host_blocks: int = 0
    """KV blocks in host memory that preempted sequences are swapped to; 0: they are computed again."""
    block_size: int = 16
    """Tokens per block: smaller shares more, larger costs less."""
    kv_dtype: Literal["auto", "bf16", "int8", "fp8"] = "auto"
    """What keys and values are stored as: see `kernels.kv_forms`."""
    max_num_seqs: int = 64
    """Sequences that run at once."""
    max_batch_tokens: int = 512
    """Tokens computed in one step: larger prefills faster, smaller lets others wait less."""
    max_model_len: int | None = None
    """Longest sequence, prompt and answer; None: what the model and the blocks allow."""
    policy: Literal["fcfs", "priority", "mlfq"] = "fcfs"
    """Who runs first: see `policies.schedulers`."""
    mlfq: MlfqSettings = field(default_factory=MlfqSettings)
    """Knobs of that policy."""
    watermark: float = 0.01
    """Share of the blocks that admission leaves free for running sequences to grow."""
    max_passes: int = 64
    """Steps in which smaller sequences may overtake a waiting one that does not fit."""
    admission_window: int = 32
    """Waiting sequences whose stored prefixes are loaded ahead of their turn."""
    prefix_cache: bool = True
    """Keep complete blocks of ended sequences and reuse them."""
    speculation: SpeculationSettings | None = None
    """Draft tokens and verify them in the same step; None: one token per sequence and step."""

    decode_graphs: bool = True
    """On a GPU, replay steps that only decode from captured graphs; elsewhere this says nothing."""

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_size", "max_num_seqs", "admission_window"):
            if getattr(self, name) < 1:
                raise InvalidConfiguration(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_batch_tokens < self.max_num_seqs:
            raise InvalidConfiguration(
                f"max_batch_tokens is {self.max_batch_tokens}; every one of {self.max_num_seqs} sequences "
                "(max_num_seqs) must get a token per step"
            )
        if self.max_model_len is not None and self.max_model_len < 2:
            raise InvalidConfiguration(f"max_model_len is {self.max_model_len}; it must be at least 2")
        if self.policy not in LIVE_POLICIES:
            raise InvalidConfiguration(
                f"policy is {self.policy!r}; it must be one of {', '.join(LIVE_POLICIES)}"
            )
        if not 0.0 <= self.watermark < 1.0:
            raise InvalidConfiguration(f"watermark is {self.watermark}; it must be in [0, 1)")
        for name in ("max_passes", "host_blocks"):
            if getattr(self, name) < 0:
                raise InvalidConfiguration(f"{name} is {getattr(self, name)}; it must not be negative")
