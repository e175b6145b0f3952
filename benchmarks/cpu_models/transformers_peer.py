"""transformers as a contestant: PyTorch on the checkpoint, without the loop of `generate` around it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.cpu_models.contestant import answer_requests


class Transformers:
    """A checkpoint in Hugging Face layout, its weights and activations in `dtype`."""

    def __init__(self, checkpoint: Path, threads: int, dtype: str) -> None:
        torch.set_num_threads(threads)
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=getattr(torch, dtype)
        )
        self._model.eval()
        self.description = f"transformers {transformers.__version__}, torch {torch.__version__}, {dtype}"
        embedding, head = (
            self._model.get_input_embeddings().weight,
            self._model.get_output_embeddings().weight,
        )
        unread = 0 if head is embedding else embedding.nbytes
        self.step_bytes = sum(weight.nbytes for weight in self._model.parameters()) - unread

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> Sequence[float]:
        found: list[float] = self._run(torch.tensor([tokens]), None).logits[0, -1].float().tolist()
        return found

    @torch.inference_mode()
    def prefill_s(self, tokens: Sequence[int]) -> float:
        started_s = time.perf_counter()
        self._run(torch.tensor([tokens]), None).logits[:, -1].argmax(-1).tolist()
        return time.perf_counter() - started_s

    @torch.inference_mode()
    def decode_s(self, prompts: Sequence[Sequence[int]], steps: int) -> float:
        output = self._run(torch.tensor(prompts), None)
        started_s = time.perf_counter()
        for _ in range(steps):
            newest = output.logits[:, -1:].argmax(-1)
            output = self._run(newest, output.past_key_values)
        output.logits[:, -1].argmax(-1).tolist()
        return (time.perf_counter() - started_s) / steps

    def _run(self, tokens: torch.Tensor, past: Any) -> Any:
        return self._model(tokens, past_key_values=past, use_cache=True, logits_to_keep=1)


if __name__ == "__main__":
    answer_requests(Transformers)
