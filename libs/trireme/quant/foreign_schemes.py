"""The `quantization_config` of checkpoints that other programs quantized: what of it can be read here.

Sources: quantize_config.json of AutoGPTQ and GPTQModel; AWQ as transformers describes it; the schema of
compressed-tensors (config_groups, pack-quantized).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from trireme.errors import InvalidCheckpoint
from trireme.quant.formats import GROUP_SIZES, WeightFormat, weight_format

KEY: Final = "quantization_config"
"""In `config.json`."""


class Method(enum.Enum):
    """Who packed the codes, and thereby how."""

    GPTQ = "gptq"
    AWQ = "awq"
    COMPRESSED_TENSORS = "compressed-tensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignScheme:
    """How the quantized weights of a checkpoint are stored."""

    method: Method
    form: WeightFormat
    """What they become here, without loss. Where whole rows share a scale, groups as large as all rows have
    take its place: this is the smallest."""
    has_whole_rows: bool = False
    """All input channels of a row share one scale."""
    zero_shift: int = 0
    """To be added to stored zero points: 1 in GPTQ's first version."""


def parse_scheme(raw: object, *, source: str) -> ForeignScheme:
    """Read the object.

    Raises:
        InvalidCheckpoint: the method or one of its options cannot be read here; names `source`, the field and
            what is read.
    """
    fields = _Fields(raw, source, KEY)
    name = fields.raw.get("quant_method")
    try:
        method = Method(name)
    except ValueError:
        known = ", ".join(method.value for method in Method)
        raise InvalidCheckpoint(
            f"{source}: {KEY}.quant_method is {name!r}; codes of {known} are read here, or give the "
            "weights before quantization"
        ) from None
    match method:
        case Method.GPTQ:
            return _gptq(fields)
        case Method.AWQ:
            return _awq(fields)
        case Method.COMPRESSED_TENSORS:
            return _compressed_tensors(fields)


class _Fields:
    """One JSON object; every error names the file and the field."""

    def __init__(self, raw: object, source: str, at: str) -> None:
        if not isinstance(raw, Mapping):
            raise InvalidCheckpoint(f"{source}: {at} is {raw!r}; it must be an object")
        self.raw: Mapping[str, Any] = raw
        self._source = source
        self._at = at

    def inner(self, name: str) -> _Fields:
        return _Fields(self.raw.get(name), self._source, f"{self._at}.{name}")

    def only(self) -> _Fields:
        if len(self.raw) != 1:
            raise InvalidCheckpoint(
                f"{self._source}: {self._at} has {len(self.raw)} groups; one for all linear layers is read "
                "here"
            )
        return self.inner(next(iter(self.raw)))

    def one_of(self, name: str, *allowed: object) -> Any:
        """A value that must be one of `allowed`; None stands for absent and null."""
        value = self.raw.get(name)
        if not any(value == one and type(value) is type(one) for one in allowed):
            said = ", ".join("absent" if one is None else repr(one) for one in allowed)
            raise InvalidCheckpoint(
                f"{self._source}: {self._at}.{name} is {value!r}; only {said} is read here"
            )
        return value

    def must_be_empty(self, name: str) -> None:
        value = self.raw.get(name)
        if value not in (None, False) and value != {} and value != []:
            raise InvalidCheckpoint(f"{self._source}: {self._at}.{name} is {value!r}, which is not read here")

    def int4(self, group_size: object, *, has_zeros: bool) -> WeightFormat:
        if type(group_size) is not int or group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise InvalidCheckpoint(
                f"{self._source}: {self._at}.group_size is {group_size!r}; groups of {sizes} are read here"
            )
        return weight_format(f"int4_g{group_size}" + ("_zeros" if has_zeros else ""))


def _gptq(fields: _Fields) -> ForeignScheme:
    fields.one_of("bits", 4)
    fields.one_of("pack_dtype", None, "int32")
    fields.must_be_empty("dynamic")
    fields.must_be_empty("is_marlin_format")
    version = fields.one_of("checkpoint_format", None, "gptq", "gptq_v2")
    is_symmetric = fields.one_of("sym", None, True, False) is True
    size = fields.raw.get("group_size")
    has_whole_rows = type(size) is int and size == -1
    return ForeignScheme(
        method=Method.GPTQ,
        form=fields.int4(min(GROUP_SIZES) if has_whole_rows else size, has_zeros=not is_symmetric),
        has_whole_rows=has_whole_rows,
        zero_shift=0 if version == "gptq_v2" else 1,
    )


def _awq(fields: _Fields) -> ForeignScheme:
    fields.one_of("w_bit" if "w_bit" in fields.raw else "bits", 4)
    fields.one_of("version", None, "gemm", "GEMM")
    fields.one_of("zero_point", None, True)
    size = fields.raw.get("q_group_size" if "q_group_size" in fields.raw else "group_size")
    return ForeignScheme(method=Method.AWQ, form=fields.int4(size, has_zeros=True))


def _compressed_tensors(fields: _Fields) -> ForeignScheme:
    fields.one_of("format", "pack-quantized")
    for name in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        fields.must_be_empty(name)
    group = fields.inner("config_groups").only()
    for name in ("input_activations", "output_activations"):
        group.must_be_empty(name)
    group.one_of("format", None, "pack-quantized")
    weights = group.inner("weights")
    weights.one_of("num_bits", 4)
    weights.one_of("type", None, "int")
    weights.one_of("strategy", "group")
    is_symmetric = weights.one_of("symmetric", None, True, False) is not False
    return ForeignScheme(
        method=Method.COMPRESSED_TENSORS,
        form=weights.int4(weights.raw.get("group_size"), has_zeros=not is_symmetric),
    )
