"""GGUF files as llama.cpp's converter writes them, by the `gguf` package's own names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Form
from numpy.typing import NDArray

from tests.unit.gguf_blocks import SCALE_PLACES

BYTES = [chr(256 + code) for code in range(100)]
"""Tokens of a byte-level vocabulary that nothing is merged to."""


def interleaved(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """As llama.cpp's converter permutes queries and keys of a Llama."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def packed(weight: NDArray[np.float32], form: Form, seed: int = 0) -> NDArray[Any]:
    """A matrix in a type. The package writes no K types: there random codes and scales stand for it."""
    if form not in SCALE_PLACES:
        return np.asarray(gguf.quants.quantize(weight, form))
    rng = np.random.default_rng(seed)
    block, block_bytes = gguf.GGML_QUANT_SIZES[form]
    blocks = rng.integers(0, 256, (weight.size // block, block_bytes), dtype=np.uint8)
    for place in SCALE_PLACES[form]:
        scales = rng.uniform(1e-5, 1e-4, (len(blocks), 1)).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8)
    return blocks.reshape(weight.shape[0], -1)


def tensors_of(model: Any) -> dict[str, NDArray[np.float32]]:
    """A model of transformers, by Hugging Face's names."""
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return {name: tensor.float().numpy() for name, tensor in state.items()}


def as_stored(model: Any, form: Form) -> dict[str, tuple[str, NDArray[Any], Form]]:
    """Name in the file, bytes and type of each tensor, by Hugging Face's name; vectors stay float32."""
    config = model.config
    arch = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
    names = gguf.get_tensor_name_map(arch[config.model_type], config.num_hidden_layers)
    stored = {}
    for number, (name, weight) in enumerate(sorted(tensors_of(model).items())):
        if config.model_type == "llama" and ".q_proj." in name:
            weight = interleaved(weight, config.num_attention_heads)
        if config.model_type == "llama" and ".k_proj." in name:
            weight = interleaved(weight, config.num_key_value_heads)
        short = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert short is not None, name
        kind = form if weight.ndim == 2 else Form.F32
        data = packed(weight, kind, seed=number) if weight.ndim == 2 else weight
        stored[name] = (short, data, kind)
    return stored


def write_gguf(
    path: Path,
    model: Any,
    form: Form = Form.F32,
    *,
    tokenizer: Mapping[str, Any] | None = None,
    rope_factors: Sequence[float] = (),
) -> Path:
    """Write a model of transformers; without a tokenizer it has one of as many tokens as it has rows."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rest = [f"<unused {index}>" for index in range(config.vocab_size - len(BYTES))]
    for key, value in (tokenizer or {"model": "gpt2", "pre": "gpt-2", "tokens": [*BYTES, *rest]}).items():
        if isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"tokenizer.ggml.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"tokenizer.ggml.{key}", value)
        else:
            writer.add_array(f"tokenizer.ggml.{key}", value)
    for name, data, kind in as_stored(model, form).values():
        writer.add_tensor(name, data, raw_dtype=kind)
    if rope_factors:
        writer.add_tensor("rope_freqs.weight", np.array(rope_factors, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
