"""What the engine is asked to do with one sequence."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from trireme.engine.sampling_params import SamplingParams
from trireme.kvcache.block_identity import HashChain, Supply


class Mode(enum.Enum):
    """What is wanted of the sequence."""

    GENERATE = "generate"
    """An answer, token by token."""
    SCORE = "score"
    """How likely each of the given continuations is."""
    EMBED = "embed"
    """One vector for the prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """The oldest tokens may go where the sequence outgrows the context, by `policies.kv_truncation`.

    Offsets count in the whole conversation, with all that was dropped before the request came.
    """

    head_tokens: int
    """First tokens that every cut keeps."""
    cuts: tuple[int, ...] = ()
    """Where the rest began after each cut so far, ascending; the prompt is what stays."""
    borders: tuple[int, ...] = ()
    """Where turns begin, ascending."""
    supplies: tuple[Supply, ...] = ()
    """Where blocks of the prompt behind the head can come from, latest cut first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceRequest:
    """One sequence. An answer with n choices is n sequences; they share the prompt's blocks."""

    sequence_id: str
    """Unique among the sequences that the engine has."""
    prompt_token_ids: Sequence[int]
    delivered_token_ids: Sequence[int] = ()
    """The answer's tokens that were delivered before a re-assignment: it goes on after them, as
    if it had never stopped."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    salt: bytes = b""
    """Root of the block hashes: sequences with different ones share nothing but what `joints` say."""
    joints: tuple[tuple[int, bytes], ...] = ()
    """Where the chain of block hashes has another parent: see `HashChain`."""
    truncation: Truncation | None = None
    """For GENERATE; None: prompt and answer must fit the context."""
    priority: int = 0
    """Larger goes first, under the priority policy."""
    urgency: int = 0
    """Under the mlfq policy, levels that it joins above (below, if negative) the one its length tells."""
    arrival_s: float | None = None
    """When the request came, on the engine's clock; None: when the engine first sees it."""
    mode: Mode = Mode.GENERATE
    score_continuations: Sequence[Sequence[int]] = ()
    """For SCORE: token ids that might follow the prompt."""

    @property
    def chain(self) -> HashChain:
        """How the hashes of the prompt's blocks hang together."""
        return HashChain(self.salt, self.joints)
