"""Documents to token windows: what one training step reads."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from checkpoints.corpus import Module, chats_of, is_test_module
from checkpoints.tokenizer import END_OF_TEXT_ID, MAX_POSITIONS, render_chat

WINDOW_TOKENS = MAX_POSITIONS
SEGMENT_TOKENS = 256
SEQUENCE_TOKENS = 2 * SEGMENT_TOKENS

CHAT_SHARE = 0.10
"""Share of an epoch's tokens that are chats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one step reads; all three (sequences, SEQUENCE_TOKENS)."""

    inputs: Tensor
    targets: Tensor
    """The token that follows each input."""
    positions: Tensor
    """Where each input stands in its window; with a hole in the middle of some sequences."""


class TrainingText:
    """The training modules, tokenized once, and the chats cut out of them anew every epoch."""

    def __init__(self, modules: Sequence[Module], tokenizer: Tokenizer, *, seed: int) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        self._sources = [encoding.ids for encoding in tokenizer.encode_batch([m.text for m in modules])]
        self._modules_with_chats = [module for module in modules if not is_test_module(module.name)]
        self.source_tokens = sum(map(len, self._sources))

    def epoch(self, epoch_index: int) -> Tensor:
        """All windows of one pass: (windows, WINDOW_TOKENS + 1).

        Neighbours share no token but the last, which is the target of one and unread by the next.
        Equal arguments give equal windows.
        """
        rng = random.Random(f"{self._seed}/{epoch_index}")
        documents = [*self._sources, *self._chats(rng)]
        rng.shuffle(documents)
        stream: list[int] = []
        for document in documents:
            stream.append(END_OF_TEXT_ID)
            stream.extend(document)
        # A random start, so that each epoch cuts the text in other places.
        start = rng.randrange(WINDOW_TOKENS)
        tokens = torch.tensor(stream[start:], dtype=torch.int32)
        return tokens.unfold(0, WINDOW_TOKENS + 1, WINDOW_TOKENS).long()

    def _chats(self, rng: random.Random) -> Iterator[list[int]]:
        wanted_tokens = self.source_tokens * CHAT_SHARE / (1 - CHAT_SHARE)
        modules = self._modules_with_chats.copy()
        rng.shuffle(modules)
        for module in modules:
            for chat in chats_of(module, rng=rng):
                if wanted_tokens <= 0:
                    return
                token_ids = self._tokenizer.encode(render_chat(chat)).ids
                wanted_tokens -= len(token_ids)
                yield token_ids


def batches(windows: Tensor, *, batch_tokens: int, seed: int) -> Iterator[Batch]:
    """Cut windows into sequences of two segments each and batch them; a short last batch is dropped.

    In half of the windows the two segments are neighbours. In the others they lie anywhere in the
    window and keep their positions, with a hole between them: so the model meets every distance it
    will be served with, and attention never costs more than a short sequence does.
    """
    generator = torch.Generator().manual_seed(seed)
    num_windows, segments = len(windows), WINDOW_TOKENS // SEGMENT_TOKENS
    order = torch.arange(segments).repeat(num_windows, 1)
    order[::2] = torch.rand(order[::2].shape, generator=generator).argsort(dim=1)
    pairs = order.view(num_windows, -1, 2).sort(dim=-1).values
    starts = pairs.flatten(0, 1)[:, :, None] * SEGMENT_TOKENS
    positions = (starts + torch.arange(SEGMENT_TOKENS)).flatten(1)  # (sequences, SEQUENCE_TOKENS)
    rows = torch.arange(num_windows).repeat_interleave(pairs.shape[1])
    shuffled = torch.randperm(len(rows), generator=generator)
    batch_rows = batch_tokens // SEQUENCE_TOKENS
    for first in range(0, len(rows) - batch_rows + 1, batch_rows):
        chosen = shuffled[first : first + batch_rows]
        window, position = rows[chosen, None], positions[chosen]
        yield Batch(
            inputs=windows[window, position], targets=windows[window, position + 1], positions=position
        )
