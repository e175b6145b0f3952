"""The operators a model is written with: shapes, types, and the one place of dispatch.

Every function takes contiguous tensors of one device and one floating type unless it says
otherwise. `tokens` is the flattened batch: all tokens of all sequences of one step, one after
the other, no padding. Each function below goes to the PyTorch reference unless a native kernel
for the device is chosen here, behind the same signature.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trireme.kernels import cuda_ops, low_bit_cpu, onednn, reference
from trireme.kernels.attention_batch import AttentionBatch
from trireme.kernels.cuda_expert_weights import PackedExperts
from trireme.kernels.low_bit_cpu import PackedLinear
from trireme.quant.device_layouts import PackedWeight
from trireme.quant.formats import WeightFormat
from trireme.quant.quantization import QuantizedWeight, dequantize

LinearWeight = Tensor | PackedLinear | PackedWeight
"""A linear layer's matrix (outputs, inputs) in the form that `linear` takes: a plain tensor, or what
`pack_weight` or `pack_quantized` made of it."""
ExpertWeights = tuple[LinearWeight, ...] | PackedExperts
"""A matrix of each expert, in the form that `mixture_add` takes: what `pack_experts` made of them."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale each row to unit root mean square, times `weight`.

    Args:
        x: (..., width).
        weight: (width,), or any shape that broadcasts over the leading ones, such as
            (heads, width) for one weight per head.
        eps: added to the mean square.

    Returns:
        The shape and type of `x`; the mean is taken in float32.
    """
    if x.is_cuda and cuda_ops.is_available(x.device):
        return cuda_ops.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Centre each row, scale it to unit variance, times `weight` plus `bias`: (..., width)."""
    return reference.layer_norm(x, weight, bias, eps)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + head_dim / 2) of each head by the token's angles.

    Args:
        x: (tokens, heads, head_dim); queries and keys of a token may lie side by side as heads.
        cos: (tokens, 1, head_dim), the cosine of each pair's angle, twice.
        sin: (tokens, 1, head_dim), the sine, negated in the first half.

    Returns:
        A new tensor of the shape of `x`.

    Source: Su et al., RoFormer, 2021; half-split pairing as in Hugging Face checkpoints.
    """
    if x.is_cuda and cuda_ops.is_available(x.device):
        return cuda_ops.rotary(x, cos, sin)
    return reference.rotary(x, cos, sin)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, where `gate_up` is (tokens, 2 * width): gate first; returns (tokens, width)."""
    if gate_up.is_cuda and cuda_ops.is_available(gate_up.device):
        return cuda_ops.swiglu(gate_up)
    return reference.swiglu(gate_up)


