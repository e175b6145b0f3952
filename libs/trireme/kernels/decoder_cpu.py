"""A Llama-type model, Gemma among them, on x86 CPUs in one native call (`csrc/cpu/decoder_layers.h`).

A small model's step in PyTorch is mostly the cost of calling operators. Here it is the products and the
memory they read. A row's result is the same, to the last bit, whatever else is in the batch and however its
prompt was cut.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trireme.errors import InvalidConfiguration
from trireme.kernels.attention_batch import AttentionBatch
from trireme.kernels.cpu_library import cpu_library
from trireme.kernels.low_bit_cpu import PackedLinear

_KV_TYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}
"""As in decoder_layers.h; what an 8-bit one holds is told by `kv_forms`."""
_ACTIVATIONS: Final = {"silu": 0, "gelu_new": 1}
_NO_ROWS: Final = torch.empty(0, dtype=torch.int64)
_MOST_HEAD_DIM: Final = 1024
_SIZES: Final = ("hidden", "inner", "heads", "kv_heads", "head_dim", "block_size")
_PLACES: Final = (
    "query_lens",
    "context_lens",
    "tables",
    "k_caches",
    "v_caches",
    "states",
    "scored",
    "scores",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseWeights:
    """One feed-forward."""

    gate_up: PackedLinear
    gate_up_bias: Tensor | None
    down: PackedLinear
    down_bias: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """A feed-forward of which each token uses a few experts; see `ops.mixture`."""

    router: Tensor
    """(experts, hidden)."""
    gate_up: tuple[PackedLinear, ...]
    down: tuple[PackedLinear, ...]
    num_chosen: int
    renormalises: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One layer: products packed by `low_bit_cpu`, the others float32 and contiguous; None: it has none."""

    qkv: PackedLinear
    out: PackedLinear
    feed_forward: DenseWeights | ExpertWeights
    input_norm: Tensor
    """(hidden,)."""
    mlp_norm: Tensor
    """(hidden,)."""
    qk_norm: Tensor | None
    """(heads + kv_heads, head_dim)."""
    post_attention_norm: Tensor | None
    """(hidden,): of what attention gives, before it joins the residual stream."""
    post_mlp_norm: Tensor | None
    """The same for the feed-forward, which then is a dense one."""
    qkv_bias: Tensor | None
    out_bias: Tensor | None
    cosines: Tensor
    """(positions, ..., head_dim)."""
    sines: Tensor
    """The same, negated in the first half."""
    window: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadWeights:
    """What follows the last layer."""

    norm: Tensor
    """(hidden,)."""
    scores: PackedLinear | None
    """(vocabulary, hidden); None: scores are not computed here."""
    cap: float | None
    """Scores become cap * tanh(score / cap); None: they stay."""


class _Mixture(ctypes.Structure):
    """`Mixture`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("router", "gate_up", "down")),
        *((name, ctypes.c_int64) for name in ("experts", "chosen", "inner", "renormalises")),
    )


class _Layer(ctypes.Structure):
    """`DecoderLayer`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("qkv", "out", "gate_up", "down", "mixture")),
        *((name, ctypes.c_void_p) for name in ("input_norm", "mlp_norm", "qk_norm")),
        *((name, ctypes.c_void_p) for name in ("qkv_bias", "out_bias", "gate_up_bias", "down_bias")),
        *((name, ctypes.c_void_p) for name in ("post_attention_norm", "post_mlp_norm", "cosines", "sines")),
        ("window", ctypes.c_int64),
    )


class _Shape(ctypes.Structure):
    """`DecoderShape`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _SIZES),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("cap", ctypes.c_float),
        ("kv_type", ctypes.c_int32),
        ("activation", ctypes.c_int32),
    )


class _Head(ctypes.Structure):
    """`DecoderHead`."""

    _fields_ = (("norm", ctypes.c_void_p), ("weight", ctypes.c_void_p), ("cap", ctypes.c_float))


class _Step(ctypes.Structure):
    """`DecoderStep`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "positions", "slots")),
        *((name, ctypes.c_void_p) for name in _PLACES),
        *((name, ctypes.c_int64) for name in ("rows", "sequences", "table_width", "num_scored")),
        ("trees", ctypes.c_void_p),
    )


