"""llama.cpp as a contestant, through llama-cpp-python's low-level calls: several sequences in one batch."""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as api
import numpy as np

from benchmarks.cpu_models.contestant import CONTEXT, MOST_SEQUENCES, answer_requests
from benchmarks.cpu_models.llama_cpp_install import BUILT

Row = tuple[int, int, int, bool]
"""Token, position, sequence, and whether its logits are wanted."""


class LlamaCpp:
    """A GGUF file, in llama.cpp's defaults but for threads, sequences and context."""

    def __init__(self, path: Path, threads: int, dtype: str) -> None:
        api.llama_backend_init()
        self._model: Any = api.llama_model_load_from_file(
            str(path).encode(), api.llama_model_default_params()
        )
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path.name}")
        params: Any = api.llama_context_default_params()
        params.n_ctx = MOST_SEQUENCES * CONTEXT
        params.n_batch = params.n_ubatch = CONTEXT
        params.n_seq_max = MOST_SEQUENCES
        params.n_threads = params.n_threads_batch = threads
        self._context: Any = api.llama_init_from_model(self._model, params)
        if not self._context:
            raise SystemExit("llama.cpp makes no context")
        self._batch: Any = api.llama_batch_init(CONTEXT, 0, 1)
        self._vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        built = json.loads(BUILT.read_text(encoding="utf-8")) if BUILT.exists() else {}
        self.description = f"llama-cpp-python {api.__version__}, {built.get('amx', 'AMX unknown')}"
        self.step_bytes = _step_bytes(path)

    def logits(self, tokens: Sequence[int]) -> Sequence[float]:
        self._clear()
        self._run(_prompt(tokens, 0))
        return [float(score) for score in self._scores(len(tokens) - 1)]

    def prefill_s(self, tokens: Sequence[int]) -> float:
        started_s = time.perf_counter()
        self._clear()
        self._run(_prompt(tokens, 0))
        self._choose(len(tokens) - 1)
        return time.perf_counter() - started_s

    def decode_s(self, prompts: Sequence[Sequence[int]], steps: int) -> float:
        self._clear()
        newest = []
        for sequence, prompt in enumerate(prompts):
            self._run(_prompt(prompt, sequence))
            newest.append(self._choose(len(prompt) - 1))
        started_s = time.perf_counter()
        for step in range(steps):
            self._run(
                [
                    (token, len(prompt) + step, sequence, True)
                    for sequence, (token, prompt) in enumerate(zip(newest, prompts, strict=True))
                ]
            )
            newest = [self._choose(row) for row in range(len(prompts))]
        return (time.perf_counter() - started_s) / steps

    def _clear(self) -> None:
        api.llama_memory_clear(api.llama_get_memory(self._context), False)

    def _run(self, rows: Sequence[Row]) -> None:
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, is_wanted) in enumerate(rows):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = is_wanted
        outcome = api.llama_decode(self._context, batch)
        if outcome:
            raise SystemExit(f"llama_decode of {len(rows)} tokens returned {outcome}")

    def _scores(self, row: int) -> np.ndarray:
        pointer = ctypes.cast(api.llama_get_logits_ith(self._context, row), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, (self._vocabulary,))

    def _choose(self, row: int) -> int:
        return int(self._scores(row).argmax())


def _prompt(tokens: Sequence[int], sequence: int) -> list[Row]:
    last = len(tokens) - 1
    return [(token, place, sequence, place == last) for place, token in enumerate(tokens)]


def _step_bytes(path: Path) -> int:
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    if "output.weight" in sizes:
        del sizes["token_embd.weight"]
    return sum(sizes.values())


if __name__ == "__main__":
    answer_requests(LlamaCpp)
