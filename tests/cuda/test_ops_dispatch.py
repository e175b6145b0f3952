"""`kernels.ops` sends weights that are packed for a GPU to its kernels, and packs what they take."""

from __future__ import annotations

import pytest
import torch

from trireme.kernels import cuda_ops, ops
from trireme.kernels.cuda_emulator import Emulator
from trireme.quant.device_layouts import PackedWeight
from trireme.quant.formats import FORMATS, weight_format
from trireme.quant.quantization import dequantize, quantize


def test_weights_packed_for_a_gpu_are_multiplied_by_its_kernels(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(cuda_ops, "launcher_of", lambda device: emulator)
    weight = quantize(torch.randn(70, 96), weight_format("fp6_e3m2"))
    packed = cuda_ops.pack_quantized(weight, device=torch.device("cpu"))
    x, bias, residual = (torch.randn(*size, dtype=torch.bfloat16) for size in ((5, 96), (70,), (5, 70)))
    exact = x.double() @ dequantize(weight, torch.float64).t() + bias.double()
    tolerance = 4 * torch.finfo(torch.bfloat16).eps
    for found, wanted in (
        (ops.linear(x, packed, bias), exact),
        (ops.linear_add(x, packed, residual, bias), exact + residual.double()),
    ):
        torch.testing.assert_close(found, wanted.bfloat16(), rtol=tolerance, atol=tolerance)


def test_what_a_gpu_has_no_kernel_for_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(cuda_ops, "is_available", lambda device: False)
    assert not any(ops.takes_quantized(form, gpu, torch.bfloat16) for form in FORMATS.values())
    monkeypatch.setattr(cuda_ops, "is_available", lambda device: device == gpu)
    taken = {name for name, form in FORMATS.items() if ops.takes_quantized(form, gpu, torch.bfloat16)}
    assert taken == set(FORMATS)
    weight = quantize(torch.randn(6, 32), weight_format("int4_g32"))
    monkeypatch.setattr(cuda_ops, "pack_quantized", lambda weight, *, device: (weight, device))
    assert ops.pack_quantized(weight, device=gpu, dtype=torch.bfloat16) == (weight, gpu)
    assert not isinstance(
        ops.pack_quantized(weight, device=torch.device("cpu"), dtype=torch.float16), PackedWeight
    )
