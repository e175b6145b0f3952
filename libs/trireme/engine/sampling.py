"""Choose the next token of every row of a batch.

A row's choice depends on its own scores, parameters and draw only. One uniform per token goes
through the inverse of the cumulative distribution: over tokens in order of falling
probability (ties: smaller id first) where a filter is set, in order of id where none is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trireme.constraints.guide import Guide
from trireme.engine.philox import uniforms
from trireme.engine.sampling_masks import forbid
from trireme.engine.sampling_params import SamplingParams

_TILE: Final = 256
"""Likeliest tokens looked at first; a row whose filters keep more is sorted whole."""
_DRAWS: Final = 32
"""Uniforms computed at a time."""


class Sampled(NamedTuple):
    """One row's choice."""

    token_id: int
    """-1: the row's scores are not numbers."""
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]
    """(token id, log-probability), likeliest first."""


class SamplingState:
    """What one sequence's sampling remembers.

    Args:
        params: the request's wishes.
        stop_ids: all tokens that would end the answer.
        prompt_ids: the prompt.
        output_ids: the answer so far.
        vocab_size: of the model.
        device: where scores are.
        guide: of the constraint that the answer must meet.
    """

    __slots__ = (
        "_bias",
        "_counts",
        "_device",
        "_draws",
        "_draws_start",
        "_in_prompt",
        "_root",
        "_stop",
        "_vocab_size",
        "adjusts",
        "ahead",
        "guide",
        "is_plain",
        "num_outputs",
        "output_ids",
        "params",
        "prompt_ids",
        "stop_ids",
    )

    def __init__(
        self,
        params: SamplingParams,
        *,
        stop_ids: Sequence[int],
        prompt_ids: Sequence[int],
        output_ids: Sequence[int],
        vocab_size: int,
        device: torch.device,
        guide: Guide | None = None,
    ) -> None:
        self.params = params
        self.guide = guide
        self.ahead: tuple[int, ...] = ()
        """Drafted tokens behind the answer."""
        self.num_outputs = len(output_ids)
        self.stop_ids = [token_id for token_id in stop_ids if token_id < vocab_size]
        self.prompt_ids: Sequence[int] = prompt_ids if params.has_penalties else ()
        self.output_ids: list[int] = list(output_ids) if params.has_penalties else []
        """What penalties look at; without them both are empty."""
        self.adjusts = bool(params.logit_bias) or params.has_penalties
        is_free = guide is None and not self.adjusts
        self.is_plain = params.is_greedy and params.logprobs is None and is_free
        self._root: SamplingState | None = None
        self._vocab_size = vocab_size
        self._device = device
        # Tensors are made when they are asked for: where another chooses the tokens, they never are.
        self._bias: tuple[Tensor, Tensor] | None = None
        self._stop: Tensor | None = None
        self._counts: Tensor | None = None
        self._in_prompt: Tensor | None = None
        self._draws: list[float] = []
        self._draws_start = 0

    @property
    def root(self) -> SamplingState:
        """The sequence's own state, without drafted tokens."""
        return self._root or self

    @property
    def bias(self) -> tuple[Tensor, Tensor]:
        """Tokens (count,) int64 and what is added to their scores (count,) float32."""
        if self._bias is None:
            bias = self.params.logit_bias
            ids = torch.tensor(list(bias), dtype=torch.int64, device=self._device)
            values = torch.tensor(list(bias.values()), dtype=torch.float32, device=self._device)
            self._bias = ids, values
        return self._bias

    @property
    def stop_tensor(self) -> Tensor:
        """Tokens that end the answer, (count,) int64."""
        if self._stop is None:
            self._stop = torch.tensor(self.stop_ids, dtype=torch.int64, device=self._device)
        return self._stop

    def seen(self) -> tuple[Tensor, Tensor]:
        """How often each token is in the answer, (vocab,) float32, and whether it is in the prompt, (vocab,)
        bool."""
        if self._root is not None:
            counts, in_prompt = self._root.seen()
            grown = torch.tensor(self.ahead, dtype=torch.int64, device=self._device)
            return counts.index_add(0, grown, torch.ones(len(grown), device=self._device)), in_prompt
        if self._counts is None or self._in_prompt is None:
            outputs = torch.tensor(self.output_ids, dtype=torch.int64, device=self._device)
            self._counts = torch.bincount(outputs, minlength=self._vocab_size).float()
            self._in_prompt = torch.zeros(self._vocab_size, dtype=torch.bool, device=self._device)
            self._in_prompt[torch.tensor(self.prompt_ids, dtype=torch.int64, device=self._device)] = True
        return self._counts, self._in_prompt

    @property
    def suppresses_stop(self) -> bool:
        """The next token may not end the answer."""
        return self.num_outputs < self.params.min_tokens and bool(self.stop_ids)

    def observe(self, token_id: int) -> None:
        """The answer grew by this token."""
        self.num_outputs += 1
        if self.params.has_penalties:
            self.output_ids.append(token_id)
            if self._counts is not None:
                self._counts[token_id] += 1.0
        if self.guide is not None:
            self.guide.advance(token_id)

    def after(self, token_ids: Sequence[int]) -> SamplingState:
        """What this will be when the answer has grown by these tokens; itself if there are none."""
        if not token_ids:
            return self
        later: SamplingState = object.__new__(SamplingState)
        for name in SamplingState.__slots__:
            setattr(later, name, getattr(self, name))
        later._root = self
        later.num_outputs += len(token_ids)
        later.ahead = tuple(token_ids)
        return later

    def uniform(self) -> float:
        """The draw for the next token."""
        offset = self.num_outputs - self._draws_start
        if not 0 <= offset < len(self._draws):
            self._draws_start, offset = self.num_outputs, 0
            self._draws = uniforms(self.params.seed, self.num_outputs, _DRAWS)
        return self._draws[offset]


