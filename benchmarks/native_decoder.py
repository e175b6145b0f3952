"""One decoding step of a model on the CPU: one native call, the scores apart, or operator by operator.

    python -m benchmarks.native_decoder [--steps 60]

Random models of bfloat16 weights, one thread, float32 activations; sequences of 64 tokens that each get one
more. The three ways run in turns on the same model; a figure is the median over the steps of the thread's CPU
time, which others on the machine lengthen little.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from benchmarks.fleet import write_result
from trireme.kernels.attention_batch import AttentionBatch
from trireme.loading.whole import load_model
from trireme.models.decoder import Decoder

CONTEXT = 64
BLOCK = 16
SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
KINDS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Gemma": {},
    "Gemma2": {"sliding_window": 32, "query_pre_attn_scalar": 64},
    "Gemma3": {"sliding_window": 32, "query_pre_attn_scalar": 64},
}


def built(kind: str) -> Decoder:
    """A random model of a family, saved and loaded as any other."""
    name = "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config"
    torch.manual_seed(0)
    config = getattr(transformers, name)(**SIZES, **KINDS[kind])
    with tempfile.TemporaryDirectory() as directory:
        getattr(transformers, f"{kind}ForCausalLM")(config).bfloat16().save_pretrained(directory)
        model = load_model(Path(directory))
    assert isinstance(model, Decoder) and model._native is not None
    return model


def step_of(model: Decoder, sequences: int) -> Callable[[bool], tuple[Tensor, Tensor]]:
    """One token of each sequence; told whether the scores are to be of the same call."""
    config = model.config
    per_sequence = CONTEXT // BLOCK
    shape = (sequences * per_sequence, BLOCK, config.num_kv_heads, config.head_dim)
    kv = [(torch.randn(shape), torch.randn(shape)) for _ in range(config.num_layers)]
    tables = np.arange(sequences * per_sequence).reshape(sequences, per_sequence)
    tokens = torch.arange(sequences) + 7
    positions = torch.full((sequences,), CONTEXT - 1)

    @torch.inference_mode()
    def step(is_one_call: bool) -> tuple[Tensor, Tensor]:
        batch = AttentionBatch(
            query_lens=[1] * sequences,
            context_lens=[CONTEXT] * sequences,
            block_tables=tables,
            block_size=BLOCK,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        if is_one_call:
            return model.forward_scored(tokens, positions, kv, batch, None)
        hidden = model.forward(tokens, positions, kv, batch)
        return hidden, model.logits(hidden)

    return step


def measure(kind: str, sequences: int, steps: int) -> dict[str, object]:
    """Microseconds of a step, each way."""
    model = built(kind)
    native, step = model._native, step_of(model, sequences)
    taken: dict[str, list[float]] = {"one_call": [], "scores_apart": [], "operators": []}
    for number in range(steps + 5):
        for way, found in taken.items():
            model._native = None if way == "operators" else native
            started_s = time.thread_time()
            step(way == "one_call")
            if number >= 5:  # the first ones warm up
                found.append(1e6 * (time.thread_time() - started_s))
    medians = {f"{way}_us": round(statistics.median(found), 1) for way, found in taken.items()}
    ratio = statistics.median(taken["operators"]) / statistics.median(taken["one_call"])
    return {"model": kind, "sequences": sequences, **medians, "operators_over_one_call": round(ratio, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(kind, sequences, arguments.steps) for kind in KINDS for sequences in (1, 4, 16)]
    path = write_result("native_decoder", {"threads": 1, "sizes": SIZES, "rows": rows})
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
