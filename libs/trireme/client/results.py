"""What calls return, as plain values."""

from __future__ import annotations

from dataclasses import dataclass

from trireme.wire.inference.v1 import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request used."""

    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    engine_s: float
    """Seconds of engine time attributed to the request."""
    joules: float
    grams_co2e: float
    truncated_tokens: int = 0
    """Tokens that were dropped because the context was full."""


@dataclass(frozen=True, slots=True)
class LabelScore:
    """One label: the sum (or mean) of its tokens' log-probabilities, and its share of all labels."""

    label: str
    logprob: float
    probability: float


@dataclass(frozen=True, slots=True)
class Classification:
    """The labels, best first."""

    scores: tuple[LabelScore, ...]
    usage: Usage
    variant: str


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One unit-length vector per text, in order."""

    vectors: tuple[tuple[float, ...], ...]
    usage: Usage
    variant: str


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A name that can be asked for."""

    name: str
    variant_of: str
    """Empty for a model."""
    context_tokens: int
    vocabulary_size: int
    ready: bool
    created_unix_s: int


def usage_from(usage: pb.Usage) -> Usage:
    return Usage(
        usage.prompt_tokens,
        usage.cached_prompt_tokens,
        usage.completion_tokens,
        usage.engine_s,
        usage.joules,
        usage.grams_co2e,
        usage.truncated_tokens,
    )


def classification_from(response: pb.ClassifyResponse) -> Classification:
    scores = tuple(LabelScore(row.label, row.logprob, row.probability) for row in response.scores)
    return Classification(scores, usage_from(response.usage), response.variant)


def embeddings_from(response: pb.EmbedResponse) -> Embeddings:
    vectors = tuple(tuple(row.values) for row in response.embeddings)
    return Embeddings(vectors, usage_from(response.usage), response.variant)


def models_from(response: pb.ListModelsResponse) -> list[ModelInfo]:
    return [
        ModelInfo(m.name, m.variant_of, m.context_tokens, m.vocabulary_size, m.ready, m.created_unix_s)
        for m in response.models
    ]
