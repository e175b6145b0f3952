"""Read a quantized checkpoint: codes and scales as they were written, and what stayed in high precision."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import Tensor

from trireme.errors import InvalidCheckpoint
from trireme.quant.bit_packing import packed_bytes, unpack
from trireme.quant.formats import WeightFormat
from trireme.quant.manifest import CODES, SCALES, ZEROS, Manifest, parse_manifest
from trireme.quant.quantization import QuantizedWeight, dequantize
from trireme.quant.weight_files import CONFIG, open_weights, read_object, tensor_files


class QuantizedCheckpoint:
    """An open quantized checkpoint; a context manager that closes its files.

    Raises:
        InvalidCheckpoint: `directory` is none: a file is missing or damaged, its version, layout or format is
            unknown, or a weight lacks its codes, scales or zero points.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise InvalidCheckpoint(f"{self.directory} is not a directory")
        path = self.directory / CONFIG
        self.raw_config = read_object(path)
        self.manifest: Manifest = parse_manifest(self.raw_config, source=str(path))
        files = tensor_files(self.directory)
        opened = {file: open_weights(file) for file in set(files.values())}
        self._handles: dict[str, Any] = {name: opened[file] for name, file in files.items()}
        self._check_complete()

    @property
    def form(self) -> WeightFormat:
        """The format of all quantized weights."""
        return self.manifest.form

    def __contains__(self, name: object) -> bool:
        return name in self.manifest.weights

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the tensors that were not quantized, sorted."""
        parts = {f"{name}{part}" for name in self.manifest.weights for part in (CODES, SCALES, ZEROS)}
        return tuple(sorted(self._handles.keys() - parts))

    def tensor(self, name: str) -> Tensor:
        """Read a tensor that was not quantized, in the type it is stored in.

        Raises:
            InvalidCheckpoint: there is none of that name, or it cannot be read.
        """
        if name in self.manifest.weights:
            raise InvalidCheckpoint(f"{self.directory}: {name} is quantized; read it as a weight")
        return self._read(name)

    def weight(self, name: str) -> QuantizedWeight:
        """Read one quantized matrix, (output channels, input channels).

        Raises:
            InvalidCheckpoint: there is none of that name, or its tensors have other shapes or types than the
                format asks for, or hold what no quantizer writes: scales that are no scales, padding that is
                not zero.
        """
        stored = self.manifest.weights.get(name)
        if stored is None:
            raise InvalidCheckpoint(f"{self.directory}: {name} is no quantized weight of it")
        form = self.manifest.form
        rows, columns = stored.shape
        groups = form.groups(columns)
        packed = self._part(name + CODES, (rows, packed_bytes(columns, form.bits)), torch.uint8)
        per_scale = (rows,) if form.group_size is None else (rows, groups)
        scales = self._part(name + SCALES, per_scale, torch.float32)
        sizes = scales.abs() if form.has_signed_scales else scales
        if not bool((torch.isfinite(sizes) & (sizes > 0)).all()):
            wanted = "not zero" if form.has_signed_scales else "positive"
            raise InvalidCheckpoint(f"{self.directory}: {name}{SCALES} must be finite and {wanted}")
        zeros = None
        if form.has_zeros:
            packed_zeros = self._part(name + ZEROS, (rows, packed_bytes(groups, form.bits)), torch.uint8)
            zeros = self._unpacked(name + ZEROS, packed_zeros, groups)
        codes = self._unpacked(name + CODES, packed, columns)
        return QuantizedWeight(form=form, codes=codes, scales=scales, zeros=zeros)

    def dequantized(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Any tensor in high precision, of the shape that it had before, as `dtype`.

        Raises:
            InvalidCheckpoint: as `weight` and `tensor`.
        """
        stored = self.manifest.weights.get(name)
        if stored is None:
            return self.tensor(name).to(dtype)
        matrix = dequantize(self.weight(name), dtype)
        return matrix.T.contiguous() if stored.is_transposed else matrix

    def close(self) -> None:
        """Unmap the files; tensors already read stay valid."""
        self._handles.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_complete(self) -> None:
        parts = (CODES, SCALES, ZEROS) if self.manifest.form.has_zeros else (CODES, SCALES)
        for name in self.manifest.weights:
            for part in parts:
                if name + part not in self._handles:
                    raise InvalidCheckpoint(
                        f"{self.directory}: {name} is quantized, but {name}{part} is missing"
                    )
            if name in self._handles:
                raise InvalidCheckpoint(f"{self.directory}: {name} is there both quantized and as it was")

    def _read(self, name: str) -> Tensor:
        handle = self._handles.get(name)
        if handle is None:
            raise InvalidCheckpoint(f"{self.directory}: tensor {name} is in none of its safetensors files")
        try:
            tensor: Tensor = handle.get_tensor(name)
        except SafetensorError as error:
            raise InvalidCheckpoint(f"{self.directory}: tensor {name} cannot be read: {error}") from error
        return tensor

    def _part(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = self._read(name)
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise InvalidCheckpoint(
                f"{self.directory}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}; "
                f"{self.manifest.form.name} needs {dtype} of shape {shape}"
            )
        return tensor

    def _unpacked(self, name: str, packed: Tensor, count: int) -> Tensor:
        try:
            return unpack(packed, self.manifest.form.bits, count)
        except InvalidCheckpoint as error:
            raise InvalidCheckpoint(f"{self.directory}: {name}: {error.message}") from error
