"""Measure what weights and KV in few bits cost the checkpoints, on modules they were not trained on.

    python checkpoints/quantized_quality.py --out checkpoints/quantized_quality.json

Each checkpoint is quantized to each format, loaded as a worker loads it, and run by the model and the
kernels that serve it; unquantized, it is run with its KV in each form. Bits per byte and next-line
accuracy are those of `evaluate.py`.
"""

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

if not __package__:  # started as a script: find the package, and only it, beside this file's folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from checkpoints.corpus import is_test_module, read_corpus
from checkpoints.evaluate import (
    CHOICE_QUESTIONS,
    DEFAULT,
    DRAFT,
    LARGE,
    TEXT_LIMIT_CHARS,
    WINDOW_TOKENS,
    Question,
    bits_per_byte,
    choice_accuracy,
    make_questions,
)
from trireme.engine.kv_memory import KvMemory
from trireme.kernels.attention_batch import AttentionBatch
from trireme.kernels.cpu_library import cpu_library
from trireme.kernels.kv_forms import KV_DTYPES
from trireme.loading.whole import load_model
from trireme.models.model import Model
from trireme.quant.formats import FORMATS, WeightFormat
from trireme.quant.report import bits_per_weight
from trireme.quant.weight_error import pooled
from trireme.quant.writing import quantize_checkpoint

BLOCK_TOKENS = 16
BARS_PERCENT = {"fp6_e2m3": 0.5, "int8_ch": 0.3, "int4_g64": 2.5}
"""What bits per byte may rise by, of the formats that the short names stand for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """What every checkpoint and format is asked."""

    texts: Sequence[str]
    questions: Sequence[Question]


class ServedModel:
    """A model of the engine as `evaluate.py` wants one: a sequence in, all its logits out.

    What a sequence shares with the one before stays in the KV cache, as a prefix does in the engine.
    """

    def __init__(self, model: Model, *, kv_dtype: str = "auto") -> None:
        config, blocks = model.config, -(-2 * WINDOW_TOKENS // BLOCK_TOKENS)
        self._model = model
        self._kv = KvMemory(model, num_blocks=blocks, block_size=BLOCK_TOKENS, kv_dtype=kv_dtype).layers
        self._blocks = np.arange(blocks, dtype=np.int64)[None]
        self._tokens: list[int] = []
        self._logits = torch.empty(0, config.vocab_size)

    def __call__(self, token_ids: Tensor) -> Tensor:
        tokens: list[int] = token_ids[0].tolist()
        known = 0
        for mine, theirs in zip(self._tokens, tokens[:-1], strict=False):
            if mine != theirs:
                break
            known += 1
        batch = AttentionBatch(
            query_lens=[len(tokens) - known],
            context_lens=[len(tokens)],
            block_tables=self._blocks,
            block_size=BLOCK_TOKENS,
            device=self._model.device,
            dtype=self._model.dtype,
        )
        positions = torch.arange(known, len(tokens))
        hidden = self._model.forward(token_ids[0, known:], positions, self._kv, batch)
        self._tokens = tokens
        self._logits = torch.cat((self._logits[:known], self._model.logits(hidden)))
        return self._logits[None]


def measure(checkpoint: Path, held_out: HeldOut, *, kv_dtype: str = "auto") -> dict[str, float]:
    """Bits per byte on library modules and next-line accuracy of one checkpoint, quantized or not."""
    served = ServedModel(load_model(checkpoint), kv_dtype=kv_dtype)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    return {
        "bits_per_byte_library": bits_per_byte(served, tokenizer, held_out.texts),
        "choice_accuracy": choice_accuracy(served, tokenizer, held_out.questions),
    }


def measure_format(source: Path, form: WeightFormat, held_out: HeldOut) -> dict[str, float]:
    """The same of a checkpoint in one format, and what it takes and how far its weights are off."""
    with tempfile.TemporaryDirectory() as directory:
        quantized = Path(directory) / "quantized"
        report = quantize_checkpoint(source, quantized, form)
        figures = measure(quantized, held_out)
    error = pooled(weight.error for weight in report.weights)
    return {
        "bits_per_weight": bits_per_weight(report),
        "relative_error": error.relative_frobenius,
        **figures,
    }


def measure_family(
    root: Path,
    names: Sequence[str],
    formats: Sequence[WeightFormat],
    kv_dtypes: Sequence[str],
    *,
    known: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Every format of every checkpoint, after each one all that is there so far; what is `known` stays."""
    modules = [module for module in read_corpus().held_out if not is_test_module(module.name)]
    held_out = HeldOut(
        texts=[module.text[:TEXT_LIMIT_CHARS] for module in modules],
        questions=make_questions(modules, count=CHOICE_QUESTIONS, seed=0),
    )
    library = cpu_library()
    figures = known | {
        "command": "python checkpoints/quantized_quality.py --out checkpoints/quantized_quality.json",
        "python": platform.python_version(),
        "kernels": "PyTorch on expanded weights" if library is None else f"native, {library.level.name}",
        "choice_questions": len(held_out.questions),
        "bars_percent": BARS_PERCENT,
    }
    for name in names:
        before = figures.get(name, {}).get("bf16") or measure(root / name, held_out)
        cases: dict[str, Callable[[], dict[str, float]]] = {"bf16": before.copy}
        cases |= {form.name: partial(measure_format, root / name, form, held_out) for form in formats}
        cases |= {
            f"bf16, KV {kv_dtype}": partial(measure, root / name, held_out, kv_dtype=kv_dtype)
            for kv_dtype in kv_dtypes
        }
        for case, measured in cases.items():
            row = measured()
            rise = row["bits_per_byte_library"] / before["bits_per_byte_library"] - 1
            row = {key: round(value, 5) for key, value in (row | {"over_bf16_percent": 100 * rise}).items()}
            print(name, case, row, flush=True)
            figures[name] = figures.get(name, {}) | {case: row}
            yield figures


def main() -> None:
    """Parse the command line, measure, and write the figures."""
    parser = argparse.ArgumentParser(description="Measure what few bits cost the checkpoints.")
    parser.add_argument("--root", type=Path, default=Path("checkpoints"))
    parser.add_argument("--out", type=Path, default=Path("checkpoints/quantized_quality.json"))
    parser.add_argument("--checkpoints", nargs="+", default=[DRAFT, DEFAULT, LARGE])
    parser.add_argument("--formats", nargs="*", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--kv-dtypes", nargs="*", choices=list(KV_DTYPES), default=["bf16", "int8", "fp8"])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    formats = [FORMATS[name] for name in arguments.formats]
    known = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    for figures in measure_family(
        arguments.root, arguments.checkpoints, formats, arguments.kv_dtypes, known=known
    ):
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
