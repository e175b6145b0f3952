"""Quantize a checkpoint directory into another one."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from trireme.errors import InvalidCheckpoint, InvalidConfiguration
from trireme.quant.bit_packing import pack
from trireme.quant.formats import WeightFormat
from trireme.quant.manifest import CODES, KEY, SCALES, ZEROS, Manifest, StoredWeight, manifest_fields
from trireme.quant.quantization import QuantizedWeight, quantize
from trireme.quant.weight_error import WeightError, weight_error
from trireme.quant.weight_files import (
    CONFIG,
    INDEX,
    SINGLE,
    open_weights,
    read_object,
    read_tensor,
    tensor_files,
    write_object,
)
from trireme.quant.weight_kinds import OPTIONAL_KINDS, is_stored_transposed, linear_kinds, weight_kind

_COPIED_SUFFIXES: Final = (".json", ".txt", ".model", ".jinja")
_COPIED_NAMES: Final = ("LICENSE", "NOTICE")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightReport:
    """One quantized matrix."""

    name: str
    kind: str
    """The last part of the name before `.weight`."""
    stored: StoredWeight
    error: WeightError


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationReport:
    """What became of a checkpoint."""

    form: WeightFormat
    weights: tuple[WeightReport, ...]
    bytes_before: int
    """Of all tensors, kept ones included."""
    bytes_after: int
    quantized_bytes: int
    """Of the codes, scales and zero points."""


def quantize_checkpoint(
    source: Path, out: Path, form: WeightFormat, *, also: Collection[str] = ()
) -> QuantizationReport:
    """Write `source` to `out` with the weights of its linear layers in `form`, the rest as it is.

    Reads and writes one safetensors file at a time. `out` appears when it is complete, or not at all;
    `config.json`, tokenizer, template and licence are carried over.

    Args:
        source: a checkpoint in Hugging Face layout.
        out: a directory that does not exist yet, or is empty.
        form: the format of the weights.
        also: of `OPTIONAL_KINDS`, what is to be quantized besides.

    Raises:
        InvalidCheckpoint: `source` is missing, damaged or quantized already, has no linear layers known here
            or nothing of `also`, or a weight that cannot be quantized: not finite, not a matrix, or not of
            whole groups.
        InvalidConfiguration: `out` is in use, or `also` names something else.
        OSError: `out` cannot be written.
    """
    unknown = set(also) - OPTIONAL_KINDS
    if unknown:
        raise InvalidConfiguration(
            f"{', '.join(sorted(unknown))} cannot be quantized on demand; "
            f"use {', '.join(sorted(OPTIONAL_KINDS))}",
            param="also",
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidConfiguration(f"{out} exists already; name a new directory", param="out")
    config = check_source(source)
    files = tensor_files(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        report = _write(source, files, unfinished, config, form, also)
        unfinished.chmod(0o755)  # made for its owner alone; a server may run as another user
        unfinished.replace(out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return report


def check_source(source: Path) -> dict[str, Any]:
    """Look whether a directory is a checkpoint that can be quantized, and read its `config.json`.

    Raises:
        InvalidCheckpoint: there is no such directory, or it is quantized already.
    """
    if not source.is_dir():
        raise InvalidCheckpoint(f"{source} is not a directory")
    config = read_object(source / CONFIG)
    for key in (KEY, "quantization_config"):
        if config.get(key) is not None:
            raise InvalidCheckpoint(f"{source} is quantized already (its {CONFIG} has {key})")
    return config


def _write(
    source: Path,
    files: Mapping[str, Path],
    directory: Path,
    config: Mapping[str, Any],
    form: WeightFormat,
    also: Collection[str],
) -> QuantizationReport:
    model_type = config.get("model_type")
    linear = linear_kinds(model_type)
    reports: list[WeightReport] = []
    weight_map: dict[str, str] = {}
    bytes_before = bytes_after = quantized_bytes = 0
    for file in dict.fromkeys(files.values()):
        handle = open_weights(file)
        written: dict[str, Tensor] = {}
        for name in (name for name, holder in files.items() if holder == file):
            tensor = read_tensor(handle, name, file)
            bytes_before += tensor.nbytes
            kind = weight_kind(name)
            if kind not in linear and kind not in also:
                written[name] = tensor
                continue
            is_transposed = is_stored_transposed(kind, model_type)
            parts, report = _quantized(name, kind, tensor.T if is_transposed else tensor, form, is_transposed)
            written |= parts
            reports.append(report)
            quantized_bytes += sum(part.nbytes for part in parts.values())
        bytes_after += sum(tensor.nbytes for tensor in written.values())
        _save(written, directory / file.name)
        weight_map |= dict.fromkeys(written, file.name)
    missing = set(also) - {report.kind for report in reports}
    if missing or not reports:
        wanted = ", ".join(sorted(missing or linear))
        raise InvalidCheckpoint(f"{source} has no weights to quantize of these kinds: {wanted}")
    for path in sorted(source.iterdir()):
        is_carried = path.suffix in _COPIED_SUFFIXES or path.stem in _COPIED_NAMES
        if path.is_file() and is_carried and not path.name.endswith(".index.json"):
            shutil.copyfile(path, directory / path.name)
    if set(weight_map.values()) != {SINGLE}:
        write_object(directory / INDEX, {"metadata": {"total_size": bytes_after}, "weight_map": weight_map})
    manifest = Manifest(form=form, weights={report.name: report.stored for report in reports})
    write_object(directory / CONFIG, {**config, KEY: manifest_fields(manifest)})
    return QuantizationReport(
        form=form,
        weights=tuple(reports),
        bytes_before=bytes_before,
        bytes_after=bytes_after,
        quantized_bytes=quantized_bytes,
    )


def _quantized(
    name: str, kind: str, matrix: Tensor, form: WeightFormat, is_transposed: bool
) -> tuple[Mapping[str, Tensor], WeightReport]:
    matrix = matrix.contiguous()
    quantized = quantize(matrix, form, name=name)
    rows, columns = matrix.shape
    report = WeightReport(
        name=name,
        kind=kind,
        stored=StoredWeight(shape=(rows, columns), is_transposed=is_transposed),
        error=weight_error(matrix, quantized),
    )
    return _parts(name, quantized), report


def _parts(name: str, weight: QuantizedWeight) -> Mapping[str, Tensor]:
    bits = weight.form.bits
    parts = {name + CODES: pack(weight.codes, bits), name + SCALES: weight.scales.contiguous()}
    return parts if weight.zeros is None else parts | {name + ZEROS: pack(weight.zeros, bits)}


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    path.chmod(0o644)  # safetensors leaves it to its owner