class _Tree(ctypes.Structure):
    """`TokenTree`."""

    _fields_ = (("parents", ctypes.c_void_p), ("tokens", ctypes.c_int64))


class NativeDecoder:
    """All layers of one model, and its head.

    Args:
        layers, head: their weights, which `takes` takes.
        heads, kv_heads, head_dim: of the attention.
        eps: of the norms.
        scale: factor on the dot products.
        cap: scores of attention become cap * tanh(score / cap); None: they stay.
        activation: of the gates: silu or gelu_new.
    """

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        head: HeadWeights,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        eps: float,
        scale: float,
        cap: float | None = None,
        activation: str = "silu",
    ) -> None:
        library = cpu_library()
        assert library is not None, "takes() says so"
        self._run = library.decoder_layers
        self._level = library.level
        self._kept: list[object] = [tuple(layers), head]  # the library reads in them
        self._layers = (_Layer * len(layers))(*[_native(layer, self._kept) for layer in layers])
        self._num_layers = len(layers)
        self._head = _Head(
            norm=_address(head.norm),
            weight=None if head.scores is None else ctypes.addressof(head.scores.native),
            cap=head.cap or 0.0,
        )
        self.vocabulary = 0 if head.scores is None else head.scores.shape[0]
        """Tokens that are scored; 0: none are."""
        self._shape = _Shape(
            hidden=layers[0].qkv.shape[1],
            inner=max([_inner(layer.feed_forward) for layer in layers]),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            eps=eps,
            scale=scale,
            cap=cap or 0.0,
            activation=_ACTIVATIONS[activation],
        )
        self._pointers = ctypes.c_void_p * self._num_layers

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        kv: Sequence[tuple[Tensor, Tensor]],
        batch: AttentionBatch,
        *,
        scored: Tensor | None = _NO_ROWS,
    ) -> tuple[Tensor, Tensor]:
        """Take embeddings through the model; keys and values go to the cache.

        Args:
            x: (tokens, hidden) float32, contiguous; overwritten.
            positions: (tokens,) int64.
            kv: per layer, caches (blocks, block_size, kv_heads, row) of a form of `kv_forms`. What is
                no list or tuple is walked layer by layer, as each is computed.
            batch: the tokens' sequences.
            scored: (rows,) int64: the tokens of which the next is scored, where there is a head for that;
                None: all of them.

        Returns:
            The final states (tokens, hidden), normalised, and the scores (rows, vocabulary).

        Raises:
            MemoryError: there is too little for the step.
        """
        query_lens = np.asarray(batch.query_lens, dtype=np.int64)
        context_lens = np.asarray(batch.context_lens, dtype=np.int64)
        tables = np.ascontiguousarray(batch.block_tables, dtype=np.int64)
        shape, threads, rows = self._shape, torch.get_num_threads(), x.shape[0]
        shape.block_size = batch.block_size
        num_scored = 0 if not self.vocabulary else rows if scored is None else scored.shape[0]
        states = torch.empty_like(x)
        scores = x.new_empty((num_scored, self.vocabulary))
        keys, values = self._pointers(), self._pointers()
        trees = _native_trees(batch)
        step = _Step(
            x.data_ptr(),
            positions.data_ptr(),
            batch.slots.data_ptr(),
            query_lens.ctypes.data,
            context_lens.ctypes.data,
            tables.ctypes.data,
            ctypes.addressof(keys),
            ctypes.addressof(values),
            states.data_ptr(),
            None if scored is None else scored.data_ptr(),
            scores.data_ptr(),
            rows,
            len(query_lens),
            tables.shape[1],
            num_scored,
            None if trees is None else ctypes.addressof(trees[0]),
        )
        first = 0
        is_there = isinstance(kv, (list, tuple))
        for index, (k_cache, v_cache) in enumerate(kv):
            if index == 0:
                shape.kv_type = _KV_TYPES[k_cache.dtype]
            keys[index], values[index] = k_cache.data_ptr(), v_cache.data_ptr()
            is_last = index == self._num_layers - 1
            if not is_there or is_last:
                outcome = self._run(
                    ctypes.addressof(shape),
                    ctypes.addressof(self._layers),
                    first,
                    index + 1,
                    ctypes.addressof(self._head) if is_last else None,
                    ctypes.addressof(step),
                    self._level,
                    threads,
                )
                if outcome:
                    raise MemoryError(f"no memory for a step of {rows} tokens")
                first = index + 1
        return states, scores


