"""A step of paged attention with random contents, and what it must give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from trireme.kernels import kv_forms
from trireme.kernels.attention_batch import AttentionBatch
from trireme.kernels.cuda_attention import SplitRule, paged_attention
from trireme.kernels.cuda_emulator import Emulator

FEW_KEYS = SplitRule(unit=64, most=3)


class Step:
    """A batch with random queries and a cache whose unused slots are NaN."""

    def __init__(
        self,
        *,
        lengths: Sequence[int],
        contexts: Sequence[int],
        heads: int = 2,
        kv_heads: int = 1,
        head_dim: int = 16,
        dtype: torch.dtype = torch.bfloat16,
        block_size: int = 16,
        storage: torch.dtype | None = None,
        seed: int = 0,
        trees: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        width = -(-max(contexts) // block_size)
        order = torch.randperm(width * len(contexts) + 3, generator=generator)[: width * len(contexts)]
        self.tables = order.view(len(contexts), width).numpy().astype(np.int64)
        self.batch = AttentionBatch(
            query_lens=lengths,
            context_lens=contexts,
            block_tables=self.tables,
            block_size=block_size,
            device=torch.device("cpu"),
            dtype=dtype,
            trees=trees,
        )
        storage = storage or dtype
        row = kv_forms.encode(torch.zeros(head_dim, dtype=dtype), storage).shape[0]
        shape = (2, len(contexts) * width + 3, block_size, kv_heads, row)
        # Bytes of ones are NaN in all types, and a scale that is NaN in front of codes.
        self.caches = torch.full((*shape[:-1], row * storage.itemsize), 255, dtype=torch.uint8).view(storage)
        self.texts = []
        for index, context in enumerate(contexts):
            text = torch.randn(2, context, kv_heads, head_dim, generator=generator).to(dtype)
            stored = kv_forms.encode(text, storage)
            self.texts.append(kv_forms.decode(stored, dtype))
            slots = torch.from_numpy(self.tables[index])[:, None] * block_size + torch.arange(block_size)
            self.caches.view(2, -1, kv_heads, row)[:, slots.view(-1)[:context]] = stored
        wide = torch.randn(sum(lengths), heads + 2 * kv_heads, head_dim, generator=generator).to(dtype)
        self.q = wide[:, :heads]
        self.scale = head_dim**-0.5

    def run(
        self,
        emulator: Emulator,
        *,
        window: int | None = None,
        soft_cap: float | None = None,
        tree_masks: Tensor | None = None,
    ) -> Tensor:
        return paged_attention(
            emulator,
            self.q,
            self.caches[0],
            self.caches[1],
            self.batch,
            scale=self.scale,
            window=window,
            soft_cap=soft_cap,
            tree_masks=tree_masks,
            splits=FEW_KEYS,
        )

    def expected(
        self, *, window: int | None = None, soft_cap: float | None = None, tree_masks: Tensor | None = None
    ) -> Tensor:
        """Token by token, head by head, in float64."""
        rows = []
        token = 0
        for index, length in enumerate(self.batch.query_lens):
            context = self.batch.context_lens[index]
            keys, values = self.texts[index].double()
            places = torch.arange(context)
            first = token
            masks = [int(mask) & (1 << 64) - 1 for mask in tree_masks] if tree_masks is not None else []
            if masks:
                places[context - length :] = (
                    context - length + torch.tensor([masks[first + j].bit_count() - 1 for j in range(length)])
                )
            for j in range(length):
                position = context - length + j
                seen = torch.arange(context) <= position
                if masks:
                    in_tree = [bool(masks[token] >> other & 1) for other in range(length)]
                    seen[context - length :] = torch.tensor(in_tree)
                    position = int(places[position])
                if window is not None:
                    seen &= places > position - window
                for head in range(self.q.shape[1]):
                    kv_head = head // (self.q.shape[1] // keys.shape[1])
                    scores = keys[seen, kv_head] @ self.q[token, head].double() * self.scale
                    if soft_cap is not None:
                        scores = soft_cap * torch.tanh(scores / soft_cap)
                    rows.append(scores.softmax(0) @ values[seen, kv_head])
                token += 1
        return torch.stack(rows).view(token, -1)


def assert_close(actual: Tensor, exact: Tensor) -> None:
    """Weights are rounded to the type before they meet the values: a few of its steps."""
    assert actual.shape == exact.shape
    assert not actual.isnan().any()
    steps = (actual.double() - exact).abs().max() / torch.finfo(actual.dtype).eps
    assert float(steps) < 1.5, f"off by {float(steps)} steps of 1"
