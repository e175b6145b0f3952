"""Checkpoints of 4-bit integers that GPTQ, AWQ or compressed-tensors wrote, read as our codes, without loss.

All three store codes u of 0 to 15, eight to an int32, and mean (u - zero) * scale. They differ in which of
the eight comes first, along which side of the matrix they lie, and in what a stored zero point counts from:

    method              codes of one int32   along      zero points
    gptq                0 1 2 3 4 5 6 7      inputs     stored less one; as they are in "gptq_v2"
    awq, gemm           0 2 4 6 1 3 5 7      outputs    as they are
    compressed-tensors  0 1 2 3 4 5 6 7      inputs     as they are; 8 where there are none

Lowest bits first. The first two store (inputs, outputs), the third (outputs, inputs).

Sources: AutoGPTQ and GPTQModel (QuantLinear.pack), AutoAWQ (packing_utils), compressed-tensors
(pack_to_int32): the order of bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from trireme.errors import InvalidCheckpoint
from trireme.quant.foreign_schemes import KEY, Method, parse_scheme
from trireme.quant.formats import GROUP_SIZES, WeightFormat, weight_format
from trireme.quant.quantization import QuantizedWeight
from trireme.quant.weight_files import CONFIG, open_weights, read_object, read_tensor, tensor_files

_PER_WORD: Final = 8
_SYMMETRIC_ZERO: Final = 8
_IN_ORDER: Final = (0, 1, 2, 3, 4, 5, 6, 7)
_AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbours lies in each nibble, lowest first."""
_CODES: Final = {Method.GPTQ: ".qweight", Method.AWQ: ".qweight", Method.COMPRESSED_TENSORS: ".weight_packed"}
_SCALE_TYPES: Final = (torch.float16, torch.bfloat16, torch.float32)


