"""OpenVINO as a contestant: a model that optimum-intel exported, without the loop of `generate` around it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from openvino import opset13

from benchmarks.cpu_models.contestant import answer_requests


class OpenVino:
    """A directory with openvino_model.xml, in OpenVINO's defaults for one stream of work."""

    def __init__(self, directory: Path, threads: int, dtype: str) -> None:
        core: Any = openvino.Core()
        model = core.read_model(directory / "openvino_model.xml")
        _score_last_tokens_alone(model)
        compiled = core.compile_model(
            model, "CPU", {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        )
        self._inputs = {name for each in compiled.inputs for name in each.get_names()}
        self._request = compiled.create_infer_request()
        settings = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
        described = ", ".join(f"{name.lower()} {_shown(compiled.get_property(name))}" for name in settings)
        self.description = f"openvino {openvino.__version__}, {described}"
        self.step_bytes = _step_bytes(model)

    def logits(self, tokens: Sequence[int]) -> Sequence[float]:
        self._request.reset_state()
        return [float(score) for score in self._run(np.array([tokens]), len(tokens))[0, -1]]

    def prefill_s(self, tokens: Sequence[int]) -> float:
        started_s = time.perf_counter()
        self._request.reset_state()
        self._run(np.array([tokens]), len(tokens))[:, -1].argmax(-1)
        return time.perf_counter() - started_s

    def decode_s(self, prompts: Sequence[Sequence[int]], steps: int) -> float:
        self._request.reset_state()
        seen = len(prompts[0])
        newest = self._run(np.array(prompts), seen)[:, -1:].argmax(-1)
        started_s = time.perf_counter()
        for step in range(1, steps + 1):
            newest = self._run(newest, seen + step)[:, -1:].argmax(-1)
        return (time.perf_counter() - started_s) / steps

    def _run(self, tokens: np.ndarray, seen: int) -> np.ndarray:
        """Scores after the last token of each sequence, (sequences, 1, vocabulary)."""
        rows, count = tokens.shape
        inputs = {
            "input_ids": tokens.astype(np.int64),
            "attention_mask": np.ones((rows, seen), dtype=np.int64),
            "position_ids": np.broadcast_to(np.arange(seen - count, seen, dtype=np.int64), (rows, count)),
            "beam_idx": np.arange(rows, dtype=np.int32),
        }
        self._request.infer({name: value for name, value in inputs.items() if name in self._inputs})
        scores: np.ndarray = self._request.get_tensor("logits").data
        return scores


def _score_last_tokens_alone(model: Any) -> None:
    """Let the head see the last token of each sequence, as OpenVINO's server does: prefill needs no other."""
    product = model.output("logits").get_node().input_value(0).get_node()
    while product.get_type_name() != "MatMul":
        product = product.input_value(0).get_node()
    last = opset13.slice(product.input_value(0), [-1], [-2], [-1], [1])
    product.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


def _step_bytes(model: Any) -> int:
    constants = [each for each in model.get_ops() if each.get_type_name() == "Constant"]
    heads = [each for each in constants if "lm_head" in each.get_friendly_name()]
    return sum(
        each.get_byte_size()
        for each in constants
        if not (heads and "embed_tokens" in each.get_friendly_name())
    )


def _shown(value: Any) -> str:
    return value.get_type_name() if hasattr(value, "get_type_name") else str(value)


if __name__ == "__main__":
    answer_requests(OpenVino)
