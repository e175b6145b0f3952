"""The `quantization` object of a checkpoint's `config.json`: what its weights became."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from trireme.errors import InvalidCheckpoint
from trireme.quant.formats import FORMATS, WeightFormat
from trireme.quant.quantization import check_shape

KEY: Final = "quantization"
"""In `config.json`."""
VERSION: Final = 1
DENSE: Final = "dense_v1"
"""Layout id of codes as `bit_packing` writes them, row by row. The only one that is stored."""
CODES: Final = ".codes"
SCALES: Final = ".scales"
ZEROS: Final = ".zeros"
"""What follows a quantized weight's name in the names of its tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeight:
    """One quantized matrix of a checkpoint."""

    shape: tuple[int, int]
    """Output channels, input channels: that of the codes."""
    is_transposed: bool = False
    """Whether the architecture stores the weight as (input, output) and the codes are its transpose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything needed to read the quantized weights, beside their tensors."""

    form: WeightFormat
    weights: Mapping[str, StoredWeight]
    """By the name that the weight had before."""


def manifest_fields(manifest: Manifest) -> dict[str, Any]:
    """The object, ready for JSON."""
    form = manifest.form
    return {
        "format": form.name,
        "bits": form.bits,
        "group_size": form.group_size,
        "has_zeros": form.has_zeros,
        "layout": DENSE,
        "version": VERSION,
        "weights": {
            name: {"shape": list(weight.shape), "transposed": weight.is_transposed}
            for name, weight in manifest.weights.items()
        },
    }


def parse_manifest(config: Mapping[str, Any], *, source: str) -> Manifest:
    """Read the object out of a parsed `config.json`.

    Raises:
        InvalidCheckpoint: it is missing or malformed, or its version, layout or format is unknown; names
            `source` and the field.
    """
    raw = config.get(KEY)
    if not isinstance(raw, dict):
        raise InvalidCheckpoint(f"{source} has no {KEY} object: this is no quantized checkpoint")
    _expect(raw, "version", VERSION, source)
    _expect(raw, "layout", DENSE, source)
    name = raw.get("format")
    form = FORMATS.get(name) if isinstance(name, str) else None
    if form is None:
        raise InvalidCheckpoint(
            f"{source}: {KEY}.format is {name!r}; this version reads {', '.join(FORMATS)}"
        )
    for field, value in (("bits", form.bits), ("group_size", form.group_size), ("has_zeros", form.has_zeros)):
        _expect(raw, field, value, source)
    weights = raw.get("weights")
    if not isinstance(weights, dict) or not weights:
        raise InvalidCheckpoint(f"{source}: {KEY}.weights must be an object that names at least one weight")
    return Manifest(
        form=form,
        weights={name: _parse_weight(name, value, form, source) for name, value in weights.items()},
    )


def _expect(raw: Mapping[str, Any], field: str, wanted: object, source: str) -> None:
    found = raw.get(field)
    # true is 1 in Python, but not in a file.
    if found != wanted or type(found) is not type(wanted):
        raise InvalidCheckpoint(
            f"{source}: {KEY}.{field} is {found!r}; it must be {wanted!r} to be read here"
        )


def _parse_weight(name: str, value: object, form: WeightFormat, source: str) -> StoredWeight:
    fields = value if isinstance(value, dict) else {}
    shape, transposed = fields.get("shape"), fields.get("transposed")
    is_shape = isinstance(shape, list) and len(shape) == 2 and all(type(size) is int for size in shape)
    if not isinstance(shape, list) or not is_shape or min(shape) < 1 or not isinstance(transposed, bool):
        raise InvalidCheckpoint(
            f"{source}: {KEY}.weights[{name!r}] is {value!r}; it must hold a shape of two positive integers "
            "and transposed"
        )
    check_shape((shape[0], shape[1]), form, name=f"{source}: {name}")
    return StoredWeight(shape=(shape[0], shape[1]), is_transposed=transposed)