class ForeignCheckpoint:
    """The linear layers of an open checkpoint that another program quantized.

    Raises:
        InvalidCheckpoint: a file is missing or damaged, `quantization_config` says something that is not read
            here, or no weight is quantized.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / CONFIG
        self.scheme = parse_scheme(read_object(path).get(KEY), source=str(path))
        self._files = tensor_files(directory)
        self._handles: dict[Path, Any] = {file: open_weights(file) for file in set(self._files.values())}
        suffix = _CODES[self.scheme.method]
        stems = {name.removesuffix(suffix) for name in self._files if name.endswith(suffix)}
        if not stems:
            raise InvalidCheckpoint(f"{directory}: no tensor ends in {suffix}, though {CONFIG} has {KEY}")
        self._stems = {f"{stem}.weight": stem for stem in stems}
        self.form = self._whole_row_form() if self.scheme.has_whole_rows else self.scheme.form
        """The format of all quantized weights."""

    def __contains__(self, name: object) -> bool:
        return name in self._stems

    def weight(self, name: str) -> QuantizedWeight:
        """Read one quantized matrix, (output channels, input channels).

        Raises:
            InvalidCheckpoint: there is none of that name, its tensors have other shapes or types than the
                method asks for, its groups are not of one size, a scale is no scale, or a zero point cannot
                be had with 4 bits.
        """
        stem = self._stems.get(name)
        if stem is None:
            raise InvalidCheckpoint(f"{self.directory}: {name} is no quantized weight of it")
        if self.scheme.method is Method.COMPRESSED_TENSORS:
            codes, scales, zeros = self._compressed(stem)
            index = f"{stem}.weight_g_idx"
        else:
            codes, scales, zeros = self._grouped_by_rows(stem)
            index = f"{stem}.g_idx"
        return self._as_ours(name, codes, scales, zeros, self._order(index, codes.shape[1]))

    def close(self) -> None:
        """Unmap the files; what was read stays valid."""
        self._handles.clear()

    def _grouped_by_rows(self, stem: str) -> tuple[Tensor, Tensor, Tensor]:
        """GPTQ and AWQ: codes (M, K), scales and zero points (M, groups)."""
        is_gptq = self.scheme.method is Method.GPTQ
        packed = self._part(f"{stem}.qweight", torch.int32)
        if packed.dim() != 2:
            raise InvalidCheckpoint(
                f"{self.directory}: {stem}.qweight has shape {tuple(packed.shape)}; it must be a matrix"
            )
        codes = _unpacked(packed.T, _IN_ORDER) if is_gptq else _unpacked(packed, _AWQ_ORDER).T
        outputs, groups = codes.shape[0], self._groups(stem, codes.shape[1])
        scales = self._part(f"{stem}.scales", *_SCALE_TYPES, shape=(groups, outputs))
        words = self._part(f"{stem}.qzeros", torch.int32, shape=(groups, -(-outputs // _PER_WORD)))
        zeros = _unpacked(words, _IN_ORDER if is_gptq else _AWQ_ORDER)[:, :outputs]
        return codes, scales.T, zeros.T + self.scheme.zero_shift

    def _compressed(self, stem: str) -> tuple[Tensor, Tensor, Tensor]:
        shape = self._part(f"{stem}.weight_shape", torch.int64, torch.int32, shape=(2,)).tolist()
        outputs, inputs = int(shape[0]), int(shape[1])
        groups = self._groups(stem, inputs)
        words = -(-inputs // _PER_WORD)
        packed = self._part(f"{stem}.weight_packed", torch.int32, shape=(outputs, words))
        codes = _unpacked(packed, _IN_ORDER)[:, :inputs]
        scales = self._part(f"{stem}.weight_scale", *_SCALE_TYPES, shape=(outputs, groups))
        if not self.form.has_zeros:
            return codes, scales, torch.full((outputs, groups), _SYMMETRIC_ZERO, dtype=torch.uint8)
        name = f"{stem}.weight_zero_point"
        if self._part(name, torch.int32, torch.int8).dtype == torch.int8:
            # Its first versions stored them signed, and one to a byte.
            return codes, scales, self._part(name, torch.int8, shape=(outputs, groups)) + _SYMMETRIC_ZERO
        rows = -(-outputs // _PER_WORD)
        zeros = _unpacked(self._part(name, torch.int32, shape=(rows, groups)).T, _IN_ORDER).T
        return codes, scales, zeros[:outputs]

    def _as_ours(
        self, name: str, codes: Tensor, scales: Tensor, zeros: Tensor, order: Tensor | None
    ) -> QuantizedWeight:
        scales = scales.float()
        if not bool((torch.isfinite(scales) & (scales >= 0)).all()):
            raise InvalidCheckpoint(f"{self.directory}: scales of {name} must be finite and not negative")
        allowed = (0, 15) if self.form.has_zeros else (_SYMMETRIC_ZERO, _SYMMETRIC_ZERO)
        lowest, highest = int(zeros.min()), int(zeros.max())
        if lowest < allowed[0] or highest > allowed[1]:
            bad = highest if highest > allowed[1] else lowest
            raise InvalidCheckpoint(
                f"{self.directory}: {name} has zero point {bad}; "
                + (
                    "0 to 15 can be read"
                    if self.form.has_zeros
                    else "symmetric codes have 8: say that sym is false"
                )
            )
        if order is not None:
            codes = codes.index_select(1, order)
        if self.scheme.has_whole_rows:
            groups = self.form.groups(codes.shape[1])
            scales, zeros = scales.expand(-1, groups), zeros.expand(-1, groups)
        codes, zeros = codes.contiguous(), zeros.to(torch.uint8).contiguous()
        is_nothing = scales == 0
        if bool(is_nothing.any()):
            # A scale of 0 makes zeros of its group, whatever the codes say; ours must be positive.
            size = codes.shape[1] // scales.shape[1]
            hidden = is_nothing.repeat_interleave(size, dim=1)
            codes = torch.where(hidden, zeros.repeat_interleave(size, dim=1), codes)
            scales = torch.where(is_nothing, torch.ones_like(scales), scales)
        return QuantizedWeight(
            form=self.form,
            codes=codes,
            scales=scales.contiguous(),
            zeros=zeros if self.form.has_zeros else None,
            input_order=order,
        )

    def _whole_row_form(self) -> WeightFormat:
        """The largest groups that fill the rows of all weights: a row's scale stands for each of them."""
        widths = set()
        for stem in self._stems.values():
            shape = self._part(f"{stem}.qweight", torch.int32).shape
            widths.add(shape[0] * _PER_WORD)
        suffix = "_zeros" if self.scheme.form.has_zeros else ""
        fitting = [size for size in GROUP_SIZES if all(width % size == 0 for width in widths)]
        return weight_format(f"int4_g{max(fitting)}{suffix}") if fitting else self.scheme.form

    def _groups(self, stem: str, inputs: int) -> int:
        """Scales of one row, as they are stored."""
        size = self.form.group_size
        assert size is not None
        if inputs % size:
            raise InvalidCheckpoint(
                f"{self.directory}: {stem} has {inputs} input channels, no multiple of its group size {size}"
            )
        return 1 if self.scheme.has_whole_rows else inputs // size

    def _order(self, name: str, inputs: int) -> Tensor | None:
        """Input channels group by group, where those of a group are not neighbours (`desc_act`, actorder
        group); None: they are."""
        if name not in self._files or self.scheme.has_whole_rows:
            return None
        groups = self._part(name, torch.int32, torch.int64, shape=(inputs,)).long()
        assert self.form.group_size is not None
        in_order = torch.arange(inputs) // self.form.group_size
        if torch.equal(groups, in_order):
            return None
        order = groups.argsort(stable=True)
        if not torch.equal(groups[order], in_order):
            raise InvalidCheckpoint(
                f"{self.directory}: {name} must name {inputs // self.form.group_size} groups of "
                f"{self.form.group_size} input channels each"
            )
        return order

    def _part(self, name: str, *dtypes: torch.dtype, shape: Sequence[int] | None = None) -> Tensor:
        file = self._files.get(name)
        if file is None:
            raise InvalidCheckpoint(f"{self.directory}: tensor {name} is in none of its safetensors files")
        tensor = read_tensor(self._handles[file], name, file)
        wanted_shape = tuple(shape) if shape is not None else tuple(tensor.shape)
        if tensor.dtype not in dtypes or tuple(tensor.shape) != wanted_shape or 0 in tensor.shape:
            wanted = " or ".join(str(dtype) for dtype in dtypes)
            said = f" of shape {wanted_shape}" if shape is not None else ""
            raise InvalidCheckpoint(
                f"{file}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}; "
                f"{self.scheme.method.value} has {wanted}{said} here"
            )
        return tensor


def _unpacked(words: Tensor, order: Sequence[int]) -> Tensor:
    """(rows, words) int32 to (rows, 8 * words) uint8 codes of 4 bits."""
    rows, count = words.shape
    codes = torch.empty((rows, count, _PER_WORD), dtype=torch.uint8)
    for nibble, index in enumerate(order):
        codes[:, :, index] = (words >> (4 * nibble) & 0xF).to(torch.uint8)
    return codes.view(rows, -1)
