"""Mixtures of experts: gating against a softmax, groups against a stable sort, products against float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.cuda.conftest import TYPES
from trireme.kernels import cuda_ops, ops, reference
from trireme.kernels.cuda_emulator import Emulator
from trireme.kernels.cuda_expert_weights import PackedExperts, can_stack, fragments, stack
from trireme.kernels.cuda_experts import (
    GROUP_BY_EXPERT,
    choose_experts,
    choosing_kernel,
    combining_kernel,
    expert_kernel,
    expert_linear,
    group_by_expert,
    mixture_add,
)
from trireme.kernels.cuda_launch import Kernel, ShapeMismatch
from trireme.models.feed_forward import MixtureFeedForward
from trireme.quant.device_layouts import DIRECT, INTERLEAVED, PackedWeight, pack_for_device
from trireme.quant.formats import WeightFormat, weight_format
from trireme.quant.quantization import dequantize, quantize

CPU = torch.device("cpu")
TILES = (8, 16, 32)
NAMES = (None, "fp6_e2m3", "int4_g32_zeros")
MORE_NAMES = ("fp6_e3m2", "fp5_e2m2", "int8_ch", "int4_g64", "int4_g128")


@pytest.fixture(scope="module", autouse=True)
def _compiled(emulator: Emulator) -> None:
    kernels = [GROUP_BY_EXPERT, *(combining_kernel(kind) for kind in TYPES)]
    kernels += [choosing_kernel(kind, count) for kind in TYPES for count in (8, 128, 512)]
    kernels += [expert_kernel("bf16", _form(name), tile) for name in NAMES for tile in TILES]
    kernels += [expert_kernel("f16", _form(name), 8) for name in NAMES]
    kernels += [expert_kernel("bf16", _form(name), 8) for name in MORE_NAMES]
    kernels += [Kernel(source="swiglu", name=f"swiglu<{kind}>") for kind in TYPES]
    emulator.prepare(kernels)


def _form(name: str | None) -> WeightFormat | None:
    return None if name is None else weight_format(name)


def experts_of(
    name: str | None, count: int, outputs: int, inputs: int, dtype: torch.dtype
) -> tuple[PackedExperts, Tensor]:
    """Random matrices as kernels take them, and their float64 values (experts, outputs, inputs)."""
    values = torch.randn(count, outputs, inputs) / inputs**0.5
    if name is None:
        plain = values.to(dtype)
        return stack(list(plain)), plain.double()
    quantized = [quantize(matrix, weight_format(name)) for matrix in values]
    exact = torch.stack([dequantize(matrix, torch.float64) for matrix in quantized])
    return stack([pack_for_device(matrix, DIRECT) for matrix in quantized]), exact


def exact_mixture(
    x: Tensor, shares: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor, residual: Tensor
) -> Tensor:
    """One token and choice at a time, rounded where kernels round."""
    out = residual.double()
    for token, (row_shares, row_experts) in enumerate(zip(shares.double(), experts.tolist(), strict=True)):
        for share, expert in zip(row_shares, row_experts, strict=True):
            inner = (gate_up[expert] @ x[token].double()).to(x.dtype).double()
            inner = reference.swiglu(inner[None]).to(x.dtype).double()[0]
            out[token] += share * (down[expert] @ inner).to(x.dtype).double()
    return out


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("renormalises", [True, False])
@pytest.mark.parametrize("num_experts, chosen", [(8, 2), (5, 5), (128, 8), (300, 1), (512, 32)])
def test_shares_are_those_of_a_softmax(
    emulator: Emulator, kind: str, renormalises: bool, num_experts: int, chosen: int
) -> None:
    logits = (torch.randn(5, num_experts) * 3).to(TYPES[kind])
    shares, experts = choose_experts(emulator, logits, num_chosen=chosen, renormalises=renormalises)
    order = logits.double().argsort(dim=-1, descending=True, stable=True)[:, :chosen]
    assert torch.equal(experts, order)
    exact = logits.double().softmax(-1).gather(-1, order)
    if renormalises:
        exact = exact / exact.sum(-1, keepdim=True)
    torch.testing.assert_close(shares.double(), exact, rtol=torch.finfo(shares.dtype).eps, atol=1e-7)


def test_of_equal_logits_the_first_expert_is_chosen(emulator: Emulator) -> None:
    logits = torch.tensor([[0.0, -0.0, 0.0, 1.0, 1.0, -1.0, 0.0, 0.0]] * 2, dtype=torch.bfloat16)
    shares, experts = choose_experts(emulator, logits, num_chosen=5, renormalises=True)
    assert experts.tolist() == [[3, 4, 0, 1, 2]] * 2
    assert shares[0, 0] == shares[0, 1] and shares[0, 2] == shares[0, 4]


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_a_token_of_odd_logits_fails_alone_and_chooses_distinct_experts(
    emulator: Emulator, odd: float
) -> None:
    logits = torch.randn(3, 40, dtype=torch.float16)
    alone, _ = choose_experts(emulator, logits[2:], num_chosen=8, renormalises=False)
    logits[1] = odd
    shares, experts = choose_experts(emulator, logits, num_chosen=8, renormalises=False)
    assert bool(shares[1].isnan().all()) and not shares[::2].isnan().any()
    assert torch.equal(shares[2:], alone)
    assert sorted(set(experts[1].tolist())) == list(range(8))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("tokens, chosen, num_experts", [(1, 1, 1), (1, 8, 128), (70, 2, 8), (333, 3, 70)])
def test_groups_are_a_stable_sort_cut_into_tiles(
    emulator: Emulator, tokens: int, chosen: int, num_experts: int, tile: int
) -> None:
    # Skewed: some experts have many tokens, some none.
    liked = torch.rand(num_experts) ** 4 + 1e-3
    experts = torch.stack([torch.multinomial(liked, chosen) for _ in range(tokens)])
    groups = group_by_expert(emulator, experts, num_experts=num_experts, tile=tile)
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    assert groups.order.tolist() == order.tolist()
    assert groups.tokens.tolist() == (order // chosen).tolist()
    wanted = []
    ends = np.cumsum(np.bincount(flat.numpy(), minlength=num_experts))
    for expert, end in enumerate(ends.tolist()):
        begin = 0 if expert == 0 else int(ends[expert - 1])
        wanted += [[expert, at, min(at + tile, end)] for at in range(begin, end, tile)]
    unused = [[-1, 0, 0]] * (len(groups.tiles) - len(wanted))
    assert groups.tiles.tolist() == wanted + unused


def test_all_tokens_may_choose_one_expert_or_each_another(emulator: Emulator) -> None:
    one = group_by_expert(emulator, torch.full((100, 1), 6), num_experts=9, tile=8)
    assert one.order.tolist() == list(range(100))
    assert [tile[0] for tile in one.tiles.tolist()][:13] == [6] * 13
    spread = group_by_expert(emulator, torch.arange(64).flip(0)[:, None], num_experts=64, tile=32)
    assert spread.order.tolist() == list(range(63, -1, -1))
    assert len(spread.tiles) == 64  # as many as there can be, and all are needed
    assert spread.tiles[:, 0].tolist() == list(range(64))


@pytest.mark.parametrize(
    "name, kind, tile",
    [(name, "bf16", 8) for name in (*NAMES, *MORE_NAMES)]
    + [(name, *other) for name in NAMES for other in (("bf16", 16), ("bf16", 32), ("f16", 8))],
)
def test_each_expert_multiplies_its_own_tokens(
    emulator: Emulator, name: str | None, kind: str, tile: int
) -> None:
    dtype = TYPES[kind]
    inputs = 256 if name == "int4_g128" else 192
    packed, exact = experts_of(name, 5, 72, inputs, dtype)
    x = torch.randn(21, inputs, dtype=dtype)
    experts = torch.tensor([[3, 0], [3, 1], [3, 4]]).repeat(7, 1)  # nobody chooses expert 2
    groups = group_by_expert(emulator, experts, num_experts=5, tile=tile)
    out = expert_linear(emulator, x, packed, groups, sources=groups.tokens, targets=groups.order)
    wanted = torch.einsum("tceo,te->tco", exact[experts].transpose(2, 3), x.double()).flatten(0, 1)
    scale = torch.einsum("tceo,te->tco", exact[experts].transpose(2, 3).abs(), x.double().abs()).flatten(0, 1)
    allowed = wanted.abs() * torch.finfo(dtype).eps / 2 + scale * 2.0**-20
    assert float(((out.double() - wanted).abs() / allowed).max()) < 1.0
    in_turn = expert_linear(emulator, x, packed, groups, sources=groups.tokens, targets=None)
    assert torch.equal(in_turn, out[groups.order.long()])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind, tokens", [("bf16", 1), ("f16", 3), ("bf16", 17)])
def test_a_mixture_is_that_of_float64(emulator: Emulator, name: str | None, kind: str, tokens: int) -> None:
    dtype = TYPES[kind]
    gate_up, exact_gate_up = experts_of(name, 4, 2 * 96, 64, dtype)
    down, exact_down = experts_of(name, 4, 64, 96, dtype)
    x, residual = torch.randn(2, tokens, 64, dtype=dtype)
    shares, experts = torch.rand(tokens, 2).to(dtype), torch.rand(tokens, 4).argsort(-1)[:, :2].contiguous()
    out = mixture_add(emulator, x, shares, experts, gate_up, down, residual)
    wanted = exact_mixture(x, shares, experts, exact_gate_up, exact_down, residual)
    # A step of what is between the products, made worse by the second.
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=4 * float(torch.finfo(dtype).eps))


def test_a_tokens_bits_do_not_depend_on_the_others(emulator: Emulator) -> None:
    gate_up, _ = experts_of(None, 4, 32, 64, torch.bfloat16)
    down, _ = experts_of(None, 4, 64, 16, torch.bfloat16)
    x, residual = torch.randn(2, 60, 64, dtype=torch.bfloat16)
    shares, experts = torch.rand(60, 2).bfloat16(), torch.rand(60, 4).argsort(-1)[:, :2].contiguous()
    together = mixture_add(emulator, x, shares, experts, gate_up, down, residual)  # tiles of 32
    for tokens in (slice(0, 1), slice(59, 60), slice(7, 21)):
        parts = [each[tokens].contiguous() for each in (x, shares, experts)]
        alone = mixture_add(emulator, *parts, gate_up, down, residual[tokens].contiguous())
        assert torch.equal(alone, together[tokens])


def test_no_tokens_are_no_work(emulator: Emulator) -> None:
    gate_up, _ = experts_of(None, 2, 32, 64, torch.bfloat16)
    down, _ = experts_of(None, 2, 64, 16, torch.bfloat16)
    none = torch.empty(0, 64, dtype=torch.bfloat16)
    chosen = torch.empty(0, 1, dtype=torch.int64)
    assert mixture_add(emulator, none, chosen.bfloat16(), chosen, gate_up, down, none).shape == (0, 64)
    shares, experts = choose_experts(emulator, none[:, :8].contiguous(), num_chosen=2, renormalises=True)
    assert shares.shape == experts.shape == (0, 2)


def test_fragments_have_each_weight_once() -> None:
    weight = torch.arange(1, 65 * 80 + 1, dtype=torch.int16).view(65, 80)
    halves = fragments(weight).view(torch.int16)
    assert len(halves) == 128 * 128
    assert torch.equal(halves[halves != 0].sort().values, weight.flatten())


@pytest.mark.parametrize("name", [None, "int4_g32"])
def test_a_model_runs_its_experts_by_the_kernels(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    """`ops` packs the experts of a device that has kernels, and computes from what it packed."""
    monkeypatch.setattr(cuda_ops, "launcher_of", lambda device: emulator)
    dtype = torch.bfloat16
    values = [torch.randn(3, *shape) / 8 for shape in ((2 * 32, 64), (64, 32))]
    parts: list[Sequence[Tensor | PackedWeight]] = []
    for part in values:
        quantized = [] if name is None else [quantize(each, weight_format(name)) for each in part]
        parts.append(
            [cuda_ops.pack_quantized(each, device=CPU) for each in quantized] or list(part.to(dtype))
        )
    packed = cuda_ops.pack_experts(*parts)
    assert packed is not None
    router = torch.randn(3, 64, dtype=dtype)
    mixture = MixtureFeedForward(
        router=router, gate_up=packed[0], down=packed[1], num_chosen=2, renormalises=True
    )
    plain = MixtureFeedForward(
        router=router, gate_up=tuple(parts[0]), down=tuple(parts[1]), num_chosen=2, renormalises=True
    )
    x, residual = torch.randn(2, 9, 64, dtype=dtype)
    torch.testing.assert_close(mixture.forward(x, residual), plain.forward(x, residual), rtol=0.02, atol=0.02)
    padding = 2 * 64 * 32 * 2 if name is None else 0  # of down's inputs, for each of the two experts
    assert mixture.step_bytes == plain.step_bytes + padding


def test_gating_by_the_kernels_is_that_of_ops(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_ops, "launcher_of", lambda device: emulator)
    for dtype in (torch.float32, torch.bfloat16):
        x, router = torch.randn(6, 32).to(dtype), torch.randn(8, 32).to(dtype)
        for renormalises in (True, False):
            found = cuda_ops.choose_experts(x, router, num_chosen=2, renormalises=renormalises)
            wanted = ops.choose_experts(x, router, num_chosen=2, renormalises=renormalises)
            torch.testing.assert_close(found[0], wanted[0])
            assert torch.equal(found[1], wanted[1])


def test_what_has_no_kernel_is_not_stacked() -> None:
    def plain(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    assert can_stack([plain(16, 8), plain(16, 8)])
    assert not can_stack([plain(16, 8), plain(8, 16)])
    assert not can_stack([plain(16, 8), plain(16, 8, dtype=torch.float16)])
    assert not can_stack([plain(16, 8, dtype=torch.float32)])
    assert not can_stack([plain(16, 12)])
    quantized = quantize(torch.randn(64, 64), weight_format("fp6_e3m2"))
    direct, other = (pack_for_device(quantized, layout) for layout in (DIRECT, INTERLEAVED))
    assert can_stack([direct, direct])
    assert not can_stack([direct, other]) and not can_stack([other, other])
    assert not can_stack([direct, plain(64, 64)]) and not can_stack([plain(64, 64), direct])
    assert cuda_ops.pack_experts([plain(16, 8)], [plain(12, 8)]) is None
    assert cuda_ops.pack_experts([plain(16, 8)] * 513, [plain(8, 8)] * 513) is None


def test_what_the_kernels_do_not_take_is_refused(emulator: Emulator) -> None:
    with pytest.raises(ShapeMismatch, match="3 of 2 experts cannot be chosen"):
        choose_experts(emulator, torch.zeros(1, 2).half(), num_chosen=3, renormalises=True)
    with pytest.raises(ShapeMismatch, match="1 of 513 experts cannot be chosen"):
        group_by_expert(emulator, torch.zeros(1, 1, dtype=torch.int64), num_experts=513)
    gate_up, _ = experts_of(None, 2, 32, 64, torch.bfloat16)
    down, _ = experts_of(None, 2, 64, 24, torch.bfloat16)
    x, shares = torch.zeros(1, 64).bfloat16(), torch.ones(1, 1).bfloat16()
    experts = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ShapeMismatch, match=r"2 experts of \(32, 64\) do not go with 2 of \(64, 24\)"):
        mixture_add(emulator, x, shares, experts, gate_up, down, x)
    groups = group_by_expert(emulator, experts, num_experts=2)
    with pytest.raises(ShapeMismatch, match=r"x is of type torch\.float16, but the experts' weights of"):
        expert_linear(emulator, x.half(), gate_up, groups, sources=None, targets=None)
