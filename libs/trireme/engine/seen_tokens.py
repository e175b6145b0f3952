"""What penalties look at, on the device: the tokens of each sequence's prompt and answer.

A row per sequence, told each step of the tokens that came since the last. Rows are few; who has not run
for longest loses its own, and gets another, filled anew, when it runs again.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trireme.engine.sampling import SamplingState
from trireme.kernels.cuda_launch import Launcher
from trireme.kernels.cuda_sampling import bias_logits

_FIRST_ROWS: Final = 8


class SeenTokens:
    """5 bytes a token of the vocabulary and row, from the first sequence with penalties on.

    Args:
        launcher: the device's.
        most: rows, unless a single step has more sequences.
    """

    def __init__(self, launcher: Launcher, device: torch.device, *, vocab_size: int, most: int) -> None:
        self.counts = torch.zeros((0, vocab_size), dtype=torch.float32, device=device)
        """(rows, vocab): how often each token is in the answer."""
        self.in_prompt = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)
        """(rows, vocab)."""
        self._launcher = launcher
        self._most = most
        self._rows: OrderedDict[SamplingState, int] = OrderedDict()
        """Of sequences, the one that ran last at the end."""
        self._counted: dict[SamplingState, int] = {}
        """How much of its answer a sequence's row has."""
        self._free: list[int] = []

    def plan(self, states: Iterable[SamplingState]) -> tuple[list[int], dict[str, NDArray[Any]]]:
        """Each one's row, and what `tell` has to be given on the device first. Later calls count on that.

        Args:
            states: sequences' own ones, those of a whole step.
        """
        wanted = dict.fromkeys(states)
        fresh: list[int] = []
        prompts: list[tuple[int, int]] = []
        grown: Counter[tuple[int, int]] = Counter()
        for state in wanted:
            row = self._rows.get(state)
            if row is None:
                row = self._rows[state] = self._take(wanted)
                self._counted[state] = 0
                fresh.append(row)
                prompts += [(row, token) for token in set(state.prompt_ids)]
            self._rows.move_to_end(state)
            grown.update((row, token) for token in state.output_ids[self._counted[state] :])
            self._counted[state] = len(state.output_ids)
        pairs = np.asarray(list(grown), dtype=np.int32).reshape(-1, 2)
        told: dict[str, NDArray[Any]] = {}
        if fresh:
            told["seen_fresh"] = np.asarray(fresh, dtype=np.int64)
        if prompts:
            told["seen_prompts"] = np.asarray(prompts, dtype=np.int64).T
        if grown:
            told["seen_rows"], told["seen_ids"] = pairs.T
            told["seen_times"] = np.asarray(list(grown.values()), dtype=np.float32)
        return [self._rows[state] for state in wanted], told

    def tell(self, there: dict[str, Tensor]) -> None:
        """What `plan` gave, and perhaps more, on the device."""
        if (fresh := there.get("seen_fresh")) is not None:
            self.counts.index_fill_(0, fresh, 0.0)
            self.in_prompt.index_fill_(0, fresh, False)
        if (prompts := there.get("seen_prompts")) is not None:
            is_there = torch.ones((), dtype=torch.bool, device=prompts.device)
            self.in_prompt.index_put_((prompts[0], prompts[1]), is_there)
        if (rows := there.get("seen_rows")) is not None:
            bias_logits(self._launcher, self.counts, rows, there["seen_ids"], there["seen_times"])

    def forget(self, state: SamplingState) -> None:
        """The sequence has ended."""
        row = self._rows.pop(state, None)
        if row is not None:
            del self._counted[state]
            self._free.append(row)

    def clear(self) -> None:
        """All rows are filled anew: what was planned may not have been told."""
        for state in list(self._rows):
            self.forget(state)

    def _take(self, wanted: dict[SamplingState, None]) -> int:
        if not self._free:
            rows = len(self.counts)
            idle = next((state for state in self._rows if state not in wanted), None)
            if rows >= self._most and idle is not None:
                self.forget(idle)
            else:
                self._grow(max(_FIRST_ROWS, 2 * rows))
        return self._free.pop()

    def _grow(self, rows: int) -> None:
        held = len(self.counts)
        for name in ("counts", "in_prompt"):
            old: Tensor = getattr(self, name)
            new = torch.zeros((rows, old.shape[1]), dtype=old.dtype, device=old.device)
            new[:held] = old
            setattr(self, name, new)
        self._free = list(range(rows - 1, held - 1, -1))
