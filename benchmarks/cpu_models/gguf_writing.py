"""Write a Llama checkpoint as GGUF, to the bit, and quantize it by llama.cpp's own code.

    .tools/llama_cpp/bin/python -m benchmarks.cpu_models.gguf_writing CHECKPOINT OUT.gguf Q8_0

Runs in llama.cpp's environment. The files have no tokenizer: what is measured gets token ids.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

from benchmarks.gguf_export import gguf_name, interleaved

FLOATS = ("F16", "BF16")
QUANTIZED = {
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q6_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}


def stored_bfloat16(path: Path) -> Iterable[tuple[str, np.ndarray]]:
    """The tensors of a bfloat16 safetensors file, as (name, uint16 bit patterns), mapped from the file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise SystemExit(f"{path}: {name} is {entry['dtype']}, not BF16")
        start, end = entry["data_offsets"]
        yield name, data[start:end].view(np.uint16).reshape(entry["shape"])


def write_gguf(
    config: Mapping[str, Any], tensors: Iterable[tuple[str, np.ndarray]], out: Path, form: str
) -> None:
    """Write a model of Hugging Face's names.

    Args:
        config: its config.json.
        tensors: (name, uint16 bit patterns of bfloat16), (outputs, inputs) or (width,).
        out: the file.
        form: of the matrices, F16 or BF16; vectors become float32. BF16 keeps every bit; F16 rounds what is
            below 2^-14.
    """
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_rope_freq_base(float(config["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{form}"))
    writer.add_tokenizer_model("none")
    for name, words in tensors:
        target = gguf_name(name)
        if "q_proj" in name:
            words = interleaved(words, heads)
        elif "k_proj" in name:
            words = interleaved(words, kv_heads)
        if words.ndim > 1 and form == "BF16":
            raw = np.ascontiguousarray(words).view(np.uint8)
            writer.add_tensor(target, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
            continue
        values = (words.astype(np.uint32) << 16).view(np.float32)
        writer.add_tensor(target, values if words.ndim == 1 else values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize_gguf(source: Path, out: Path, form: str) -> None:
    """Quantize all matrices of a BF16 file to one type, embedding and head included.

    A matrix whose rows are not whole blocks of the type keeps more bits; llama.cpp's log says so.
    """
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = QUANTIZED[form]
    params.allow_requantize = True  # BF16 is not among what it calls unquantized
    params.pure = True
    outcome = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params))
    if outcome:
        raise SystemExit(f"llama_model_quantize of {source.name} to {form} returned {outcome}")


def write_form(checkpoint: Path, out: Path, form: str) -> None:
    """Write a checkpoint in one of `FLOATS`, or of `QUANTIZED` from a BF16 file that stays beside it."""
    if form in QUANTIZED:
        source = out.with_name("BF16.gguf")
        if not source.exists():
            write_form(checkpoint, source, "BF16")
        quantize_gguf(source, out, form)
        return
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    write_gguf(config, stored_bfloat16(checkpoint / "model.safetensors"), out, form)


if __name__ == "__main__":
    write_form(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
