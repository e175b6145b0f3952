"""Tokens chosen where the scores are, by the kernels of `kernels.cuda_sampling`.

Scores never leave the device. A step brings it what its rows want in one copy, and takes token ids, which
drafts are confirmed, and asked-for log-probabilities back behind one event. The rules, and the draws,
are those of `sampling`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trireme.engine.sampling import Sampled, SamplingState
from trireme.engine.sampling_masks import allowed
from trireme.engine.seen_tokens import SeenTokens
from trireme.engine.speculation.token_tree import TokenTree
from trireme.engine.token_choice import Choices, Chooser, Choosing, TorchChooser, paths, with_drafts
from trireme.kernels import cuda_ops
from trireme.kernels.cuda_launch import Launcher
from trireme.kernels.cuda_sampling import (
    MAX_VOCAB,
    SamplingRows,
    bias_logits,
    forbid_logits,
    penalise_logits,
    sample,
    verify_drafts,
    wishes_of,
)
from trireme.kernels.cuda_transfers import Download, download, upload
from trireme.kernels.tree_paths import MAX_TREE_TOKENS


def chooser_of(device: torch.device, *, vocab_size: int, most_sequences: int) -> Chooser:
    """The one for scores on a device."""
    if vocab_size <= MAX_VOCAB and cuda_ops.is_available(device):
        launcher = cuda_ops.launcher_of(device)
        return DeviceChooser(launcher, device, vocab_size=vocab_size, most_sequences=most_sequences)
    return TorchChooser()


class DeviceChooser:
    """Meets `Chooser`.

    Args:
        launcher: the device's.
        vocab_size: at most `MAX_VOCAB`.
        most_sequences: of a step.
    """

    def __init__(
        self, launcher: Launcher, device: torch.device, *, vocab_size: int, most_sequences: int
    ) -> None:
        self._launcher = launcher
        self._device = device
        self._vocab_size = vocab_size
        self._seen = SeenTokens(launcher, device, vocab_size=vocab_size, most=most_sequences)
        self._roots: list[SamplingState] = []
        """Of the rows of the last step; while they stay, so does what they want."""
        self._wishes: dict[str, Tensor] = {}

    def begin(self, logits: Tensor, states: Sequence[SamplingState], drafts: Sequence[TokenTree]) -> Choosing:
        try:
            return self._begin(logits, with_drafts(states, drafts), drafts)
        except Exception:
            self._seen.clear()
            self._roots = []
            raise

    def forget(self, state: SamplingState) -> None:
        self._seen.forget(state)

    def _begin(self, logits: Tensor, rows: Sequence[SamplingState], drafts: Sequence[TokenTree]) -> Choosing:
        arrays = {"indices": np.asarray([row.num_outputs for row in rows], dtype=np.int64)}
        roots = [row.root for row in rows]
        is_as_before = roots == self._roots
        if not is_as_before:
            arrays |= _wishes(rows, self._vocab_size)
        arrays |= self._adjustments(rows)
        starts: list[int] = []
        # Drafts larger than the kernel takes are compared on the host.
        is_walked = bool(drafts) and max(map(len, drafts)) < MAX_TREE_TOKENS
        if is_walked:
            starts, trees = _trees(drafts)
            arrays |= trees
        asking = [place for place, row in enumerate(rows) if row.params.logprobs is not None]
        if asking:
            arrays["asking"] = np.asarray(asking, dtype=np.int64)
        there = upload(arrays, self._device)
        if not is_as_before:
            self._wishes = {name: there[name] for name in _WISHES}
            self._roots = roots
        choice = SamplingRows(**self._wishes, indices=there["indices"])
        tokens = sample(self._launcher, self._adjusted(logits, there), choice)
        results = [tokens]
        if is_walked:
            results.append(self._confirmed(tokens, starts, there))  # (sequences, longest)
        if asking:
            most = max(rows[place].params.logprobs or 0 for place in asking)
            results += _logprobs(logits, tokens, there["asking"], min(most, self._vocab_size))
        counts = [(place, rows[place].params.logprobs or 0) for place in asking]
        return _Choosing(download(results), counts, () if is_walked else drafts)

    def _adjustments(self, rows: Sequence[SamplingState]) -> dict[str, NDArray[Any]]:
        arrays: dict[str, NDArray[Any]] = {}
        guided = [place for place, row in enumerate(rows) if row.guide is not None]
        if guided:
            arrays["guided"] = np.asarray(guided, dtype=np.int32)
            arrays["allowed"] = allowed(rows, guided, self._vocab_size)
        biases = [(place, bias) for place, row in enumerate(rows) if (bias := _bias(row))]
        if biases:
            arrays["biased"] = np.repeat(
                np.asarray([place for place, _ in biases], dtype=np.int32), [len(bias) for _, bias in biases]
            )
            arrays["bias_ids"] = np.asarray([token for _, bias in biases for token in bias], dtype=np.int32)
            values = [value for _, bias in biases for value in bias.values()]
            arrays["bias_values"] = np.asarray(values, dtype=np.float32)
        penalised = [place for place, row in enumerate(rows) if row.params.has_penalties]
        if penalised:
            roots = list(dict.fromkeys(rows[place].root for place in penalised))
            slots, told = self._seen.plan(roots)
            slot_of = dict(zip(roots, slots, strict=True))
            params = [rows[place].params for place in penalised]
            ahead = np.full(
                (len(penalised), max(len(rows[place].ahead) for place in penalised)), -1, np.int32
            )
            for entry, place in enumerate(penalised):
                ahead[entry, : len(rows[place].ahead)] = rows[place].ahead
            arrays |= told
            arrays["penalised"] = np.asarray(penalised, dtype=np.int32)
            arrays["slots"] = np.asarray([slot_of[rows[place].root] for place in penalised], dtype=np.int32)
            arrays["ahead"] = ahead
            arrays["penalties"] = np.asarray(
                [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params],
                dtype=np.float32,
            )
        return arrays

    def _adjusted(self, logits: Tensor, there: dict[str, Tensor]) -> Tensor:
        """Constraints, bias and impossible stop tokens, penalties; `logits` itself if no row wants any."""
        if not there.keys() & {"guided", "biased", "penalised"}:
            return logits
        scores, launcher = logits.clone(), self._launcher
        if "guided" in there:
            forbid_logits(launcher, scores, there["guided"], there["allowed"])
        if "biased" in there:
            bias_logits(launcher, scores, there["biased"], there["bias_ids"], there["bias_values"])
        if "penalised" in there:
            self._seen.tell(there)
            penalise_logits(
                launcher,
                scores,
                there["penalised"],
                there["slots"],
                self._seen.counts,
                self._seen.in_prompt,
                there["ahead"],
                there["penalties"],
            )
        return scores

    def _confirmed(self, tokens: Tensor, starts: Sequence[int], there: dict[str, Tensor]) -> Tensor:
        """(sequences, longest) int32: places of the drafted tokens that are right, from 1, then -1."""
        return verify_drafts(
            self._launcher,
            tokens,
            there["drafts"],
            there["parents"],
            starts,
            starts_there=there["starts"],
        ).path


_WISHES: Final = ("temperatures", "top_k", "top_p", "min_log", "seeds")


def _wishes(rows: Sequence[SamplingState], vocab_size: int) -> dict[str, NDArray[Any]]:
    params = [row.params for row in rows]
    return wishes_of(
        temperatures=[0.0 if p.is_greedy else p.temperature for p in params],
        top_k=[p.top_k for p in params],
        top_p=[p.top_p for p in params],
        min_p=[p.min_p for p in params],
        seeds=[p.seed for p in params],
        vocab=vocab_size,
    )


def _bias(row: SamplingState) -> dict[int, float]:
    """What is added to a row's scores; each token once, as the kernel wants it."""
    bias = dict(row.params.logit_bias)
    if row.guide is None and row.suppresses_stop:
        bias |= dict.fromkeys(row.stop_ids, -math.inf)
    return bias


