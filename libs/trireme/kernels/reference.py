"""The operators in plain PyTorch, for any device: what native kernels are measured against.

Signatures and shapes are those of `kernels.ops`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trireme.kernels import kv_forms
from trireme.kernels.attention_batch import AttentionBatch, ChunkGroup, ChunkPlan, DecodeGroup
from trireme.kernels.static_decodes import StaticDecodes


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if weight.dim() == 1:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x, x.shape[-1:], None, eps) * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def activation(x: Tensor, kind: str) -> Tensor:
    match kind:
        case "silu":
            return F.silu(x)
        case "gelu_new":
            return F.gelu(x, approximate="tanh")
        case "gelu":
            return F.gelu(x)
        case "relu":
            return F.relu(x)
    raise ValueError(f"activation {kind!r} is unknown")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def linear_add(x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None:
        return F.linear(x, weight, bias).add_(residual)
    return torch.addmm(residual, x, weight.t())


def choose_experts(
    x: Tensor, router: Tensor, *, num_chosen: int, renormalises: bool
) -> tuple[Tensor, Tensor]:
    shares, experts = F.linear(x, router).float().softmax(-1).topk(num_chosen, -1)
    if renormalises:
        shares = shares / shares.sum(-1, keepdim=True)
    return shares.to(x.dtype), experts


def append_kv(k_new: Tensor, v_new: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    for new, cache in ((k_new, k_cache), (v_new, v_cache)):
        if cache.dtype != new.dtype:
            new = kv_forms.encode(new, cache.dtype)
        cache.view(-1, *cache.shape[2:]).index_copy_(0, slots, new)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None,
    cap: float | None = None,
) -> Tensor:
    if isinstance(batch, StaticDecodes):
        return _static_decode(q, k_cache, v_cache, batch, scale, window, cap)
    num_decodes = batch.num_decodes
    groups = batch.decode_groups(window)
    if num_decodes == batch.num_tokens and len(groups) == 1:
        return _decode(q, k_cache, v_cache, groups[0], scale, cap)

    out = q.new_empty(q.shape[0], q.shape[1] * q.shape[2])
    for group in groups:
        if group.rows is None:
            out[:num_decodes] = _decode(q[:num_decodes], k_cache, v_cache, group, scale, cap)
        else:
            out.index_copy_(
                0, group.rows, _decode(q.index_select(0, group.rows), k_cache, v_cache, group, scale, cap)
            )
    short, longer = batch.chunk_groups(window)
    for several in short:
        found = _short_chunks(q.index_select(0, several.queries), k_cache, v_cache, several, scale, cap)
        out.index_copy_(0, several.tokens, found.index_select(0, several.places))
    for chunk in longer:
        tokens = slice(chunk.first_token, chunk.first_token + chunk.num_tokens)
        out[tokens] = _prefill(q[tokens], k_cache, v_cache, chunk, scale, cap)
    return out


def _decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, group: DecodeGroup, scale: float, cap: float | None
) -> Tensor:
    """q (sequences, heads, head_dim) -> (sequences, heads * head_dim).

    The query heads that share a key head stand as that head's queries, so nothing is repeated.
    """
    count = group.num_sequences
    _, block_size, kv_heads, _ = k_cache.shape
    head_dim = q.shape[2]
    shape = (count, group.width * block_size, kv_heads, head_dim)
    k = _blocks(k_cache, group, q.dtype).view(shape)
    v = _blocks(v_cache, group, q.dtype).view(shape)
    if count == 1:
        k, v = k[:, group.start : group.stop], v[:, group.start : group.stop]
    out = _attend(
        q.view(count, kv_heads, -1, head_dim),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=group.mask,
        scale=scale,
        cap=cap,
    )
    return out.reshape(count, -1)


def _static_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: StaticDecodes,
    scale: float,
    window: int | None,
    cap: float | None,
) -> Tensor:
    """As `_decode`, over all blocks that the tables may have: what is used is known to the device alone."""
    count = q.shape[0]
    _, block_size, kv_heads, _ = k_cache.shape
    head_dim = q.shape[2]
    shape = (count, batch.width * block_size, kv_heads, head_dim)
    blocks = batch.tables.view(-1)
    k, v = (
        (found if found.dtype == q.dtype else kv_forms.decode(found, q.dtype)).view(shape).transpose(1, 2)
        for found in (k_cache.index_select(0, blocks), v_cache.index_select(0, blocks))
    )
    contexts = batch.sequences[:, 2:]
    keys = torch.arange(shape[1], device=q.device)
    hidden = keys >= contexts
    if window is not None:
        hidden |= keys < contexts - window
    mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, float("-inf"))
    out = _attend(
        q.view(count, kv_heads, -1, head_dim), k, v, attn_mask=mask[:, None, None], scale=scale, cap=cap
    )
    return out.reshape(count, -1)


def _short_chunks(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, group: ChunkGroup, scale: float, cap: float | None
) -> Tensor:
    """q (sequences * queries, heads, head_dim) -> (sequences * queries, heads * head_dim)."""
    count, queries = group.num_sequences, group.num_queries
    _, block_size, kv_heads, _ = k_cache.shape
    _, heads, head_dim = q.shape
    shared = heads // kv_heads
    shape = (count, group.width * block_size, kv_heads, head_dim)
    q = q.view(count, queries, kv_heads, shared, head_dim).permute(0, 2, 3, 1, 4)
    out = _attend(
        q.reshape(count, kv_heads, shared * queries, head_dim),
        _blocks(k_cache, group, q.dtype).view(shape).transpose(1, 2),
        _blocks(v_cache, group, q.dtype).view(shape).transpose(1, 2),
        attn_mask=group.mask_of_heads(shared),
        scale=scale,
        cap=cap,
    )
    out = out.view(count, kv_heads, shared, queries, head_dim).permute(0, 3, 1, 2, 4)
    return out.reshape(count * queries, heads * head_dim)


def _prefill(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, chunk: ChunkPlan, scale: float, cap: float | None
) -> Tensor:
    """q (tokens, heads, head_dim) -> (tokens, heads * head_dim)."""
    kv_heads = k_cache.shape[2]
    tokens, heads, head_dim = q.shape
    group = heads // kv_heads
    k = _blocks(k_cache, chunk, q.dtype).view(-1, kv_heads, head_dim)[chunk.start : chunk.stop]
    v = _blocks(v_cache, chunk, q.dtype).view(-1, kv_heads, head_dim)[chunk.start : chunk.stop]
    keys = k.shape[0]
    out = _attend(
        q.view(tokens, kv_heads, group, head_dim).permute(1, 2, 0, 3),
        k.transpose(0, 1)[:, None].expand(kv_heads, group, keys, head_dim),
        v.transpose(0, 1)[:, None].expand(kv_heads, group, keys, head_dim),
        attn_mask=chunk.mask,
        is_causal=chunk.is_causal,
        scale=scale,
        cap=cap,
    )
    return out.permute(2, 0, 1, 3).reshape(tokens, -1)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None,
    scale: float,
    cap: float | None,
    is_causal: bool = False,
) -> Tensor:
    """PyTorch's attention; where scores are capped, which it cannot, in its parts."""
    if cap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale)
    scores = torch.matmul(q, k.transpose(-2, -1)).float()
    scores = scores.mul_(scale / cap).tanh_().mul_(cap)
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        scores.masked_fill_(hidden, float("-inf"))
    if attn_mask is not None:
        scores += attn_mask
    return torch.matmul(scores.softmax(-1).to(v.dtype), v)


def _blocks(cache: Tensor, plan: DecodeGroup | ChunkGroup | ChunkPlan, dtype: torch.dtype) -> Tensor:
    """The plan's blocks, in order, as `dtype`: read in place where they lie side by side, else copied."""
    if plan.run_start is None:
        blocks = cache.index_select(0, plan.blocks)
    else:
        blocks = cache.narrow(0, plan.run_start, plan.blocks.shape[0])
    return blocks if blocks.dtype == dtype else kv_forms.decode(blocks, dtype)
