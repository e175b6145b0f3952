"""Compute with a small model of each type that is measured: whether this build of llama.cpp lives."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.cpu_models.gguf_writing import FLOATS, QUANTIZED, quantize_gguf, write_gguf
from benchmarks.cpu_models.llama_cpp_peer import LlamaCpp

_CONFIG = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
}
_SHAPES = {
    "model.embed_tokens": (512, 256),
    "model.norm": (256,),
    "lm_head": (512, 256),
    "model.layers.0.input_layernorm": (256,),
    "model.layers.0.post_attention_layernorm": (256,),
    "model.layers.0.self_attn.q_proj": (256, 256),
    "model.layers.0.self_attn.k_proj": (128, 256),
    "model.layers.0.self_attn.v_proj": (128, 256),
    "model.layers.0.self_attn.o_proj": (256, 256),
    "model.layers.0.mlp.gate_proj": (512, 256),
    "model.layers.0.mlp.up_proj": (512, 256),
    "model.layers.0.mlp.down_proj": (256, 512),
}


def tensors() -> Iterator[tuple[str, np.ndarray]]:
    """Random matrices, norms of one, as bit patterns of bfloat16."""
    rng = np.random.default_rng(0)
    for name, shape in _SHAPES.items():
        values = np.ones(shape) if len(shape) == 1 else rng.standard_normal(shape) / 16
        yield f"{name}.weight", (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        for form in ("BF16", *(other for other in (*FLOATS, *QUANTIZED) if other != "BF16")):
            path = Path(directory) / f"{form}.gguf"
            if form in QUANTIZED:
                quantize_gguf(path.with_name("BF16.gguf"), path, form)
            else:
                write_gguf(_CONFIG, tensors(), path, form)
            model = LlamaCpp(path, 2, "")
            model.prefill_s(range(128))
            model.decode_s([[1, 2, 3]] * 4, 2)
            if not np.isfinite(model.logits([1, 2, 3])).all():
                raise SystemExit(f"{form}: logits are not finite")


if __name__ == "__main__":
    main()
