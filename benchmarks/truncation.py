"""What a cut does to the model: perplexity of held-out text read through a window that overflows.

    python -m benchmarks.truncation [--variant trireme-py-6m] [--window 2048]

Each text is read in chunks through the real decoder and a paged cache. Whenever the next chunk would
not fit, `policies.kv_truncation` says how much goes, and each reader makes room in its way:

    recompute   what stays is computed anew, as a text of its own: the reference
    rotated     keys and values stay; kept keys are turned to their new positions (`KeyRotation`)
    raw         keys leave the cache without a position and get the new one when they come back
    naive       the oldest tokens go, the first ones too; the keys of the rest stay rotated for their
                old positions while new tokens take the positions that follow the number of tokens
                kept: queries meet keys that seem to lie ahead of them, and positions occur twice
    naive_head  the same, but the first block stays, as it does with the three readers above

The figure is the perplexity of all tokens after the first cut; the bars are rotated / recompute <= 1.05
where naive / recompute >= 5, in the same run. Values and kept keys were computed while the dropped
tokens were visible, so rotated and raw are not equal to recompute, and need not be worse.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from benchmarks.fleet import CHECKPOINTS, write_result
from checkpoints.corpus import is_test_module, read_corpus
from trireme.kernels.attention_batch import AttentionBatch
from trireme.loading.whole import load_model
from trireme.models.model import Model
from trireme.models.rope import KeyRotation
from trireme.policies.kv_truncation import TruncationRule, plan_truncation

BLOCK = 16
CHUNK = 64
METHODS = ("recompute", "rotated", "raw", "naive", "naive_head")
LEAST_WINDOWS, MOST_WINDOWS = 4, 8
"""Texts of so many windows are read, and so much of longer ones."""
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Reader:
    """One text, read through a window, with its paged cache."""

    def __init__(self, model: Model, window: int, method: str) -> None:
        assert model.key_rotation is not None
        config = model.config
        self.model = model
        self.method = method
        self.held = 0
        """Tokens in the cache, at positions 0 .. held - 1 of what stays."""
        self._rotation = model.key_rotation
        shape = (window // BLOCK, BLOCK, config.num_kv_heads, config.head_dim)
        self._kv = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_layers)]
        self._table = list(range(shape[0]))

    def read(self, token_ids: Sequence[int]) -> Tensor:
        """Compute the next tokens; returns the logits behind each, (tokens, vocab)."""
        count = len(token_ids)
        batch = AttentionBatch(
            query_lens=[count],
            context_lens=[self.held + count],
            block_tables=np.array([self._table]),
            block_size=BLOCK,
            device=self.model.device,
            dtype=self.model.dtype,
        )
        positions = torch.arange(self.held, self.held + count)
        hidden = self.model.forward(torch.tensor(token_ids), positions, self._kv, batch)
        self.held += count
        return self.model.logits(hidden)

    def drop(self, head: int, stop: int, kept: Sequence[int]) -> None:
        """Drop positions [head, stop); `kept` are the tokens that stay."""
        if self.method == "recompute":
            self.held = 0
            for first in range(0, len(kept), CHUNK):
                self.read(kept[first : first + CHUNK])
            return
        if self.method == "naive":
            head, stop = 0, stop - head
        gone = self._table[head // BLOCK : stop // BLOCK]
        self._table = [block for block in self._table if block not in gone] + gone
        self.held -= stop - head
        moved = self._table[head // BLOCK : -(-self.held // BLOCK)]
        if self.method in ("naive", "naive_head"):
            return
        for keys, _ in self._kv:
            if self.method == "rotated":
                keys[moved] = self._rotation.turn(keys[moved], head - stop)
            else:
                before = torch.arange(stop, stop + len(moved) * BLOCK)
                rows = keys[moved].flatten(0, 1)
                raw = self._rotation.turn(rows, -before)
                keys[moved] = self._rotation.turn(raw, before + (head - stop)).view_as(keys[moved])


@torch.inference_mode()
def nats_after_first_cut(model: Model, token_ids: Sequence[int], window: int, method: str) -> list[float]:
    """Cost of each token that was read after the first cut."""
    reader = Reader(model, window, method)
    rule = TruncationRule(window=window, block_size=BLOCK)
    cut, nats, last = rule.head, list[float](), None
    for first in range(0, len(token_ids), CHUNK):
        chunk = token_ids[first : first + CHUNK]
        plan = plan_truncation(rule, first, reserved_tokens=len(chunk))
        if plan.dropped and plan.cut > cut:
            shift = plan.cut - cut
            reader.drop(rule.head, rule.head + shift, plan.keep(token_ids[:first]))
            cut = plan.cut
        logits = reader.read(chunk)
        if plan.dropped and last is not None:
            guesses = torch.cat((last, logits[:-1]))
            nats += functional.cross_entropy(guesses, torch.tensor(chunk), reduction="none").tolist()
        last = logits[-1:]
    return nats


def rounding_errors(rotation: KeyRotation, shape: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Largest error of unit-variance keys after 1, 4 and 8 turns, against one exact turn in float32."""
    keys = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    errors: dict[str, dict[str, float]] = {}
    for name, dtype in {"float32": torch.float32, **DTYPES}.items():
        moved, of_type = keys.to(dtype), dict[str, float]()
        for turns in range(1, 9):
            moved = rotation.turn(moved, -64)
            if turns in (1, 4, 8):
                exact = rotation.turn(keys.to(dtype).double().float(), -64 * turns)
                of_type[f"after_{turns}"] = float((moved.float() - exact).abs().max())
        errors[name] = of_type
    return errors


