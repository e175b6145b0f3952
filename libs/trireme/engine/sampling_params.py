"""How a request wants its tokens chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from trireme.constraints.constraint import Constraint
from trireme.errors import InvalidRequest

GREEDY_BELOW: Final = 1e-5
"""A temperature below this chooses the likeliest token: dividing by it would overflow."""
MAX_LOGPROBS: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Steps are applied in the order: constraint, logit bias and `min_tokens`, penalties, temperature,
    min_p, top_k, top_p. Log-probabilities are those of the model before all of them.

    Raises:
        InvalidRequest: a value is out of range; `param` names it.
    """

    max_tokens: int = 16
    """Length of the whole answer, tokens delivered before a re-assignment included."""
    min_tokens: int = 0
    """End-of-sequence and stop tokens are impossible before this many tokens."""
    temperature: float = 1.0
    """0: the likeliest token always."""
    top_k: int = 0
    """Choose among the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Choose among the fewest likeliest tokens whose probabilities reach this sum."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest one's probability."""
    presence_penalty: float = 0.0
    """Subtracted from the scores of tokens that are in the answer."""
    frequency_penalty: float = 0.0
    """Subtracted once for every time a token is in the answer."""
    repetition_penalty: float = 1.0
    """Scores of tokens in prompt or answer are divided by it if positive, else multiplied."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the scores of these tokens."""
    seed: int = 0
    """Key of the draws, 64 bits."""
    logprobs: int | None = None
    """How many likeliest tokens to report beside the chosen one; None: nothing."""
    prompt_logprobs: int | None = None
    """How many likeliest tokens to report beside each of the prompt's; None: nothing. Then `max_tokens` may
    be 0."""
    ignore_eos: bool = False
    """Go on after the end-of-sequence token."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer beside the model's own; they are part of it."""
    constraint: Constraint | None = None
    """What the answer must look like."""

    def __post_init__(self) -> None:
        self._whole("max_tokens", self.max_tokens, 1 if self.prompt_logprobs is None else 0, None)
        self._whole("min_tokens", self.min_tokens, 0, self.max_tokens)
        self._real("temperature", self.temperature, 0.0, math.inf)
        self._whole("top_k", self.top_k, 0, None)
        self._real("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise InvalidRequest("top_p is 0; it must be above 0 and at most 1", param="top_p")
        self._real("min_p", self.min_p, 0.0, 1.0)
        self._real("presence_penalty", self.presence_penalty, -2.0, 2.0)
        self._real("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        self._real("repetition_penalty", self.repetition_penalty, 0.0, math.inf)
        if self.repetition_penalty == 0.0:
            raise InvalidRequest("repetition_penalty is 0; it must be positive", param="repetition_penalty")
        self._whole("seed", self.seed, 0, (1 << 64) - 1)
        if self.logprobs is not None:
            self._whole("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            self._whole("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        for token_id, bias in self.logit_bias.items():
            self._whole("logit_bias", token_id, 0, None)
            self._real("logit_bias", bias, -100.0, 100.0)
        for token_id in self.stop_token_ids:
            self._whole("stop_token_ids", token_id, 0, None)
        if self.constraint is not None and self.ignore_eos:
            raise InvalidRequest(
                "ignore_eos is set, but a constraint says where the answer ends", param="ignore_eos"
            )

    @property
    def is_greedy(self) -> bool:
        """No draw is needed."""
        return self.temperature < GREEDY_BELOW

    @property
    def has_filters(self) -> bool:
        """Some of the likely tokens only."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def has_penalties(self) -> bool:
        """Scores depend on the tokens so far."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse token ids that the model does not have.

        Raises:
            InvalidRequest: `logit_bias` or `stop_token_ids` names one.
        """
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            for token_id in ids:
                if token_id >= vocab_size:
                    raise InvalidRequest(
                        f"{name} names token {token_id}, but the model has {vocab_size} tokens", param=name
                    )

    @staticmethod
    def _whole(name: str, value: object, low: int, high: int | None) -> None:
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not is_whole or value < low or (high is not None and value > high):  # type: ignore[operator]
            bounds = f"at least {low}" if high is None else f"from {low} to {high}"
            raise InvalidRequest(f"{name} is {value!r}; it must be a whole number {bounds}", param=name)

    @staticmethod
    def _real(name: str, value: object, low: float, high: float) -> None:
        is_real = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_real or not math.isfinite(value) or not low <= value <= high:  # type: ignore[arg-type,operator]
            bounds = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise InvalidRequest(f"{name} is {value!r}; it must be a finite number {bounds}", param=name)
