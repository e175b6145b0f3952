"""Our engine as a contestant: the one that serves, in process, with float32 activations."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.cpu_models.contestant import CONTEXT, MOST_SEQUENCES, answer_requests
from trireme.engine import EngineSettings, SamplingParams, SequenceRequest, build
from trireme.kernels.attention_batch import AttentionBatch
from trireme.kernels.cpu_library import cpu_library

_BLOCK_SIZE = 16


class Ours:
    """A checkpoint in Hugging Face layout, quantized by `trireme quantize` or not."""

    def __init__(self, checkpoint: Path, threads: int, dtype: str) -> None:
        torch.set_num_threads(threads)
        settings = EngineSettings(
            num_blocks=MOST_SEQUENCES * CONTEXT // _BLOCK_SIZE,
            block_size=_BLOCK_SIZE,
            max_num_seqs=MOST_SEQUENCES,
            max_batch_tokens=MOST_SEQUENCES * 32,
            max_model_len=CONTEXT,
        )
        self._engine = build(checkpoint, settings=settings)
        self._num_asked = 0
        library = cpu_library()
        level = "PyTorch, no CPU kernels" if library is None else library.level.name
        self.description = f"kernels {level}, float32 activations and KV"
        self.step_bytes = stored_step_bytes(checkpoint)

    def logits(self, tokens: Sequence[int]) -> Sequence[float]:
        model = self._engine.model
        config = model.config
        blocks = -(-len(tokens) // _BLOCK_SIZE)
        shape = (blocks, _BLOCK_SIZE, config.num_kv_heads, config.head_dim)
        batch = AttentionBatch(
            query_lens=[len(tokens)],
            context_lens=[len(tokens)],
            block_tables=np.arange(blocks, dtype=np.int64)[None],
            block_size=_BLOCK_SIZE,
            device=model.device,
            dtype=model.dtype,
        )
        kv = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_layers)]
        with torch.inference_mode():
            hidden = model.forward(torch.tensor(tokens), torch.arange(len(tokens)), kv, batch)
            found: list[float] = model.logits(hidden[-1:])[0].tolist()
        return found

    def prefill_s(self, tokens: Sequence[int]) -> float:
        started_s = time.perf_counter()
        self._add([tokens], answer=1)
        while self._engine.has_work:
            self._engine.step()
        return time.perf_counter() - started_s

    def decode_s(self, prompts: Sequence[Sequence[int]], steps: int) -> float:
        self._add(prompts, answer=steps + 1)
        if len(self._engine.step().outputs) != len(prompts):
            raise RuntimeError("the prompts do not fit one step: decoding would not start together")
        started_s = time.perf_counter()
        for _ in range(steps):
            if len(self._engine.step().outputs) != len(prompts):
                raise RuntimeError("a step left a sequence out")
        took_s = time.perf_counter() - started_s
        if self._engine.has_work:
            raise RuntimeError("the answers are longer than asked for")
        return took_s / steps

    def _add(self, prompts: Sequence[Sequence[int]], *, answer: int) -> None:
        for prompt in prompts:
            self._num_asked += 1
            self._engine.add(
                SequenceRequest(
                    sequence_id=str(self._num_asked),
                    prompt_token_ids=prompt,
                    sampling=SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True),
                    salt=str(self._num_asked).encode(),
                )
            )


def stored_step_bytes(checkpoint: Path) -> int:
    """Bytes of the weights that a step reads, as they are stored."""
    is_tied = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"]
    with (checkpoint / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    spans = [
        entry["data_offsets"]
        for name, entry in header.items()
        if name != "__metadata__" and (is_tied or "embed_tokens" not in name)
    ]
    return sum(end - start for start, end in spans)


if __name__ == "__main__":
    answer_requests(Ours)