def measure(variant: str, window: int, modules: int) -> dict[str, object]:
    """All readers on the same texts."""
    model = load_model(CHECKPOINTS / variant)
    assert model.key_rotation is not None
    tokenizer = Tokenizer.from_file(str(CHECKPOINTS / variant / "tokenizer.json"))
    library = [module for module in read_corpus().held_out if not is_test_module(module.name)]
    encoded = [(module.name, tokenizer.encode(module.text).ids) for module in library]
    texts = [
        (name, ids[: MOST_WINDOWS * window]) for name, ids in encoded if len(ids) >= LEAST_WINDOWS * window
    ]
    nats: dict[str, list[float]] = {method: [] for method in METHODS}
    for name, ids in texts[:modules]:
        for method in METHODS:
            nats[method] += nats_after_first_cut(model, ids, window, method)
        print(name, {method: round(_perplexity(nats[method]), 3) for method in METHODS}, flush=True)
    perplexity = {method: _perplexity(costs) for method, costs in nats.items()}
    reference = perplexity["recompute"]
    shape = (4096, model.config.num_kv_heads, model.config.head_dim)
    return {
        "variant": variant,
        "window_tokens": window,
        "modules": {name: len(ids) for name, ids in texts[:modules]},
        "tokens_measured": len(nats["recompute"]),
        "perplexity": {name: round(value, 4) for name, value in perplexity.items()},
        "ratio_to_recompute": {name: round(value / reference, 4) for name, value in perplexity.items()},
        "largest_error_of_unit_variance_keys": rounding_errors(model.key_rotation, shape),
    }


def main() -> None:
    """Parse the command line, measure, and write the figures."""
    parser = argparse.ArgumentParser(description="Perplexity after the window overflowed.")
    parser.add_argument("--variant", default="trireme-py-6m")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--modules", type=int, default=8, help="at most")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    figures = measure(arguments.variant, arguments.window, arguments.modules)
    print(figures["perplexity"], figures["ratio_to_recompute"], sep="\n")
    print(write_result("truncation", figures))


def _perplexity(nats: Sequence[float]) -> float:
    return math.exp(math.fsum(nats) / len(nats)) if nats else math.nan


if __name__ == "__main__":
    main()
