"""That the CUDA kernels are right, on a GPU or in the emulator: each against float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trireme.engine.sampling import SamplingState
from trireme.engine.sampling import sample as engine_sample
from trireme.engine.sampling_params import SamplingParams
from trireme.kernels import (
    cuda_elementwise,
    cuda_experts,
    cuda_host_memory,
    cuda_kv,
    cuda_ops,
    kv_forms,
    reference,
)
from trireme.kernels.attention_batch import AttentionBatch
from trireme.kernels.cuda_attention import paged_attention
from trireme.kernels.cuda_launch import Launcher
from trireme.kernels.cuda_linear import low_bit_linear
from trireme.kernels.cuda_sampling import SamplingRows, sample
from trireme.quant.device_layouts import PackedWeight
from trireme.quant.formats import weight_format
from trireme.quant.quantization import dequantize, quantize

FORMATS = ("fp6_e3m2", "fp6_e2m3", "fp5_e2m2", "int8_ch", "int4_g32", "int4_g128_zeros")
EXPERT_FORMATS = (None, "fp6_e3m2", "int4_g32")
"""None: the weights in 16 bits."""
TYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    error: float
    """Largest error, in what is allowed; below 1 is right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large checks are."""

    weight: tuple[int, int]
    tokens: Sequence[int]
    many_tokens: Sequence[int]
    """Of products by wgmma."""
    width: int
    heads: tuple[int, int, int]
    """Query heads, key heads, head_dim."""
    contexts: Sequence[int]
    vocab: int
    experts: tuple[int, int, int, int]
    """Experts, chosen of a token, hidden, inner."""


SMALL = Sizes(
    weight=(70, 256),
    tokens=(3,),
    many_tokens=(66,),
    width=136,
    heads=(4, 2, 64),
    contexts=(1, 70),
    vocab=300,
    experts=(4, 2, 64, 96),
)
FULL = Sizes(
    weight=(1030, 4096),
    tokens=(1, 8, 17, 100),
    many_tokens=(64, 100, 300),
    width=4104,
    heads=(32, 8, 128),
    contexts=(1, 513, 3000, 9000),
    vocab=50_000,
    experts=(16, 4, 2048, 768),
)


def check(launcher: Launcher, device: torch.device, sizes: Sizes) -> list[Check]:
    """Every kernel against float64, on the device's own arithmetic."""
    torch.manual_seed(0)
    checks = []
    for dtype in TYPES:
        kind = str(dtype).removeprefix("torch.")
        checks += [
            Check(f"{name} {kind}", e) for name, e in _elementwise_errors(launcher, device, dtype, sizes)
        ]
        for name in FORMATS:
            packed, exact = _weight(name, sizes.weight, device)
            for tokens in sizes.tokens:
                x = torch.randn(tokens, sizes.weight[1], dtype=dtype, device=device)
                out = low_bit_linear(launcher, x, packed)
                checks.append(Check(f"{name} {kind} {tokens}", _product_error(out, x, exact)))
            for tokens in sizes.many_tokens if launcher.has_wgmma else ():
                x = torch.randn(tokens, sizes.weight[1], dtype=dtype, device=device)
                out = low_bit_linear(launcher, x, packed, uses_wgmma=True)
                checks.append(Check(f"wgmma {name} {kind} {tokens}", _product_error(out, x, exact)))
        checks += _host_checks(launcher, device, dtype, sizes)
        checks += _mixture_checks(launcher, device, dtype, sizes)
        for storage in (dtype, torch.int8, torch.uint8):
            error = _attention_error(launcher, device, dtype, storage, sizes)
            checks.append(Check(f"attention {kind} from {storage}", error))
    checks.append(Check("sampling", float(_different_tokens(launcher, device, sizes.vocab))))
    return checks


def _weight(name: str, shape: tuple[int, int], device: torch.device) -> tuple[PackedWeight, Tensor]:
    quantized = quantize(torch.randn(shape), weight_format(name))
    return cuda_ops.pack_quantized(quantized, device=device), dequantize(quantized, torch.float64).to(device)


