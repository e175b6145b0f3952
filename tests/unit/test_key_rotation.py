"""Cached keys move to other positions: what attention sees is what it would have seen there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.engine_support import reference_model, save
from trireme.kernels import ops
from trireme.loading.whole import load_model
from trireme.models.config import RopeConfig, RopeKind
from trireme.models.null import NullModel
from trireme.models.rope import KeyRotation, RopeTable

HEADS, DIM, POSITIONS = 2, 16, 512
ROPES = {
    "default": RopeConfig(),
    "linear": RopeConfig(kind=RopeKind.LINEAR, factor=4.0, theta=5000.0),
    "llama3": RopeConfig(
        kind=RopeKind.LLAMA3, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64
    ),
    "longrope": RopeConfig(
        kind=RopeKind.LONGROPE,
        original_max_positions=64,
        short_factors=(1.0, 1.0, 1.0),
        long_factors=(1.0, 2.0, 5.0),
        amplitude=1.2,
    ),
}


def table(
    rope: RopeConfig, *, max_positions: int = POSITIONS, dtype: torch.dtype = torch.float32
) -> RopeTable:
    return RopeTable(
        rope,
        head_dim=DIM,
        max_positions=max_positions,
        num_positions=POSITIONS,
        device=torch.device("cpu"),
        dtype=dtype,
        rotary_dim=2 * len(rope.long_factors) or None,
    )


def rotation_of(rope: RopeTable) -> KeyRotation:
    assert rope.key_rotation is not None
    return rope.key_rotation


def random_keys(seed: int, tokens: int) -> Tensor:
    return torch.randn(tokens, HEADS, DIM, generator=torch.Generator().manual_seed(seed))


def rotated(rope: RopeTable, raw: Tensor, first: int) -> Tensor:
    """As a model caches them, for positions from `first` on."""
    return ops.rotary(raw, *rope.at(torch.arange(first, first + raw.shape[0])))


@pytest.mark.parametrize("kind", ROPES)
@settings(deadline=None, max_examples=25)
@given(first=st.integers(1, 400), cut=st.integers(0, 400), tokens=st.integers(1, 40), seed=st.integers(0, 99))
def test_attention_over_moved_keys_is_attention_over_raw_keys_rotated_there(
    kind: str, first: int, cut: int, tokens: int, seed: int
) -> None:
    rope, cut = table(ROPES[kind]), min(cut, first)
    raw, values = random_keys(seed, tokens), random_keys(seed + 1, tokens)
    moved = rotation_of(rope).turn(rotated(rope, raw, first), -cut)
    expected = rotated(rope, raw, first - cut)
    query = rotated(rope, random_keys(seed + 2, 1), first - cut + tokens)

    def attend(keys: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (query, keys, values)))

    torch.testing.assert_close(attend(moved), attend(expected), rtol=0, atol=1e-5)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-4)


def test_whole_blocks_of_all_layers_turn_at_once() -> None:
    rope = table(ROPES["default"])
    raw = random_keys(0, 24)
    layers = torch.stack([rotated(rope, raw, 40), rotated(rope, -raw, 40)]).view(2, 3, 8, HEADS, DIM)
    moved = rotation_of(rope).turn(layers, -32)
    assert moved.shape == layers.shape
    torch.testing.assert_close(moved[0].reshape(24, HEADS, DIM), rotated(rope, raw, 8))
    torch.testing.assert_close(moved[1], -moved[0])


def test_keys_may_lose_their_position_and_get_another() -> None:
    """What a store of raw keys does: turn back at save, forth at load."""
    rope, raw = table(ROPES["llama3"]), random_keys(3, 30)
    turn = rotation_of(rope).turn
    saved = turn(rotated(rope, raw, 100), -torch.arange(100, 130))
    torch.testing.assert_close(saved, raw, rtol=0, atol=1e-4)
    torch.testing.assert_close(turn(saved, torch.arange(7, 37)), rotated(rope, raw, 7), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "once", "four_times"), [(torch.float16, 2e-3, 8e-3), (torch.bfloat16, 2e-2, 6e-2)]
)
def test_each_turn_rounds_once(dtype: torch.dtype, once: float, four_times: float) -> None:
    rope = table(ROPES["default"])
    keys = random_keys(5, 256).to(dtype)
    moved = keys
    for _ in range(4):
        moved = rotation_of(rope).turn(moved, -64)
        assert moved.dtype is dtype
    exact = rotation_of(rope).turn(keys.float(), -256)
    first = rotation_of(rope).turn(keys, -256).float()
    assert (first - exact).abs().max() <= once
    assert (first - exact).abs().max() <= exact.abs().max() * torch.finfo(dtype).eps / 2 + 1e-6
    assert (moved.float() - exact).abs().max() <= four_times


def test_where_frequencies_depend_on_the_position_keys_do_not_move() -> None:
    dynamic = RopeConfig(kind=RopeKind.DYNAMIC, factor=4.0)
    assert table(dynamic, max_positions=POSITIONS // 4).key_rotation is None
    assert table(dynamic, max_positions=POSITIONS).key_rotation is not None  # never stretched


def test_models_say_whether_their_keys_can_move(tmp_path: Path) -> None:
    movable = {"llama3": True, "qwen3": True, "phi3_partial": True, "gemma3": False, "gpt2": False}
    for name, moves in movable.items():
        model = load_model(save(reference_model(name), tmp_path / name))
        assert (model.key_rotation is not None) == moves
    assert NullModel().key_rotation is None