def gated(gate_up: Tensor, kind: str) -> Tensor:
    """`swiglu` with the gate's activation of `activation`: (tokens, 2 * width) to (tokens, width)."""
    if kind == "silu":
        return swiglu(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return activation(gate, kind).mul_(up)


def activation(x: Tensor, kind: str) -> Tensor:
    """Elementwise silu, gelu_new (tanh), gelu (erf) or relu."""
    return reference.activation(x, kind)


def takes_bf16(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `linear` computes from bfloat16 weights as they are, faster than from wider ones."""
    if device.type != "cpu" or not low_bit_cpu.takes(None, dtype):
        return False
    return dtype != torch.bfloat16 or not onednn.is_available(dtype)


def pack_weight(weight: Tensor, dtype: torch.dtype | None = None) -> LinearWeight:
    """Bring a weight (outputs, inputs) into the form that `linear` is fastest with on its device.

    The result is good for `linear` and `linear_add` alone; it may be `weight` itself. bfloat16 weights stay
    bfloat16 where that is faster; products are summed in float32.

    Args:
        weight: floating.
        dtype: of the activations; None: the weight's.
    """
    dtype = dtype or weight.dtype
    if weight.dtype == torch.bfloat16 and takes_bf16(weight.device, dtype):
        return low_bit_cpu.pack_bf16(weight)
    weight = weight.to(dtype)
    is_packable = weight.device.type == "cpu" and onednn.is_available(dtype)
    return onednn.pack(weight) if is_packable else weight


def takes_quantized(form: WeightFormat, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `linear` computes from codes of this format on the device; else weights are expanded first."""
    if device.type == "cpu":
        return low_bit_cpu.takes(form, dtype)
    return cuda_ops.is_available(device) and cuda_ops.takes_quantized(form, device, dtype)


def pack_quantized(weight: QuantizedWeight, *, device: torch.device, dtype: torch.dtype) -> LinearWeight:
    """Bring a quantized weight into the form that `linear` takes; as `dtype` where nothing reads its codes.

    Args:
        weight: on the CPU.
        device: where the result goes.
        dtype: of the activations: float32, bfloat16 or float16.
    """
    is_in_order = weight.input_order is None or device.type == "cpu"
    if not is_in_order or not takes_quantized(weight.form, device, dtype):
        return pack_weight(dequantize(weight, dtype).to(device))
    if device.type == "cpu":
        return low_bit_cpu.pack(weight)
    return cuda_ops.pack_quantized(weight, device=device)


def pack_experts(
    gate_up: Sequence[LinearWeight], down: Sequence[LinearWeight]
) -> tuple[ExpertWeights, ExpertWeights]:
    """Bring the weights of a layer's experts into the form that `mixture_add` is fastest with.

    Args:
        gate_up: of each expert, (2 * inner, hidden): gate first; packed as `linear` takes them.
        down: of each expert, (hidden, inner).
    """
    device = _device(gate_up[0])
    if device.type == "cuda" and cuda_ops.is_available(device):
        matrices = [[each for each in part if not isinstance(each, PackedLinear)] for part in (gate_up, down)]
        packed = cuda_ops.pack_experts(matrices[0], matrices[1])
        if packed is not None:
            return packed
    return tuple(gate_up), tuple(down)


def weight_bytes(weight: LinearWeight | ExpertWeights) -> int:
    """Bytes of a weight that `linear` reads, or of all experts."""
    if isinstance(weight, tuple):
        return sum(map(weight_bytes, weight))
    if isinstance(weight, PackedExperts):
        return weight.nbytes
    if isinstance(weight, (PackedLinear, PackedWeight)):
        parts = (weight.words, weight.scales, weight.zeros)
        return sum(part.nbytes for part in parts if part is not None)
    return weight.numel() * weight.element_size()


def embedding(table: Tensor, indices: Tensor) -> Tensor:
    """Rows of a table (rows, width) by indices (tokens,) int64: (tokens, width).

    The table may lie in pinned host memory while the indices are on a GPU: then their rows alone are read, in
    place.
    """
    if table.device != indices.device:
        return cuda_ops.host_embedding(table, indices)
    return table.index_select(0, indices)


def linear(x: Tensor, weight: LinearWeight, bias: Tensor | None = None) -> Tensor:
    """x (tokens, inputs) times weight (outputs, inputs) transposed, plus bias (outputs,).

    `weight` may be packed (`pack_weight`, `pack_quantized`). It may lie in pinned host memory while x is on a
    GPU: up to 8 tokens read it there, in place, more copy it first.
    """
    if isinstance(weight, PackedLinear):
        return low_bit_cpu.linear(x, weight, bias)
    if _device(weight) != x.device:
        return cuda_ops.host_linear(x, weight, bias)
    if isinstance(weight, PackedWeight):
        return cuda_ops.linear(x, weight, bias)
    if weight.is_mkldnn:
        return onednn.linear(x, weight, bias)
    return reference.linear(x, weight, bias)


def linear_add(x: Tensor, weight: LinearWeight, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear`, plus residual (tokens, outputs), in one pass where that is possible."""
    if isinstance(weight, PackedLinear):
        return low_bit_cpu.linear(x, weight, bias, residual)
    if _device(weight) != x.device:
        return cuda_ops.host_linear(x, weight, bias, residual)
    if isinstance(weight, PackedWeight):
        return cuda_ops.linear_add(x, weight, residual, bias)
    if weight.is_mkldnn:
        return onednn.linear_add(x, weight, residual, bias)
    return reference.linear_add(x, weight, residual, bias)


def choose_experts(
    x: Tensor, router: Tensor, *, num_chosen: int, renormalises: bool
) -> tuple[Tensor, Tensor]:
    """The experts of each token that the router likes best, and their shares.

    Args:
        x: (tokens, hidden).
        router: (experts, hidden).
        num_chosen: experts of one token.
        renormalises: the chosen ones' shares sum to 1; else they are those of a softmax over all.

    Returns:
        Shares (tokens, num_chosen) of x's type, computed in float32, and experts, int64 of the same shape.
    """
    if x.is_cuda and cuda_ops.is_available(x.device):
        return cuda_ops.choose_experts(x, router, num_chosen=num_chosen, renormalises=renormalises)
    return reference.choose_experts(x, router, num_chosen=num_chosen, renormalises=renormalises)


def mixture_add(
    x: Tensor,
    shares: Tensor,
    experts: Tensor,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    residual: Tensor,
) -> Tensor:
    """What a token's experts make of it, weighted, plus residual; each expert's weights are read once.

    Args:
        x, residual: (tokens, hidden).
        shares, experts: (tokens, chosen), of `choose_experts`.
        gate_up, down: of `pack_experts`.

    Returns:
        A new tensor of the shape and type of x.
    """
    if isinstance(gate_up, PackedExperts) and isinstance(down, PackedExperts):
        return cuda_ops.mixture_add(x, shares, experts, gate_up, down, residual)
    assert isinstance(gate_up, tuple) and isinstance(down, tuple)
    out = residual.clone()
    for expert in sorted(set(experts.flatten().tolist())):
        rows, places = (experts == expert).nonzero(as_tuple=True)
        made = linear(swiglu(linear(x.index_select(0, rows), gate_up[expert])), down[expert])
        out.index_add_(0, rows, made * shares[rows, places, None])
    return out


def append_kv(k_new: Tensor, v_new: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Write one step's keys and values into the paged cache, in place.

    Args:
        k_new, v_new: (tokens, kv_heads, head_dim); rows may be strided.
        k_cache, v_cache: (blocks, block_size, kv_heads, row), contiguous, in any of `kv_forms`: row is
            head_dim, or in 8 bits a little more.
        slots: (tokens,) int64, block * block_size + offset; distinct.
    """
    if k_new.is_cuda and cuda_ops.is_available(k_new.device):
        cuda_ops.append_kv(k_new, v_new, k_cache, v_cache, slots)
    else:
        reference.append_kv(k_new, v_new, k_cache, v_cache, slots)


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
    """Causal attention of one step's queries over the paged cache.

    The batch mixes decoding sequences (one query each, first in the batch) and prefill
    chunks (many queries, after the sequence's cached tokens). The step's own keys and
    values are in the cache already (`append_kv`).

    Args:
        q: (tokens, heads, head_dim); rows may be strided. Query head h reads key head
            h // (heads // kv_heads).
        k_cache, v_cache: as for `append_kv`.
        batch: which tokens belong to which sequence, and where its blocks lie.
        scale: factor on the dot products.
        window: a query at position p sees keys at positions > p - window; None: all up to p.
        cap: scores become cap * tanh(score / cap); None: they stay.

    Returns:
        (tokens, heads * head_dim), contiguous.
    """
    if q.is_cuda and cuda_ops.is_available(q.device):
        return cuda_ops.paged_attention(q, k_cache, v_cache, batch, scale=scale, window=window, cap=cap)
    return reference.paged_attention(q, k_cache, v_cache, batch, scale=scale, window=window, cap=cap)


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap), in place."""
    return x.div_(cap).tanh_().mul_(cap)


def _device(weight: LinearWeight) -> torch.device:
    return weight.words.device if isinstance(weight, (PackedLinear, PackedWeight)) else weight.device
