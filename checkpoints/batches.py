"""Documents to token windows: what one training step reads."""

import random
from collections.abc import Iterator, Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from checkpoints.corpus import Module, chats_of, is_test_module
from checkpoints.tokenizer import END_OF_TEXT_ID, render_chat

CHAT_SHARE = 0.10
"""Share of an epoch's tokens that are chats."""


class TrainingText:
    """The training modules, tokenized once, and the chats cut out of them anew every epoch."""

    def __init__(self, modules: Sequence[Module], tokenizer: Tokenizer, *, seed: int) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        self._sources = [encoding.ids for encoding in tokenizer.encode_batch([m.text for m in modules])]
        self._modules_with_chats = [module for module in modules if not is_test_module(module.name)]
        self.source_tokens = sum(map(len, self._sources))

    def epoch(self, epoch_index: int, *, window_tokens: int) -> Tensor:
        """All windows of one pass, shuffled: (windows, window_tokens + 1).

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
        start = rng.randrange(window_tokens)
        tokens = torch.tensor(stream[start:], dtype=torch.int32)
        windows = tokens.unfold(0, window_tokens + 1, window_tokens)
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(rng.getrandbits(63)))
        return windows[order].long()

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


def batches(windows: Tensor, *, batch_windows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets, each (batch_windows, window_tokens); a short last batch is dropped."""
    for first in range(0, len(windows) - batch_windows + 1, batch_windows):
        batch = windows[first : first + batch_windows]
        yield batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