def on_host(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor where the device's kernels read host memory: pinned, but in the emulator."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _host_checks(launcher: Launcher, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> list[Check]:
    """Rows and products of weights in host memory."""
    kind, (outputs, inputs) = str(dtype).removeprefix("torch."), sizes.weight
    weight = torch.randn(outputs, inputs).to(dtype)
    host, exact = on_host(weight, device), weight.double().to(device)
    indices = torch.randint(outputs, (9,), device=device)
    found = cuda_host_memory.embedding(launcher, host, indices)
    checks = [Check(f"host embedding {kind}", float(not torch.equal(found.cpu(), weight[indices.cpu()])))]
    for tokens in (1, 3, 8):
        x = torch.randn(tokens, inputs, dtype=dtype, device=device)
        out = cuda_host_memory.linear(launcher, x, host)
        checks.append(Check(f"host product {kind} {tokens}", _product_error(out, x, exact)))
    packed, exact = _weight("fp6_e2m3", sizes.weight, device)
    x = torch.randn(3, inputs, dtype=dtype, device=device)
    out = cuda_host_memory.linear(launcher, x, replace(packed, words=on_host(packed.words.cpu(), device)))
    checks.append(Check(f"host product in fp6_e2m3 {kind}", _product_error(out, x, exact)))
    return checks


def _mixture_checks(
    launcher: Launcher, device: torch.device, dtype: torch.dtype, sizes: Sizes
) -> list[Check]:
    """Gating, and mixtures of experts whose results are rounded where kernels round."""
    num_experts, chosen, hidden, inner = sizes.experts
    kind, checks = str(dtype).removeprefix("torch."), []
    for name in EXPERT_FORMATS:
        matrices = [
            torch.randn(num_experts, *shape) * shape[1] ** -0.5
            for shape in ((2 * inner, hidden), (hidden, inner))
        ]
        weights, exact = [], []
        for part in matrices:
            if name is None:
                weights.append([matrix.to(device, dtype) for matrix in part])
                exact.append([matrix.double() for matrix in weights[-1]])
            else:
                quantized = [quantize(matrix, weight_format(name)) for matrix in part]
                weights.append([cuda_ops.pack_quantized(matrix, device=device) for matrix in quantized])
                exact.append([dequantize(matrix, torch.float64).to(device) for matrix in quantized])
        packed = cuda_ops.pack_experts(weights[0], weights[1])
        assert packed is not None
        for tokens in sizes.tokens:
            x, residual = torch.randn(2, tokens, hidden, dtype=dtype, device=device)
            logits = torch.randn(tokens, num_experts, dtype=dtype, device=device)
            shares, experts = cuda_experts.choose_experts(
                launcher, logits, num_chosen=chosen, renormalises=True
            )
            order = logits.double().argsort(dim=-1, descending=True, stable=True)[:, :chosen]
            weight = logits.double().gather(-1, order).softmax(-1)
            gating = max(_steps(shares, weight, 1.0), float(not torch.equal(order, experts)))
            checks.append(Check(f"gating {kind} {tokens}", gating))
            out = cuda_experts.mixture_add(launcher, x, shares, experts, *packed, residual)
            error = _steps(out, _mixture(x, shares, experts, exact, residual), 4.0)
            checks.append(Check(f"mixture in {name or kind} of {kind} {tokens}", error))
    return checks


def _mixture(
    x: Tensor, shares: Tensor, experts: Tensor, exact: Sequence[Sequence[Tensor]], residual: Tensor
) -> Tensor:
    """`ops.mixture_add` in float64, rounded to x's type where an expert's result is."""
    out = residual.double()
    for expert, (gate_up, down) in enumerate(zip(*exact, strict=True)):
        rows, places = (experts == expert).nonzero(as_tuple=True)
        made = (x[rows].double() @ gate_up.t()).to(x.dtype).double()
        made = reference.swiglu(made).to(x.dtype).double() @ down.t()
        out.index_add_(0, rows, made.to(x.dtype).double() * shares[rows, places, None].double())
    return out


def _product_error(out: Tensor, x: Tensor, weight: Tensor) -> float:
    exact, magnitude = x.double() @ weight.t(), x.double().abs() @ weight.abs().t()
    allowed = exact.abs() * torch.finfo(out.dtype).eps / 2 + magnitude * 2.0**-20
    return float(((out.double() - exact).abs() / allowed).max())


def _steps(out: Tensor, exact: Tensor, steps: float) -> float:
    """Error in so many steps of the type at the value's size, or at 1."""
    allowed = steps * torch.finfo(out.dtype).eps * exact.abs().clamp(min=1.0)
    return float(((out.double() - exact).abs() / allowed).max())


def _elementwise_errors(
    launcher: Launcher, device: torch.device, dtype: torch.dtype, sizes: Sizes
) -> list[tuple[str, float]]:
    heads, kv_heads, head_dim = sizes.heads
    tokens, width = 5, sizes.width
    x, residual = torch.randn(2, tokens, width, dtype=dtype, device=device)
    weight = torch.randn(width, dtype=dtype, device=device)
    total = x + residual
    normal = cuda_elementwise.add_rms_norm(launcher, x, residual, weight, 1e-5)
    exact = F.rms_norm(total.double(), (width,), weight.double(), 1e-5)
    gate_up = torch.randn(tokens, 2 * width, dtype=dtype, device=device)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype, device=device)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
    cos, sin = torch.rand(2, tokens, 1, head_dim, dtype=dtype, device=device)
    caches = torch.zeros(2, 2, 8, kv_heads, head_dim, dtype=dtype, device=device)
    slots = torch.tensor([9, 3, 0, 15, 4], device=device)
    rotated = cuda_kv.rotary_append_kv(launcher, q, k, v, cos, sin, caches[0], caches[1], slots)
    flat = caches.view(2, 16, kv_heads, head_dim)
    exact_q, exact_k = (reference.rotary(part.double(), cos.double(), sin.double()) for part in (q, k))
    return [
        ("add_rms_norm", max(_steps(normal, exact, 1.0), float(not torch.equal(residual, total)))),
        (
            "swiglu",
            _steps(cuda_elementwise.swiglu(launcher, gate_up), reference.swiglu(gate_up.double()), 1.0),
        ),
        ("rotary", max(_steps(rotated, exact_q, 1.0), _steps(flat[0, slots], exact_k, 1.0))),
        ("append", float(not torch.equal(flat[1, slots], v))),
    ]


