"""Python clients of the fleet's gRPC API, async and sync.

Invariant: a stream of events has each token index of each choice once and in order, also across
the loss of the gateway it came from; a fault shows as a `Paused` event, then as a typed error if
it outlasts the deadline.
"""

from trireme.client.async_client import TriremeClient
from trireme.client.credentials import ClientTls
from trireme.client.events import (
    Accepted,
    ChoiceFinished,
    Delta,
    Event,
    FinishReason,
    Paused,
    PositionLogprobs,
    Summary,
    TokenLogprob,
)
from trireme.client.requests import Prompt, Sampling
from trireme.client.results import Classification, Embeddings, LabelScore, ModelInfo, Usage
from trireme.client.sync_client import SyncTriremeClient

__all__ = [
    "Accepted",
    "ChoiceFinished",
    "Classification",
    "ClientTls",
    "Delta",
    "Embeddings",
    "Event",
    "FinishReason",
    "LabelScore",
    "ModelInfo",
    "Paused",
    "PositionLogprobs",
    "Prompt",
    "Sampling",
    "Summary",
    "SyncTriremeClient",
    "TokenLogprob",
    "TriremeClient",
    "Usage",
]
