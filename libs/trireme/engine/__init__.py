"""The step loop: sequences, batches, paged KV, sampling.

Invariant: what a sequence gets does not depend on who runs beside it. Batching, chunking,
prefix reuse, preemption and a neighbour's failure change when a token comes, never which.
"""

from trireme.engine.builder import build
from trireme.engine.encoder_engine import EncoderEngine
from trireme.engine.engine import Engine
from trireme.engine.kv_copies import Link
from trireme.engine.outputs import (
    EmbeddingOutput,
    EngineStats,
    FinishReason,
    ScoreOutput,
    SequenceWork,
    StepResult,
    TokenOutput,
)
from trireme.engine.request import Mode, SequenceRequest, Truncation
from trireme.engine.sampling_params import SamplingParams
from trireme.engine.settings import EngineSettings
from trireme.engine.stored_blocks import SavedBlock, StoredBlock
from trireme.engine.tier import KvTier

__all__ = [
    "EmbeddingOutput",
    "EncoderEngine",
    "Engine",
    "EngineSettings",
    "EngineStats",
    "FinishReason",
    "KvTier",
    "Link",
    "Mode",
    "SamplingParams",
    "SavedBlock",
    "ScoreOutput",
    "SequenceRequest",
    "SequenceWork",
    "StepResult",
    "StoredBlock",
    "TokenOutput",
    "Truncation",
    "build",
]
