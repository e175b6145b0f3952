"""Engine models of published GPUs: measured layer operators, modelled attention and output head.

The measured part is Vidur's table (`data/README.md`). It has no attention, so attention is priced by a
roofline: reading keys and values at a share of the memory bandwidth, and multiplying at a share of the
peak. Both are added, which overrates a kernel that overlaps them perfectly. Host-side time per iteration
is not included.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib.resources import files
from typing import Final

from trireme.errors import InvalidConfiguration
from trireme.simulator.engine_model import EngineModel

BYTES = 2
"""Per element: FP16."""
BANDWIDTH_SHARE = 0.8
COMPUTE_SHARE = 0.5
"""Of the data sheet's figures, what attention reaches. Modelled, not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """Data-sheet figures."""

    bytes_per_s: float
    """Of device memory."""
    flops: float
    """FP16 with FP32 accumulation, dense."""
    link_bytes_per_s: float
    """To the host, one direction, what copies reach."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What attention and the output head depend on."""

    table_name: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocabulary: int


GPUS: Final = {
    "a40": Gpu(bytes_per_s=696e9, flops=149.7e12, link_bytes_per_s=25e9),
    "a100": Gpu(bytes_per_s=2039e9, flops=312e12, link_bytes_per_s=25e9),
    "h100": Gpu(bytes_per_s=3350e9, flops=989e12, link_bytes_per_s=50e9),
}
MODELS: Final = {
    "llama2-7b": Architecture(
        table_name="Llama-2-7b-hf",
        layers=32,
        query_heads=32,
        kv_heads=32,
        head_dim=128,
        hidden=4096,
        vocabulary=32000,
    ),
    "llama3-8b": Architecture(
        table_name="Meta-Llama-3-8B",
        layers=32,
        query_heads=32,
        kv_heads=8,
        head_dim=128,
        hidden=4096,
        vocabulary=128256,
    ),
    "codellama-34b": Architecture(
        table_name="CodeLlama-34b-Instruct-hf",
        layers=48,
        query_heads=64,
        kv_heads=8,
        head_dim=128,
        hidden=8192,
        vocabulary=32000,
    ),
}


def names() -> tuple[str, ...]:
    """The published profiles, such as a100-llama2-7b."""
    by_table_name = {model.table_name: name for name, model in MODELS.items()}
    return tuple(sorted({f"{gpu}-{by_table_name[table_name]}" for gpu, table_name in _table()}))


def published(name: str) -> EngineModel:
    """The model of a name from `names`.

    Raises:
        InvalidConfiguration: there is no such profile.
    """
    gpu_name, _, model_name = name.partition("-")
    model = MODELS.get(model_name)
    rows = _table().get((gpu_name, model.table_name)) if model is not None else None
    if model is None or rows is None:
        raise InvalidConfiguration(
            f"there is no profile {name!r}: give a file of `python -m benchmarks.iteration_profile`, "
            f"or one of {', '.join(names())}",
            param="--profile",
        )
    gpu = GPUS[gpu_name]
    bytes_per_s = BANDWIDTH_SHARE * gpu.bytes_per_s
    kv_bytes_per_token = 2 * BYTES * model.layers * model.kv_heads * model.head_dim
    # The head's weights are read once per iteration; its arithmetic for a few sampled rows hides behind.
    head_s = BYTES * model.hidden * model.vocabulary / bytes_per_s
    flops_per_pair = 4 * model.layers * model.query_heads * model.head_dim
    return EngineModel(
        name=name,
        knot_tokens=tuple(tokens for tokens, _, _ in rows),
        knot_s=tuple((model.layers * layer_ms + emb_ms) / 1000 + head_s for _, layer_ms, emb_ms in rows),
        per_kv_token_s=kv_bytes_per_token / bytes_per_s,
        per_pair_s=flops_per_pair / (COMPUTE_SHARE * gpu.flops),
        kv_bytes_per_token=kv_bytes_per_token,
        link_bytes_per_s=gpu.link_bytes_per_s,
        layers=model.layers,
    )


def _table() -> dict[tuple[str, str], list[tuple[int, float, float]]]:
    """(gpu, model) -> rows of (tokens, milliseconds of a layer, milliseconds of the embedding)."""
    rows: dict[tuple[str, str], list[tuple[int, float, float]]] = {}
    with (files("trireme.simulator") / "data" / "vidur_layers.csv").open(encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            measured = int(row["num_tokens"]), float(row["layer_ms"]), float(row["emb_ms"])
            rows.setdefault((row["gpu"], row["model"]), []).append(measured)
    return rows
