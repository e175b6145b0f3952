"""`kernels.ops` on an NVIDIA GPU: the same signatures, by native kernels or else by PyTorch.

Matrix products with 16-bit weights are cuBLAS's by way of PyTorch. Low-bit weights have
kernels of their own. `add_rms_norm`, `rotary_append_kv`, `copy_blocks`, `sample` and what else `ops` does not
have are called directly, with `launcher_of` the tensor's device.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from trireme.kernels import (
    cuda_attention,
    cuda_elementwise,
    cuda_expert_weights,
    cuda_experts,
    cuda_host_memory,
    cuda_kv,
    cuda_linear,
    reference,
)
from trireme.kernels.attention_batch import AttentionBatch
from trireme.kernels.cuda_compile import LOWEST_CAPABILITY
from trireme.kernels.cuda_device import CudaDevice
from trireme.kernels.cuda_expert_weights import ExpertMatrix, PackedExperts
from trireme.kernels.cuda_launch import CODE_NAMES, TYPE_NAMES, Launcher
from trireme.quant.device_layouts import DIRECT, PackedWeight, pack_for_device
from trireme.quant.formats import WeightFormat
from trireme.quant.quantization import QuantizedWeight


@functools.cache
def is_available(device: torch.device) -> bool:
    """Whether kernels run on a device: a GPU from compute capability 8.0 on, and bindings to its driver."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    has_bindings = importlib.util.find_spec("cuda") is not None
    return has_bindings and torch.cuda.get_device_capability(device) >= LOWEST_CAPABILITY


@functools.cache
def launcher_of(device: torch.device) -> Launcher:
    """The launcher of a GPU, one for each."""
    return CudaDevice(device)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dtype not in TYPE_NAMES or x.shape[-1] % 8:
        return reference.rms_norm(x, weight, eps)
    return cuda_elementwise.rms_norm(launcher_of(x.device), x, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return reference.layer_norm(x, weight, bias, eps)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if x.dtype not in TYPE_NAMES or x.shape[-1] % 16:
        return reference.rotary(x, cos, sin)
    return cuda_kv.rotary(launcher_of(x.device), x, cos, sin)


def swiglu(gate_up: Tensor) -> Tensor:
    if gate_up.dtype not in TYPE_NAMES or gate_up.shape[-1] % 16:
        return reference.swiglu(gate_up)
    return cuda_elementwise.swiglu(launcher_of(gate_up.device), gate_up)


def activation(x: Tensor, kind: str) -> Tensor:
    return reference.activation(x, kind)


def host_embedding(table: Tensor, indices: Tensor) -> Tensor:
    """`ops.embedding` of a table in pinned host memory."""
    return cuda_host_memory.embedding(launcher_of(indices.device), table, indices)


def host_linear(
    x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """`ops.linear` and `ops.linear_add` of a weight in pinned host memory."""
    return cuda_host_memory.linear(launcher_of(x.device), x, weight, bias, residual)


def takes_quantized(form: WeightFormat, device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype in TYPE_NAMES and cuda_linear.takes(form)


def pack_quantized(weight: QuantizedWeight, *, device: torch.device) -> PackedWeight:
    """Bring a weight of a format that `takes_quantized` to the device, in the order of its tensor cores."""
    packed = pack_for_device(weight, DIRECT)
    return replace(
        packed,
        words=packed.words.to(device),
        scales=packed.scales.to(device),
        zeros=None if packed.zeros is None else packed.zeros.to(device),
    )


def linear(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None = None) -> Tensor:
    if isinstance(weight, PackedWeight):
        return cuda_linear.low_bit_linear(launcher_of(x.device), x, weight, bias)
    return reference.linear(x, weight, bias)


def linear_add(
    x: Tensor, weight: Tensor | PackedWeight, residual: Tensor, bias: Tensor | None = None
) -> Tensor:
    if isinstance(weight, PackedWeight):
        return cuda_linear.low_bit_linear(launcher_of(x.device), x, weight, bias, residual)
    return reference.linear_add(x, weight, residual, bias)


def choose_experts(
    x: Tensor, router: Tensor, *, num_chosen: int, renormalises: bool
) -> tuple[Tensor, Tensor]:
    if x.dtype not in TYPE_NAMES or not cuda_experts.takes(len(router), num_chosen):
        return reference.choose_experts(x, router, num_chosen=num_chosen, renormalises=renormalises)
    logits = reference.linear(x, router, None)
    return cuda_experts.choose_experts(
        launcher_of(x.device), logits, num_chosen=num_chosen, renormalises=renormalises
    )


def pack_experts(
    gate_up: Sequence[ExpertMatrix], down: Sequence[ExpertMatrix]
) -> tuple[PackedExperts, PackedExperts] | None:
    """All experts' weights, for `mixture_add`; None: there is no kernel for these."""
    can_stack = cuda_expert_weights.can_stack
    if len(gate_up) > cuda_experts.MOST_EXPERTS or not can_stack(gate_up) or not can_stack(down):
        return None
    return cuda_expert_weights.stack(gate_up), cuda_expert_weights.stack(down)


def mixture_add(
    x: Tensor,
    shares: Tensor,
    experts: Tensor,
    gate_up: PackedExperts,
    down: PackedExperts,
    residual: Tensor,
) -> Tensor:
    return cuda_experts.mixture_add(
        launcher_of(x.device), x.contiguous(), shares, experts, gate_up, down, residual.contiguous()
    )


def append_kv(k_new: Tensor, v_new: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    is_stored = k_cache.dtype in (k_new.dtype, *CODE_NAMES)
    if k_new.dtype not in TYPE_NAMES or not is_stored or k_new.shape[-1] % 8:
        reference.append_kv(k_new, v_new, k_cache, v_cache, slots)
    else:
        cuda_kv.append_kv(launcher_of(k_new.device), k_new, v_new, k_cache, v_cache, slots)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
) -> Tensor:
    if not cuda_attention.takes(q, k_cache, batch):
        return reference.paged_attention(q, k_cache, v_cache, batch, scale=scale, window=window, cap=cap)
    return cuda_attention.paged_attention(
        *(launcher_of(q.device), q, k_cache, v_cache, batch),
        scale=scale,
        window=window,
        soft_cap=cap,
        tree_masks=batch.tree_masks,
    )