def _trees(drafts: Sequence[TokenTree]) -> tuple[list[int], dict[str, NDArray[Any]]]:
    """Each sequence's draft behind its last certain token; where each begins, and where the last ends."""
    starts = [0]
    for draft in drafts:
        starts.append(starts[-1] + 1 + len(draft))
    # Nobody looks at a certain token.
    tokens = [token for draft in drafts for token in (-1, *draft.tokens)]
    parents = [parent for draft in drafts for parent in draft.rooted_parents]
    return starts, {
        "drafts": np.asarray(tokens, dtype=np.int64),
        "parents": np.asarray(parents, dtype=np.int32),
        "starts": np.asarray(starts, dtype=np.int32),
    }


def _logprobs(logits: Tensor, tokens: Tensor, asking: Tensor, most: int) -> list[Tensor]:
    """For the rows that ask: the chosen token's, and the `most` likeliest tokens with theirs."""
    logprobs = logits.index_select(0, asking).log_softmax(-1)
    chosen = logprobs.gather(1, tokens.index_select(0, asking).clamp_(min=0)[:, None])
    top = logprobs.topk(most, -1)
    return [chosen, top.indices, top.values]


class _Choosing:
    """Meets `Choosing`."""

    def __init__(
        self, results: Download, asking: Sequence[tuple[int, int]], unwalked: Sequence[TokenTree]
    ) -> None:
        self._results = results
        self._unwalked = unwalked
        """Drafts that are not compared yet."""
        self._asking = asking
        """Rows that ask for log-probabilities, and for how many."""

    def wait(self) -> Choices:
        tokens, *others = self._results.wait()
        token_ids: list[int] = tokens.tolist()
        sampled = [Sampled(token_id, None, ()) for token_id in token_ids]
        if self._asking:
            *others, chosen, ids, values = others
            for (row, count), logprob, top, their in zip(
                self._asking, chosen.squeeze(1).tolist(), ids.tolist(), values.tolist(), strict=True
            ):
                if sampled[row].token_id >= 0:
                    alternatives = tuple(zip(top[:count], their[:count], strict=True))
                    sampled[row] = Sampled(sampled[row].token_id, logprob, alternatives)
        if not others:
            return Choices(sampled, paths(token_ids, self._unwalked))
        walked: list[list[int]] = others[0].tolist()
        return Choices(sampled, [tuple(place - 1 for place in path if place > 0) for path in walked])
