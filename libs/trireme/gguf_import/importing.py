"""Write a GGUF file as a checkpoint directory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from trireme.errors import InvalidConfiguration
from trireme.gguf_import.architecture import Architecture, read_architecture
from trireme.gguf_import.container import GgufFile
from trireme.gguf_import.tensors import CODED, is_coded, read_codes, read_dense
from trireme.gguf_import.tokenizer import ImportedTokenizer, read_tokenizer
from trireme.quant.bit_packing import pack
from trireme.quant.manifest import CODES, KEY, SCALES, Manifest, StoredWeight, manifest_fields
from trireme.quant.weight_files import CONFIG, INDEX, SINGLE, write_object

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES: Final = 2 << 30
"""A file of weights is written when it holds so much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportReport:
    """What became of a file."""

    model_type: str
    forms: dict[str, int]
    """How many tensors there were of each type."""
    bytes_before: int
    """Of the tensors in the file."""
    bytes_after: int
    coded: int
    """Matrices that kept their codes."""


def import_gguf(
    source: Path, out: Path, *, dtype: str = "auto", shard_bytes: int = SHARD_BYTES
) -> ImportReport:
    """Write `source` to `out` in the layout of Hugging Face.

    `out` appears when it is complete, or not at all.

    Args:
        source: a GGUF file of a Llama, Mistral, Qwen2 or Qwen3.
        out: a directory that does not exist yet, or is empty.
        dtype: `auto` loses nothing: Q4_0 keeps its codes, float16 and bfloat16 stay, and what has no format
            here becomes float32. Or one of `DTYPES` for all.
        shard_bytes: see `SHARD_BYTES`.

    Raises:
        InvalidCheckpoint: the file is damaged or holds what is not read here.
        InvalidConfiguration: `out` is in use, or there is no such `dtype`.
        OSError: `out` cannot be written.
    """
    if dtype != "auto" and dtype not in DTYPES:
        known = ", ".join(("auto", *DTYPES))
        raise InvalidConfiguration(f"dtype {dtype!r} does not exist; use one of {known}", param="dtype")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidConfiguration(f"{out} exists already; name a new directory", param="out")
    file = GgufFile(source)
    architecture = read_architecture(file)
    tokenizer = read_tokenizer(
        file.metadata, source=str(source), vocabulary_size=architecture.config["vocab_size"]
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        writer = _ShardWriter(unfinished, shard_bytes)
        coded: dict[str, StoredWeight] = {}
        for name, parts in _weights(file, architecture, DTYPES.get(dtype), coded):
            writer.add(name, parts)
        writer.close()
        _write_fields(unfinished, architecture, tokenizer, coded)
        unfinished.chmod(0o755)  # made for its owner alone; a server may run as another user
        unfinished.replace(out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    forms: dict[str, int] = {}
    for stored in file.tensors.values():
        forms[stored.form.name] = forms.get(stored.form.name, 0) + 1
    return ImportReport(
        model_type=architecture.config["model_type"],
        forms=forms,
        bytes_before=sum(stored.size_bytes for stored in file.tensors.values()),
        bytes_after=writer.total_bytes,
        coded=len(coded),
    )


def _weights(
    file: GgufFile, architecture: Architecture, dtype: torch.dtype | None, coded: dict[str, StoredWeight]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each weight's tensors; `coded` is told of those that keep their codes."""
    for name, placement in architecture.placements.items():
        stored = file.tensors[name]
        if dtype is None and is_coded(stored):
            quantized = read_codes(file, stored, placement)
            rows, columns = stored.shape
            coded[placement.name] = StoredWeight(shape=(rows, columns))
            yield (
                placement.name,
                {
                    placement.name + CODES: pack(quantized.codes, CODED.bits),
                    placement.name + SCALES: quantized.scales.contiguous(),
                },
            )
        else:
            yield placement.name, {placement.name: read_dense(file, stored, placement, dtype)}


class _ShardWriter:
    """Writes weights as files of bounded size, and an index where there are several."""

    def __init__(self, directory: Path, shard_bytes: int) -> None:
        self.total_bytes = 0
        self._directory = directory
        self._shard_bytes = shard_bytes
        self._shard: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._files: list[dict[str, str]] = []

    def add(self, name: str, parts: dict[str, Tensor]) -> None:
        self._shard |= parts
        self._held_bytes += sum(part.nbytes for part in parts.values())
        if self._held_bytes >= self._shard_bytes:
            self._write()

    def close(self) -> None:
        if self._shard:
            self._write()
        if len(self._files) == 1:
            only = next(iter(self._files[0].values()))
            (self._directory / only).rename(self._directory / SINGLE)
            return
        weight_map = {name: file for held in self._files for name, file in held.items()}
        total = {"total_size": self.total_bytes}
        write_object(self._directory / INDEX, {"metadata": total, "weight_map": weight_map})

    def _write(self) -> None:
        name = f"model-{len(self._files) + 1:05d}.safetensors"
        path = self._directory / name
        try:
            save_file(self._shard, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
        path.chmod(0o644)  # safetensors leaves it to its owner
        self._files.append(dict.fromkeys(self._shard, name))
        self.total_bytes += self._held_bytes
        self._shard, self._held_bytes = {}, 0


def _write_fields(
    directory: Path,
    architecture: Architecture,
    tokenizer: ImportedTokenizer,
    coded: dict[str, StoredWeight],
) -> None:
    ends = list(tokenizer.eos_token_ids)
    said = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": ends or None}
    config: dict[str, Any] = {**architecture.config, **said}
    if coded:
        config[KEY] = manifest_fields(Manifest(form=CODED, weights=coded))
    write_object(directory / CONFIG, config)
    write_object(directory / "generation_config.json", said)
    write_object(directory / "tokenizer_config.json", dict(tokenizer.config))
    (directory / "tokenizer.json").write_text(tokenizer.tokenizer, encoding="utf-8")