def sample(logits: Tensor, states: Sequence[SamplingState]) -> list[Sampled]:
    """Choose a token per row of `logits` (rows, vocab) float32; row i belongs to states[i]."""
    values, best = logits.max(-1)
    tokens = torch.where(values.isfinite(), best, -1)
    if all(state.is_plain and not state.suppresses_stop for state in states):
        return [Sampled(token_id, None, ()) for token_id in tokens.tolist()]

    adjusted = _adjust(logits, states)
    if adjusted is not logits:
        adjusted_values, adjusted_best = adjusted.max(-1)
        is_good = values.isfinite() & adjusted_values.isfinite()
        tokens = torch.where(is_good, adjusted_best, -1)
    drawing = [row for row, state in enumerate(states) if not state.params.is_greedy]
    if drawing:
        drawn = _draw(adjusted, drawing, states)
        rows = torch.tensor(drawing, device=logits.device)
        tokens[rows] = torch.where(tokens[rows] < 0, -1, drawn)
    return _report(logits, tokens, states)


def _report(logits: Tensor, tokens: Tensor, states: Sequence[SamplingState]) -> list[Sampled]:
    token_ids: list[int] = tokens.tolist()
    sampled = [Sampled(token_id, None, ()) for token_id in token_ids]
    asking = [
        row for row, state in enumerate(states) if state.params.logprobs is not None and token_ids[row] >= 0
    ]
    if not asking:
        return sampled
    rows = torch.tensor(asking, device=logits.device)
    logprobs = logits[rows].log_softmax(-1)
    chosen: list[float] = logprobs.gather(1, tokens[rows, None]).squeeze(1).tolist()
    most = max(states[row].params.logprobs or 0 for row in asking)
    top = logprobs.topk(min(most, logits.shape[1]), -1)
    top_ids: list[list[int]] = top.indices.tolist()
    top_values: list[list[float]] = top.values.tolist()
    for index, row in enumerate(asking):
        count = states[row].params.logprobs or 0
        alternatives = tuple(zip(top_ids[index][:count], top_values[index][:count], strict=True))
        sampled[row] = Sampled(token_ids[row], chosen[index], alternatives)
    return sampled


