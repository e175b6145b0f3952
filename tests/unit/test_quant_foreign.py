"""Checkpoints of GPTQ, AWQ and compressed-tensors: their weights, exactly, or a refusal that names the cause.

The packers below follow the formats' descriptions, code by code, and share nothing with the reader.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.unit.engine_support import prompt_of, reference_model, save
from tests.unit.test_models_parity import all_logits
from trireme.errors import InvalidCheckpoint, InvalidConfiguration
from trireme.kernels import ops
from trireme.loading.whole import load_model, load_whole
from trireme.quant.device_layouts import DIRECT, pack_for_device
from trireme.quant.foreign import ForeignCheckpoint
from trireme.quant.foreign_schemes import parse_scheme
from trireme.quant.quantization import dequantize

Matrix = NDArray[np.int64]
NAME = "model.layers.0.mlp.up_proj"
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
AWQ: dict[str, Any] = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 32,
    "zero_point": True,
    "version": "gemm",
}


def compressed(group_size: int | None = 32, **weights: Any) -> dict[str, Any]:
    scheme = {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": group_size,
        "symmetric": True,
        "actorder": None,
        **weights,
    }
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def words_along_rows(values: Matrix, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)) -> Tensor:
    """Eight nibbles of a row to a word; nibble i holds neighbour order[i]. Rows are filled up with zeros."""
    rows, count = values.shape
    out = np.zeros((rows, -(-count // 8)), dtype=np.uint32)
    for row in range(rows):
        for word in range(out.shape[1]):
            for nibble, neighbour in enumerate(order):
                column = 8 * word + neighbour
                if column < count:
                    out[row, word] |= np.uint32(int(values[row, column]) << (4 * nibble))
    return torch.from_numpy(out.view(np.int32).copy())


class Drawn:
    """Random codes of one matrix, and the weights that they mean by definition: (code - zero) * scale."""

    def __init__(
        self,
        outputs: int,
        inputs: int,
        group: int,
        *,
        seed: int = 0,
        symmetric: bool = False,
        reordered: int | None = None,
    ) -> None:
        """`reordered`: which order of input channels; None: groups are neighbours."""
        rng = np.random.default_rng(seed)
        groups = inputs // group
        self.group_of: Matrix = np.arange(inputs) // group
        if reordered is not None:
            self.group_of = np.random.default_rng((reordered, inputs)).permutation(self.group_of)
        self.codes: Matrix = rng.integers(0, 16, (outputs, inputs))
        lowest = 1  # what the first version of GPTQ can store
        self.zeros: Matrix = (
            np.full((outputs, groups), 8) if symmetric else rng.integers(lowest, 16, (outputs, groups))
        )
        self.scales = rng.uniform(0.001, 0.05, (outputs, groups)).astype(np.float16)

    @property
    def weight(self) -> NDArray[np.float64]:
        """(outputs, inputs)."""
        scales = self.scales.astype(np.float64)
        return (self.codes - self.zeros[:, self.group_of]) * scales[:, self.group_of]

    def gptq(self, name: str, *, shift: int = 1) -> dict[str, Tensor]:
        return {
            f"{name}.qweight": words_along_rows(self.codes).T.contiguous(),
            f"{name}.qzeros": words_along_rows(self.zeros.T - shift),
            f"{name}.scales": torch.from_numpy(self.scales.T.copy()),
            f"{name}.g_idx": torch.from_numpy(self.group_of).int(),
        }

    def awq(self, name: str) -> dict[str, Tensor]:
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        return {
            f"{name}.qweight": words_along_rows(self.codes.T, order),
            f"{name}.qzeros": words_along_rows(self.zeros.T, order),
            f"{name}.scales": torch.from_numpy(self.scales.T.copy()),
        }

    def compressed(self, name: str, *, has_zeros: bool = True) -> dict[str, Tensor]:
        outputs, inputs = self.codes.shape
        parts = {
            f"{name}.weight_packed": words_along_rows(self.codes),
            f"{name}.weight_scale": torch.from_numpy(self.scales.copy()),
            f"{name}.weight_shape": torch.tensor([outputs, inputs]),
        }
        if has_zeros:
            parts[f"{name}.weight_zero_point"] = words_along_rows(self.zeros.T).T.contiguous()
        if not np.array_equal(self.group_of, np.sort(self.group_of)):
            parts[f"{name}.weight_g_idx"] = torch.from_numpy(self.group_of).int()
        return parts


def written(directory: Path, tensors: dict[str, Tensor], scheme: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors"
    )
    (directory / "config.json").write_text(json.dumps({"quantization_config": scheme}))
    return directory


Pack = Callable[[Drawn, str], dict[str, Tensor]]
CASES: dict[str, tuple[Pack, Callable[[int], dict[str, Any]], bool]] = {
    "gptq": (Drawn.gptq, lambda g: GPTQ | {"group_size": g}, False),
    "gptq-symmetric": (Drawn.gptq, lambda g: GPTQ | {"group_size": g, "sym": True, "desc_act": True}, True),
    "gptq_v2": (
        lambda drawn, name: drawn.gptq(name, shift=0),
        lambda g: GPTQ | {"group_size": g, "checkpoint_format": "gptq_v2"},
        False,
    ),
    "awq": (Drawn.awq, lambda g: AWQ | {"group_size": g}, False),
    "compressed": (
        lambda drawn, name: drawn.compressed(name, has_zeros=False),
        lambda g: compressed(g, actorder="weight"),
        True,
    ),
    "compressed-zeros": (Drawn.compressed, lambda g: compressed(g, symmetric=False), False),
}


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("case", CASES)
def test_weights_are_exactly_what_the_format_says(case: str, group: int, tmp_path: Path) -> None:
    pack, scheme, symmetric = CASES[case]
    drawn = Drawn(24, 256, group, seed=group, symmetric=symmetric)
    checkpoint = ForeignCheckpoint(written(tmp_path, pack(drawn, NAME), scheme(group)))
    assert f"{NAME}.weight" in checkpoint and f"{NAME}.qweight" not in checkpoint
    found = checkpoint.weight(f"{NAME}.weight")
    assert found.form.name == f"int4_g{group}" + ("" if symmetric else "_zeros")
    assert np.array_equal(found.codes.numpy(), drawn.codes)
    assert np.array_equal(dequantize(found, torch.float64).numpy(), drawn.weight)
    assert np.array_equal(dequantize(found, torch.float16).numpy(), drawn.weight.astype(np.float16))


def test_zero_points_of_compressed_tensors_need_not_fill_their_words(tmp_path: Path) -> None:
    drawn = Drawn(13, 64, 32)
    tensors = drawn.compressed(NAME)
    packed = ForeignCheckpoint(written(tmp_path / "a", tensors, compressed(symmetric=False)))
    assert np.array_equal(dequantize(packed.weight(f"{NAME}.weight"), torch.float64).numpy(), drawn.weight)
    tensors[f"{NAME}.weight_zero_point"] = torch.from_numpy(drawn.zeros - 8).to(torch.int8)
    signed = ForeignCheckpoint(written(tmp_path / "b", tensors, compressed(symmetric=False)))
    assert np.array_equal(dequantize(signed.weight(f"{NAME}.weight"), torch.float64).numpy(), drawn.weight)


def test_scales_may_be_bfloat16_and_zero(tmp_path: Path) -> None:
    drawn = Drawn(16, 64, 32)
    tensors = drawn.compressed(NAME)
    scales = tensors[f"{NAME}.weight_scale"].bfloat16()
    scales[3, 1] = 0.0
    tensors[f"{NAME}.weight_scale"] = scales
    drawn.scales = scales.float().numpy()
    found = ForeignCheckpoint(written(tmp_path, tensors, compressed(symmetric=False))).weight(
        f"{NAME}.weight"
    )
    assert np.array_equal(dequantize(found, torch.float64).numpy(), drawn.weight)
    assert (found.scales > 0).all() and not dequantize(found)[3, 32:].any()


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("case", [case for case in CASES if case != "awq"])
def test_reordered_channels_mean_the_same_weights(case: str, group: int, tmp_path: Path) -> None:
    pack, scheme, symmetric = CASES[case]
    drawn = Drawn(24, 256, group, seed=group, symmetric=symmetric, reordered=1)
    drawn.scales[3, 0] = 0.0
    checkpoint = ForeignCheckpoint(written(tmp_path, pack(drawn, NAME), scheme(group)))
    found = checkpoint.weight(f"{NAME}.weight")
    assert np.array_equal(dequantize(found, torch.float64).numpy(), drawn.weight)
    x = torch.from_numpy(np.random.default_rng(2).standard_normal((9, 256)))
    expected = x @ torch.from_numpy(drawn.weight).T
    for dtype, limit in ((torch.float32, 2e-4), (torch.bfloat16, 2e-2)):
        packed = ops.pack_quantized(found, device=torch.device("cpu"), dtype=dtype)
        product = ops.linear(x.to(dtype), packed).double()
        assert float((product - expected).norm() / expected.norm()) < limit
    with pytest.raises(InvalidCheckpoint, match="order of input channels"):
        pack_for_device(found, DIRECT)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("inputs", "group"), [(256, 128), (192, 64), (96, 32)])
def test_whole_rows_are_groups_of_one_scale(inputs: int, group: int, symmetric: bool, tmp_path: Path) -> None:
    drawn = Drawn(24, inputs, inputs, symmetric=symmetric)
    scheme = GPTQ | {"group_size": -1, "sym": symmetric, "desc_act": True}
    found = ForeignCheckpoint(written(tmp_path, drawn.gptq(NAME), scheme)).weight(f"{NAME}.weight")
    assert found.form.name == f"int4_g{group}" + ("" if symmetric else "_zeros")
    assert np.array_equal(dequantize(found, torch.float64).numpy(), drawn.weight)


MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{case: (case, {}, {}) for case in CASES},
    "whole rows": ("gptq", {"group": None}, {"group_size": -1}),
    "reordered": ("gptq", {"reordered": 1}, {"desc_act": True}),
    "reordered, each its own way": ("gptq-symmetric", {"reordered": None}, {}),
}
"""A case, and how its matrices and its scheme differ."""
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_answers_on_them_as_transformers_does_on_the_weights_that_they_mean(
    name: str, tmp_path: Path
) -> None:
    import importlib

    hf: Any = importlib.import_module("transformers")
    case, drawing, changes = MODELS[name]
    pack, scheme, symmetric = CASES[case]
    torch.manual_seed(11)
    config = hf.LlamaConfig(
        vocab_size=120,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        eos_token_id=None,
    )
    reference = hf.LlamaForCausalLM(config).eval()
    directory = save(reference, tmp_path)
    tensors, state = load_file(directory / "model.safetensors"), reference.state_dict()
    for seed, weight in enumerate(sorted(tensors)):
        if not any(f"{kind}.weight" in weight for kind in LINEAR):
            continue
        outputs, inputs = tensors.pop(weight).shape
        group = inputs if "group" in drawing else 32
        reordered = (drawing["reordered"] or seed) if "reordered" in drawing else None
        drawn = Drawn(outputs, inputs, group, seed=seed, symmetric=symmetric, reordered=reordered)
        packed = pack(drawn, weight.removesuffix(".weight"))
        tensors |= {key: part.contiguous() for key, part in packed.items()}
        state[weight] = torch.from_numpy(drawn.weight).float()
    reference.load_state_dict(state)
    save_file(tensors, directory / "model.safetensors")
    written_config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(
        json.dumps(written_config | {"quantization_config": scheme(32) | changes})
    )

    token_ids = prompt_of(1, 50)
    with torch.inference_mode():
        expected = reference(torch.tensor([token_ids])).logits[0]
    loaded = load_whole(directory)
    assert loaded.weight_format == "int4_g32" + ("" if symmetric else "_zeros")
    found = all_logits(loaded.model, token_ids)
    assert float((found - expected).norm() / expected.norm()) <= 1e-3  # native kernels round activations
    with pytest.raises(InvalidConfiguration, match="holds int4_g32"):
        load_model(directory, precision="int8")


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("fp8", "quantization_config is 'fp8'"),
        ({}, "quant_method is None; codes of gptq, awq, compressed-tensors are read"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method is 'bitsandbytes'"),
        (GPTQ | {"bits": 3}, "bits is 3; only 4"),
        (GPTQ | {"bits": 4.0}, "bits is 4.0"),
        (GPTQ | {"group_size": -2}, "group_size is -2; groups of 32, 64, 128"),
        (AWQ | {"group_size": -1}, "group_size is -1; groups of 32, 64, 128"),
        (GPTQ | {"group_size": 256}, "group_size is 256"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format"),
        (GPTQ | {"dynamic": {"-:.*lm_head": {}}}, "dynamic"),
        (AWQ | {"version": "gemv"}, "version is 'gemv'; only absent, 'gemm', 'GEMM'"),
        (AWQ | {"zero_point": False}, "zero_point is False"),
        (AWQ | {"bits": 8}, "bits is 8"),
        (compressed() | {"format": "marlin-24"}, "format is 'marlin-24'"),
        (compressed() | {"config_groups": {}}, "config_groups has 0 groups"),
        (compressed() | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (compressed(num_bits=8), r"config_groups\.group_0\.weights\.num_bits is 8"),
        (compressed(strategy="channel", group_size=None), "strategy is 'channel'"),
        (compressed(type="float"), "type is 'float'"),
        (compressed(group_size=16), "group_size is 16"),
    ],
)
def test_what_is_not_read_is_refused_by_field(scheme: object, words: str) -> None:
    with pytest.raises(InvalidCheckpoint, match=words):
        parse_scheme(scheme, source="config.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t[f"{NAME}.g_idx"][:5].fill_(1), "g_idx must name 2 groups of 32 input channels each"),
        (lambda t: t[f"{NAME}.g_idx"].sub_(1), "g_idx must name 2 groups"),
        (lambda t: t.pop(f"{NAME}.qzeros"), "qzeros is in none"),
        (lambda t: t.update({f"{NAME}.scales": t[f"{NAME}.scales"][:1].contiguous()}), "scales is .* shape"),
        (lambda t: t.update({f"{NAME}.qweight": t[f"{NAME}.qweight"].float()}), "qweight is torch.float32"),
        (lambda t: t.update({f"{NAME}.qweight": t[f"{NAME}.qweight"][:5].contiguous()}), "40 input channels"),
        (lambda t: t.update({f"{NAME}.qweight": t[f"{NAME}.qweight"][0].contiguous()}), "must be a matrix"),
        (lambda t: t[f"{NAME}.scales"].fill_(float("nan")), "must be finite"),
        (lambda t: t[f"{NAME}.scales"].neg_(), "not negative"),
        (lambda t: t[f"{NAME}.qzeros"].fill_(-1), "has zero point 16; 0 to 15"),
    ],
)
def test_damaged_parts_are_refused_by_name(
    change: Callable[[dict[str, Tensor]], object], words: str, tmp_path: Path
) -> None:
    tensors = Drawn(16, 64, 32).gptq(NAME)
    change(tensors)
    checkpoint = ForeignCheckpoint(written(tmp_path, tensors, GPTQ))
    with pytest.raises(InvalidCheckpoint, match=words):
        checkpoint.weight(f"{NAME}.weight")


def test_what_contradicts_its_description_is_refused(tmp_path: Path) -> None:
    lopsided = ForeignCheckpoint(written(tmp_path, Drawn(16, 64, 32).gptq(NAME), GPTQ | {"sym": True}))
    with pytest.raises(InvalidCheckpoint, match="symmetric codes have 8"):
        lopsided.weight(f"{NAME}.weight")
    with pytest.raises(InvalidCheckpoint, match="no quantized weight"):
        lopsided.weight("model.norm.weight")
    with pytest.raises(InvalidCheckpoint, match=r"no tensor ends in \.weight_packed"):
        ForeignCheckpoint(written(tmp_path, Drawn(16, 64, 32).gptq(NAME), compressed()))
    with pytest.raises(InvalidCheckpoint, match="quant_method is None"):
        load_model(save_with_unknown_quantization(tmp_path / "model"))


def save_with_unknown_quantization(directory: Path) -> Path:
    save(reference_model("llama2"), directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    return directory