def _attention_error(
    launcher: Launcher, device: torch.device, dtype: torch.dtype, storage: torch.dtype, sizes: Sizes
) -> float:
    heads, kv_heads, head_dim = sizes.heads
    contexts = (*sizes.contexts, sizes.contexts[-1])
    lengths = (*(1 for _ in sizes.contexts), min(40, contexts[-1]))
    batch, blocks = random_batch(lengths, contexts, device, dtype)
    rows = torch.randn(2, blocks, 16, kv_heads, head_dim, dtype=dtype, device=device)
    caches = kv_forms.encode(rows, storage)
    q = torch.randn(sum(lengths), heads, head_dim, dtype=dtype, device=device)
    out = paged_attention(launcher, q, caches[0], caches[1], batch, scale=head_dim**-0.5)
    wide, _ = random_batch(lengths, contexts, device, torch.float64)
    k, v = kv_forms.decode(caches, dtype).double()
    exact = reference.paged_attention(q.double(), k, v, wide, scale=head_dim**-0.5, window=None)
    return _steps(out, exact, 2.0)


def random_batch(
    lengths: Sequence[int], contexts: Sequence[int], device: torch.device, dtype: torch.dtype
) -> tuple[AttentionBatch, int]:
    """A batch whose sequences have blocks of 16 in no order, and how many blocks that takes."""
    width = math.ceil(max(contexts) / 16)
    tables = np.random.default_rng(0).permutation(width * len(contexts)).reshape(-1, width).astype(np.int64)
    batch = AttentionBatch(
        query_lens=lengths,
        context_lens=contexts,
        block_tables=tables,
        block_size=16,
        device=device,
        dtype=dtype,
    )
    return batch, tables.size


def sampling_rows(states: Sequence[SamplingState], device: torch.device) -> SamplingRows:
    params = [state.params for state in states]
    return SamplingRows.of(
        temperatures=[p.temperature for p in params],
        top_k=[p.top_k for p in params],
        top_p=[p.top_p for p in params],
        min_p=[p.min_p for p in params],
        seeds=[p.seed for p in params],
        indices=[state.num_outputs for state in states],
        device=device,
    )


def mixed_states(count: int, vocab: int, device: torch.device) -> list[SamplingState]:
    wishes = ({}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.95}, {"temperature": 0.0}, {"min_p": 0.02})
    return [
        SamplingState(
            SamplingParams(seed=row, **wishes[row % len(wishes)]),  # type: ignore[arg-type]
            stop_ids=(),
            prompt_ids=(),
            output_ids=(),
            vocab_size=vocab,
            device=device,
        )
        for row in range(count)
    ]


def _different_tokens(launcher: Launcher, device: torch.device, vocab: int) -> int:
    """Of 20 rows, those whose token is not the engine's."""
    states = mixed_states(20, vocab, device)
    logits = torch.randn(20, vocab, device=device) * 3
    tokens = sample(launcher, logits, sampling_rows(states, device)).tolist()
    expected = [chosen.token_id for chosen in engine_sample(logits, states)]
    return sum(token != other for token, other in zip(tokens, expected, strict=True))