def _adjust(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Constraints, bias, impossible stop tokens, penalties; `logits` itself if no row wants any."""
    guided = [row for row, state in enumerate(states) if state.guide is not None]
    suppressing = [row for row, state in enumerate(states) if state.guide is None and state.suppresses_stop]
    adjusting = [row for row, state in enumerate(states) if state.adjusts]
    if not suppressing and not adjusting and not guided:
        return logits
    adjusted = logits.clone()
    if guided:
        forbid(adjusted, states, guided)
    flat = adjusted.view(-1)
    vocab_size = logits.shape[1]
    biased = [(row, states[row].bias) for row in adjusting if states[row].params.logit_bias]
    if biased:
        where = torch.cat([ids + row * vocab_size for row, (ids, _) in biased])
        flat.index_add_(0, where, torch.cat([values for _, (_, values) in biased]))
    if suppressing:
        where = torch.cat([states[row].stop_tensor + row * vocab_size for row in suppressing])
        flat.index_fill_(0, where, -math.inf)
    _penalise(adjusted, states, [row for row in adjusting if states[row].params.has_penalties])
    return adjusted


def _penalise(adjusted: Tensor, states: Sequence[SamplingState], rows: list[int]) -> None:
    """Repetition over prompt and answer, then frequency and presence over the answer, in place."""
    if not rows:
        return
    params = [states[row].params for row in rows]
    seen = [states[row].seen() for row in rows]
    counts = torch.stack([count for count, _ in seen])
    prompt = torch.stack([in_prompt for _, in_prompt in seen])
    factors = torch.tensor(
        [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params],
        device=adjusted.device,
    )
    repetition, frequency, presence = factors[:, :, None].unbind(1)  # (rows, 1) each
    index = torch.tensor(rows, device=adjusted.device)
    scores = adjusted[index]
    is_present = counts > 0
    repeated = torch.where(scores > 0, scores / repetition, scores * repetition)
    scores = torch.where(prompt | is_present, repeated, scores)
    adjusted[index] = scores - frequency * counts - presence * is_present


def _draw(adjusted: Tensor, rows: list[int], states: Sequence[SamplingState]) -> Tensor:
    """Tokens drawn for `rows`: (len(rows),) int64."""
    device = adjusted.device
    params = [states[row].params for row in rows]
    draws = torch.tensor([states[row].uniform() for row in rows], dtype=torch.float64, device=device)
    temperatures = torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device)
    is_whole_batch = len(rows) == adjusted.shape[0]
    scores = adjusted if is_whole_batch else adjusted[torch.tensor(rows, device=device)]
    scores = scores / temperatures[:, None]

    filtered = [index for index, p in enumerate(params) if p.has_filters]
    if not filtered:
        return _draw_unfiltered(scores, draws)
    chosen = [params[index] for index in filtered]
    if len(filtered) == len(rows):
        return _draw_filtered(scores, draws, chosen)
    where = torch.tensor(filtered, device=device)
    tokens = _draw_unfiltered(scores, draws)
    tokens[where] = _draw_filtered(scores[where], draws[where], chosen)
    return tokens


def _draw_unfiltered(scores: Tensor, draws: Tensor) -> Tensor:
    return _invert(scores.softmax(-1), draws)


def _invert(weights: Tensor, draws: Tensor) -> Tensor:
    """First index at which the running sum of `weights` (rows, n) exceeds draw * total."""
    sums = weights.cumsum(-1, dtype=torch.float64)
    totals = sums[:, -1:]
    index = torch.searchsorted(sums, draws[:, None] * totals, right=True)
    # The total may be reached by rounding: then the last token of any weight, where the sum got there.
    last = torch.searchsorted(sums, totals.contiguous())
    # Rows that hold no numbers may point beyond the end; their token is not used.
    return torch.minimum(index, last).clamp_(max=weights.shape[1] - 1).squeeze(1)


def _draw_filtered(scores: Tensor, draws: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    device = scores.device
    vocab_size = scores.shape[1]
    width = min(_TILE, vocab_size)
    top_k = torch.tensor([min(p.top_k or vocab_size, vocab_size) for p in params], device=device)[:, None]
    limits = [(p.top_p, math.log(p.min_p) if p.min_p > 0.0 else -math.inf) for p in params]
    top_p, min_log = torch.tensor(limits, dtype=torch.float64, device=device)[:, :, None].unbind(1)

    values, ids = _largest(scores, width)
    totals = None
    if width < vocab_size:
        # What the filters before top_p keep of the whole vocabulary, where top_k does not bind.
        relative = scores - values[:, :1]
        weights = relative.exp().masked_fill_(relative < min_log, 0.0)
        totals = weights.sum(-1, keepdim=True, dtype=torch.float64)
    kept, is_complete = _keep(values, top_k, top_p, min_log, totals, vocab_size)
    tokens = ids.gather(1, _invert(kept, draws)[:, None]).squeeze(1)
    if totals is None:
        return tokens
    beyond = (~is_complete).nonzero().squeeze(1)
    if beyond.numel():
        values, ids = _largest(scores[beyond], vocab_size)
        kept, _ = _keep(values, top_k[beyond], top_p[beyond], min_log[beyond], None, vocab_size)
        tokens[beyond] = ids.gather(1, _invert(kept, draws[beyond])[:, None]).squeeze(1)
    return tokens


def _largest(scores: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` largest scores per row and their ids: falling, equal ones by rising id.

    Score and id are packed into one whole number, so the order is total: every device and every
    method of sorting gives the same one.
    """
    bits = (scores + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # ordered as the floats are
    ids = torch.arange(scores.shape[1], device=scores.device)
    keys = ((~rising).long() << 32) | ids
    if keys.device.type == "cpu":
        # NumPy sorts whole numbers with vector instructions: many times faster than PyTorch.
        array = keys.numpy()
        if width < array.shape[1]:
            array = np.partition(array, width - 1, axis=1)[:, :width]
        array.sort(axis=1)
        keys = torch.from_numpy(array)
    else:
        keys = keys.topk(width, -1, largest=False).values
    ids = keys & 0xFFFFFFFF
    return scores.gather(1, ids), ids


def _keep(
    values: Tensor, top_k: Tensor, top_p: Tensor, min_log: Tensor, totals: Tensor | None, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Weights of the sorted tokens, 0 for those filtered out, and whether none beyond could be kept.

    Each filter keeps a head of the sorted tokens, and at least the first.

    Args:
        values: (rows, width) scores, falling.
        top_k, top_p, min_log: (rows, 1).
        totals: (rows, 1) weight of all tokens that min_p keeps; None if `values` is all of them.

    Returns:
        (rows, width) float64 and (rows,) bool.
    """
    width = values.shape[1]
    relative = values - values[:, :1]
    ranks = torch.arange(width, device=values.device)
    is_kept = (ranks < top_k) & (relative >= min_log)
    weights = relative.double().exp() * is_kept
    sums = weights.cumsum(-1)
    is_inside = (top_k <= width) | ~is_kept[:, -1:]
    mass = sums[:, -1:] if totals is None else torch.where(is_inside, sums[:, -1:], totals)
    # A token stays if those before it have not reached top_p yet.
    is_cut = ((sums - weights) >= top_p * mass) & (top_p < 1.0)
    weights = weights.masked_fill(is_cut, 0.0)
    if totals is None:
        return weights, torch.ones_like(is_inside).squeeze(1)
    # A top_k beyond the tile leaves the mass unknown, so the tile cannot tell where top_p cuts.
    is_complete = is_inside | (is_cut[:, -1:] & (top_k == vocab_size))
    return weights, is_complete.squeeze(1)