def takes(layers: Sequence[LayerWeights], head_dim: int, dtype: torch.dtype, activation: str) -> bool:
    """Whether `NativeDecoder` runs here for such layers, for activations of `dtype`, which is float32,
    and gates of `activation`: silu, or gelu_new where there is no mixture."""
    products = [product for layer in layers for product in _products(layer)]
    is_dense = all(isinstance(layer.feed_forward, DenseWeights) for layer in layers)
    return (
        bool(products)
        and dtype == torch.float32
        and activation in _ACTIVATIONS
        and (is_dense or activation == "silu")
        and head_dim % 16 == 0
        and head_dim <= _MOST_HEAD_DIM
        and all(width % 8 == 0 for product in products for width in product.shape)
        and cpu_library() is not None
    )


def takes_kv(dtype: torch.dtype) -> bool:
    """Whether keys and values of this type can be read."""
    return dtype in _KV_TYPES


def _native_trees(batch: AttentionBatch) -> tuple[ctypes.Array[_Tree], list[NDArray[np.int64]]] | None:
    """By sequence, and what they point into; None: there are none."""
    if not batch.trees:
        return None
    native = (_Tree * len(batch.query_lens))()
    kept: list[NDArray[np.int64]] = []
    for index, parents in batch.trees.items():
        kept.append(np.asarray(parents, dtype=np.int64))
        native[index] = _Tree(kept[-1].ctypes.data, len(parents))
    return native, kept


def _inner(feed_forward: DenseWeights | ExpertWeights) -> int:
    """Width between its two products; 0 where experts have room of their own."""
    return feed_forward.down.shape[1] if isinstance(feed_forward, DenseWeights) else 0


def _products(layer: LayerWeights) -> list[PackedLinear]:
    inner = layer.feed_forward
    if isinstance(inner, DenseWeights):
        return [layer.qkv, layer.out, inner.gate_up, inner.down]
    return [layer.qkv, layer.out, *inner.gate_up, *inner.down]


def _native(layer: LayerWeights, kept: list[object]) -> _Layer:
    """`kept` is told what the result points into."""
    native = _Layer(
        qkv=ctypes.addressof(layer.qkv.native),
        out=ctypes.addressof(layer.out.native),
        input_norm=_address(layer.input_norm),
        mlp_norm=_address(layer.mlp_norm),
        qk_norm=_address(layer.qk_norm),
        qkv_bias=_address(layer.qkv_bias),
        out_bias=_address(layer.out_bias),
        post_attention_norm=_address(layer.post_attention_norm),
        post_mlp_norm=_address(layer.post_mlp_norm),
        cosines=_address(layer.cosines),
        sines=_address(layer.sines),
        window=layer.window or 0,
    )
    inner = layer.feed_forward
    if isinstance(inner, DenseWeights):
        native.gate_up = ctypes.addressof(inner.gate_up.native)
        native.down = ctypes.addressof(inner.down.native)
        native.gate_up_bias = _address(inner.gate_up_bias)
        native.down_bias = _address(inner.down_bias)
    else:
        native.mixture = _native_mixture(inner, kept)
    return native


def _native_mixture(experts: ExpertWeights, kept: list[object]) -> int:
    count = len(experts.gate_up)
    pointers = ctypes.c_void_p * count
    gate_up = pointers(*[ctypes.addressof(product.native) for product in experts.gate_up])
    down = pointers(*[ctypes.addressof(product.native) for product in experts.down])
    mixture = _Mixture(
        _address(experts.router),
        ctypes.addressof(gate_up),
        ctypes.addressof(down),
        count,
        experts.num_chosen,
        experts.down[0].shape[1],
        int(experts.renormalises),
    )
    kept += [gate_up, down, mixture]
    return ctypes.addressof(mixture)


def _address(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    if tensor.dtype != torch.float32 or not tensor.is_contiguous():
        raise InvalidConfiguration("norms, biases and routers must be contiguous float32")
    return tensor.data_ptr()
