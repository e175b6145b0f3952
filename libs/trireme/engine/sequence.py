"""One sequence in the engine: its tokens, how far it is computed, and what it holds."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from trireme.engine.block_moves import Load
from trireme.engine.context_window import ContextWindow
from trireme.engine.kv_copies import Copy
from trireme.engine.prompt_logprobs import PromptLogprobs
from trireme.engine.request import Mode, SequenceRequest
from trireme.engine.sampling import SamplingState
from trireme.engine.stored_blocks import StoredBlock
from trireme.kvcache.block_identity import HashChain
from trireme.policies.iteration import Location


@dataclass(slots=True, eq=False)
class ScoreGroup:
    """The continuations of one SCORE request: a sequence each, answered together."""

    sequence_id: str
    members: list[Sequence]
    logprobs: list[float]
    num_open: int
    cached_tokens: int = 0


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """Owned by the engine; what it holds, how far it is and what moves by its `KvCache`."""

    sequence_id: str
    mode: Mode
    request: SequenceRequest
    token_ids: list[int]
    """Prompt and answer; for SCORE prompt and continuation. With a `window`, what it holds now."""
    num_prompt: int
    chain: HashChain
    """How the hashes of its blocks hang together."""
    arrival_s: float | None
    priority: int
    window: ContextWindow | None = None
    """For GENERATE: its oldest tokens may go; None: it ends where the context is full."""
    state: SamplingState | None = None
    """For GENERATE."""
    stop_ids: frozenset[int] = frozenset()
    """For GENERATE: tokens that end the answer."""
    group: ScoreGroup | None = None
    """For SCORE."""
    member: int = 0
    """Which continuation of the group."""
    has_no_answer: bool = False
    """It ends with its prompt."""
    prompt_logprobs: PromptLogprobs | None = None
    """For GENERATE, where they are asked for and not told yet."""
    hidden_sum: Tensor | None = None
    """For EMBED: (hidden,) float32, over the tokens computed so far."""

    row: int = -1
    """Row of the block table; -1: it has no device blocks."""
    blocks: list[int] = field(default_factory=list)
    """Device blocks, in order."""
    host_blocks: list[int] = field(default_factory=list)
    """Host blocks that hold its KV while it is swapped out."""
    move: Copy | None = None
    """The swap under way."""
    load: Load | None = None
    """Stored blocks on their way into the last of `blocks`; it waits, or runs beside the load."""
    stored: tuple[StoredBlock, ...] = ()
    """Blocks that a lower tier offers, not yet on their way."""
    awaited_tokens: int = 0
    """Leading tokens that a lower tier is about to offer the blocks of; it does not run before they are
    offered, or said not to come."""
    preloaded: tuple[bytes, ...] = ()
    """Blocks that wait for it after a load: of its prefix, or of what stood there before a cut."""
    hashes: list[bytes] = field(default_factory=list)
    """Of the full blocks of its tokens, as far as they were asked for."""
    num_computed: int = 0
    """Tokens whose keys and values are in its blocks, on the device or in the host."""
    num_committed: int = 0
    """Blocks that others may find."""
    most_computed: int = 0
    """Tokens that were ever computed or found: computing them again is the price of preemption."""
    cached_tokens: int | None = None
    """Tokens found at first admission, until they are reported."""
    has_answered: bool = False
    """It chose a token here: computing its newest token is decoding, all else is prefill."""

    def begin(self, num_computed: int) -> None:
        """It is to be computed from here on: sums over what is computed again start anew."""
        self.num_computed = num_computed
        self.hidden_sum = None
        if self.prompt_logprobs is not None:
            self.prompt_logprobs.rows.clear()
        if self.group is not None:
            self.group.logprobs[self.member] = 0.0

    def choose(self, token_id: int) -> None:
        """The answer grows by this token."""
        self.token_ids.append(token_id)
        if self.window is not None:
            self.window.history.append(token_id)

    def skip(self, num_tokens: int) -> None:
        """So many tokens behind the head of the window have gone."""
        assert self.window is not None
        head = self.window.rule.head
        del self.token_ids[head : head + num_tokens]
        del self.hashes[self.window.head_blocks :]
        self.chain = self.window.stage.chain
        self.most_computed -= num_tokens

    def restart(self) -> None:
        """Its KV is lost: what it needs to compute it again comes back into the window."""
        self.num_computed = 0
        self.num_committed = 0
        gone = self.window.restart() if self.window is not None else 0
        if self.window is not None and gone:
            self.token_ids = self.window.refilled()
            self.hashes = []
            self.chain = self.window.stage.chain
            self.most_computed += gone

    @property
    def was_cut_here(self) -> bool:
        """Tokens have gone since its request came, so its blocks have other names than the request says."""
        truncation = self.request.truncation
        return (
            self.window is not None and truncation is not None and self.window.stage.cuts != truncation.cuts
        )

    @property
    def is_replaying(self) -> bool:
        """Tokens that were chosen already follow those in the window."""
        return self.window is not None and len(self.token_ids) < self.window.num_kept

    @property
    def location(self) -> Location:
        """Where its KV is; a load that it may join counts as nowhere: it is to be admitted. What a lower
        tier has said that it will offer is as good as moving."""
        if self.move is not None or self.awaited_tokens:
            return Location.MOVING
        if self.load is not None and not self.load.is_joined:
            return Location.NONE if self.load.is_admissible else Location.MOVING
        if self.row >= 0:
            return Location.DEVICE
        return Location.HOST if self.host_blocks else Location.NONE

    @property
    def awaits_guide(self) -> bool:
        """Its constraint is not compiled yet."""
        state = self.state
        return state is not None and state.guide is not None and not state.guide.is_ready

    @property
    def num_target(self) -> int:
        """Tokens to compute before the sequence can go on: the last of a SCORE needs no logits."""
        return len(self.token_ids) - (self.mode is Mode.SCORE)

    @property
    def reusable_tokens(self) -> int:
        """Tokens whose KV may be found instead of computed: those whose hidden state nobody needs."""
        match self.mode:
            case Mode.GENERATE:
                return len(self.token_ids) - 1 if self.prompt_logprobs is None else 0
            case Mode.SCORE:
                return self.num_prompt - 1
            case Mode.EMBED:
                return 0

    @property
    def num_outputs(self) -> int:
        """Length of the answer so far."""
        tokens = self.token_ids if self.window is None else self.window.history
        return len(tokens) - self.num_prompt
