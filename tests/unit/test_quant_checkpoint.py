"""Quantized checkpoints: what is written reads back exactly, and whatever else is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trireme.errors import InvalidCheckpoint, InvalidConfiguration
from trireme.quant import writing
from trireme.quant.bit_packing import packed_bytes
from trireme.quant.formats import FORMATS, WeightFormat, weight_format
from trireme.quant.quantization import dequantize, quantize
from trireme.quant.reading import QuantizedCheckpoint
from trireme.quant.weight_error import weight_error
from trireme.quant.writing import quantize_checkpoint

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT / "checkpoints" / "trireme-py-1m"
needs_weights = pytest.mark.skipif(
    not (REAL / "model.safetensors").exists(), reason="the checkpoints are not in this checkout"
)
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
Edit = Callable[[dict[str, Any]], object]


def tiny(directory: Path, *, columns: int = 64, **changes: Tensor) -> Path:
    """A checkpoint of one layer's worth of names, with `changes` by kind."""
    generator = torch.Generator().manual_seed(7)
    shapes = {
        "model.embed_tokens": (10, columns),
        "model.layers.0.self_attn.q_proj": (6, columns),
        "model.layers.0.mlp.down_proj": (5, columns),
        "model.layers.0.block_sparse_moe.gate": (4, columns),
        "model.norm": (columns,),
    }
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors |= {name: tensor for name in tensors for kind, tensor in changes.items() if kind in name}
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": columns}))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "LICENSE").write_text("free")
    (directory / "pytorch_model.bin").write_text("old")
    return directory


@pytest.fixture
def written(tmp_path: Path) -> Path:
    quantize_checkpoint(tiny(tmp_path / "source"), tmp_path / "out", weight_format("int4_g32_zeros"))
    return tmp_path / "out"


def edit_config(directory: Path, change: Edit) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(directory: Path, change: Edit) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@needs_weights
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS.keys())
def test_a_real_checkpoint_comes_back_as_the_codes_that_its_weights_have(
    form: WeightFormat, tmp_path: Path
) -> None:
    report = quantize_checkpoint(REAL, tmp_path / "out", form)
    before = load_file(REAL / "model.safetensors")
    linear = {name for name in before if "_proj" in name}
    with QuantizedCheckpoint(tmp_path / "out") as checkpoint:
        assert set(checkpoint.manifest.weights) == linear == {weight.name for weight in report.weights}
        assert set(checkpoint.kept) == set(before) - linear
        for name in checkpoint.kept:
            assert torch.equal(checkpoint.tensor(name), before[name])
            assert checkpoint.tensor(name).dtype == before[name].dtype
        for weight in report.weights:
            wanted, found = quantize(before[weight.name], form), checkpoint.weight(weight.name)
            assert torch.equal(found.codes, wanted.codes) and torch.equal(found.scales, wanted.scales)
            assert (found.zeros is None) == (wanted.zeros is None)
            assert found.zeros is None or wanted.zeros is None or torch.equal(found.zeros, wanted.zeros)
            assert weight.error == weight_error(before[weight.name], found)
            assert torch.equal(checkpoint.dequantized(weight.name), dequantize(wanted))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("quantization")["layout"] == "dense_v1"
    assert config == json.loads((REAL / "config.json").read_text())
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (REAL / "tokenizer.json").read_bytes()


@needs_weights
def test_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    report = quantize_checkpoint(REAL, tmp_path / "out", weight_format("fp6_e3m2"))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert report.bytes_after == sum(tensor.nbytes for tensor in tensors.values())
    assert report.bytes_before == sum(t.nbytes for t in load_file(REAL / "model.safetensors").values())
    shapes = [weight.stored.shape for weight in report.weights]
    assert report.quantized_bytes == sum(
        rows * packed_bytes(columns, 6) + 4 * rows for rows, columns in shapes
    )


def test_only_linear_layers_are_quantized_unless_more_is_asked_for(tmp_path: Path) -> None:
    source, form = tiny(tmp_path / "source"), weight_format("fp6_e3m2")
    kinds = {weight.kind for weight in quantize_checkpoint(source, tmp_path / "a", form).weights}
    assert kinds == {"q_proj", "down_proj"}
    more = quantize_checkpoint(source, tmp_path / "b", form, also=["embed_tokens"]).weights
    assert {weight.kind for weight in more} == kinds | {"embed_tokens"}


def test_tokenizer_and_licence_go_along_and_other_weights_do_not(written: Path) -> None:
    names = {path.name for path in written.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "LICENSE"}


@pytest.mark.parametrize("columns", [1, 3, 64])
def test_rows_of_any_length_survive(columns: int, tmp_path: Path) -> None:
    source = tiny(tmp_path / "source", columns=columns)
    quantize_checkpoint(source, tmp_path / "out", weight_format("fp5_e2m2"))
    with QuantizedCheckpoint(tmp_path / "out") as checkpoint:
        wanted = quantize(load_file(source / "model.safetensors")[Q_PROJ], weight_format("fp5_e2m2"))
        assert torch.equal(checkpoint.weight(Q_PROJ).codes, wanted.codes)


def test_shards_stay_shards(tmp_path: Path) -> None:
    source = tiny(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    weight_map = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, source / file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    quantize_checkpoint(source, tmp_path / "out", weight_format("int8_ch"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"][Q_PROJ + ".codes"] == weight_map[Q_PROJ]
    with QuantizedCheckpoint(tmp_path / "out") as checkpoint:
        assert torch.equal(
            checkpoint.weight(Q_PROJ).codes, quantize(tensors[Q_PROJ], weight_format("int8_ch")).codes
        )


def test_gpt2_weights_have_a_scale_per_output_though_they_lie_transposed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    weight = torch.randn((32, 96), generator=torch.Generator().manual_seed(3))  # (input, output)
    tensors = {"h.0.attn.c_attn.weight": weight, "h.0.attn.c_attn.bias": torch.ones(96)}
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    quantize_checkpoint(source, tmp_path / "out", weight_format("int8_ch"))
    with QuantizedCheckpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.weight("h.0.attn.c_attn.weight").codes.shape == (96, 32)
        restored = checkpoint.dequantized("h.0.attn.c_attn.weight")
        assert torch.equal(restored, dequantize(quantize(weight.T.contiguous(), weight_format("int8_ch"))).T)
        assert checkpoint.kept == ("h.0.attn.c_attn.bias",)


@pytest.mark.parametrize(
    "field, value",
    [
        ("layout", "direct_v1"),
        ("layout", None),
        ("version", 2),
        ("version", True),
        ("format", "fp6"),
        ("format", ["fp6_e3m2"]),
        ("format", "int4_g32"),
        ("bits", 6),
        ("group_size", 64),
        ("has_zeros", 1),
        ("weights", {}),
        ("weights", [Q_PROJ]),
        ("weights", {Q_PROJ: {"shape": [6, 64]}}),
        ("weights", {Q_PROJ: {"shape": [6, -64], "transposed": False}}),
        ("weights", {Q_PROJ: {"shape": [6, 63], "transposed": False}}),
        ("weights", {Q_PROJ: {"shape": [6, True], "transposed": False}}),
        ("weights", {"other.weight": {"shape": [6, 64], "transposed": False}}),
    ],
)
def test_a_manifest_that_says_something_else_is_refused(written: Path, field: str, value: object) -> None:
    edit_config(written, lambda config: config["quantization"].update({field: value}))
    with pytest.raises(InvalidCheckpoint, match=r"other|config\.json"):
        QuantizedCheckpoint(written)


@pytest.mark.parametrize("part", ["codes", "scales", "zeros"])
def test_a_missing_part_is_refused_by_name(written: Path, part: str) -> None:
    edit_tensors(written, lambda tensors: tensors.pop(f"{Q_PROJ}.{part}"))
    with pytest.raises(InvalidCheckpoint, match=rf"q_proj\.weight\.{part} is missing"):
        QuantizedCheckpoint(written)


@pytest.mark.parametrize(
    "part, change, words",
    [
        ("codes", lambda t: t[:, 1:].contiguous(), "shape"),
        ("codes", lambda t: t[1:].contiguous(), "shape"),
        ("codes", lambda t: t.to(torch.int8), "int8"),
        ("scales", lambda t: t.bfloat16(), "bfloat16"),
        ("scales", lambda t: t[:, :1].contiguous(), "shape"),
        ("scales", lambda t: t * float("nan"), "finite and positive"),
        ("scales", lambda t: t * float("inf"), "finite and positive"),
        ("scales", lambda t: -t, "finite and positive"),
        ("scales", lambda t: t * 0, "finite and positive"),
        ("zeros", lambda t: t.repeat(1, 2), "shape"),
    ],
)
def test_a_part_of_another_form_is_refused_by_name(
    written: Path, part: str, change: Callable[[Tensor], Tensor], words: str
) -> None:
    name = f"{Q_PROJ}.{part}"
    edit_tensors(written, lambda tensors: tensors.update({name: change(tensors[name])}))
    with (
        QuantizedCheckpoint(written) as checkpoint,
        pytest.raises(InvalidCheckpoint, match=rf"{part} .*{words}"),
    ):
        checkpoint.weight(Q_PROJ)


def test_scales_of_int4_may_be_negative_but_not_zero(tmp_path: Path) -> None:
    quantize_checkpoint(tiny(tmp_path / "source"), tmp_path / "out", weight_format("int4_g32"))
    with QuantizedCheckpoint(tmp_path / "out") as checkpoint:
        assert (checkpoint.weight(Q_PROJ).scales < 0).any()
    edit_tensors(tmp_path / "out", lambda tensors: tensors[Q_PROJ + ".scales"][2, 1].fill_(0))
    with (
        QuantizedCheckpoint(tmp_path / "out") as checkpoint,
        pytest.raises(InvalidCheckpoint, match="not zero"),
    ):
        checkpoint.weight(Q_PROJ)


def test_padding_that_is_not_zero_is_refused_by_name(tmp_path: Path) -> None:
    quantize_checkpoint(tiny(tmp_path / "source", columns=3), tmp_path / "out", weight_format("fp6_e3m2"))
    edit_tensors(tmp_path / "out", lambda tensors: tensors[Q_PROJ + ".codes"][:, -1].fill_(255))
    with (
        QuantizedCheckpoint(tmp_path / "out") as checkpoint,
        pytest.raises(InvalidCheckpoint, match=r"q_proj\.weight\.codes: .*not zero"),
    ):
        checkpoint.weight(Q_PROJ)


def test_a_weight_that_is_there_twice_is_refused(written: Path) -> None:
    edit_tensors(written, lambda tensors: tensors.update({Q_PROJ: torch.ones(6, 64)}))
    with pytest.raises(InvalidCheckpoint, match="both"):
        QuantizedCheckpoint(written)


def test_a_file_that_was_cut_short_is_refused(written: Path) -> None:
    path = written / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InvalidCheckpoint, match=r"model\.safetensors is not a readable"):
        QuantizedCheckpoint(written)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"quantization": 3}', "[" * 100_000])
def test_a_config_that_is_none_is_refused(written: Path, text: str) -> None:
    (written / "config.json").write_text(text)
    with pytest.raises(InvalidCheckpoint, match=r"config\.json"):
        QuantizedCheckpoint(written)


@pytest.mark.parametrize(
    "weight_map, words",
    [
        ({Q_PROJ: "../source/model.safetensors"}, "outside"),
        ({Q_PROJ: "absent.safetensors"}, "absent"),
        ({Q_PROJ: "shard.safetensors"}, "disagree"),
        ({}, "no weight_map"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, weight_map: dict[str, str], words: str) -> None:
    source = tiny(tmp_path / "source")
    (source / "model.safetensors").rename(source / "shard.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InvalidCheckpoint, match=words):
        quantize_checkpoint(source, tmp_path / "out", weight_format("int8_ch"))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"down_proj": torch.full((5, 64), float("nan"))}, r"down_proj\.weight\[0, 0\] is nan"),
        ({"q_proj": torch.ones(6, 63)}, "q_proj.*63 input channels"),
        ({"q_proj": torch.ones(6)}, "q_proj.*shape"),
        ({"q_proj": torch.ones(6, 64, dtype=torch.int32)}, "q_proj.*int32"),
    ],
)
def test_weights_that_cannot_be_quantized_leave_nothing_behind(
    tmp_path: Path, changes: dict[str, Tensor], words: str
) -> None:
    source = tiny(tmp_path / "source", **changes)
    with pytest.raises(InvalidCheckpoint, match=words):
        quantize_checkpoint(source, tmp_path / "out", weight_format("int4_g32"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_quantized_checkpoint_is_not_quantized_again(written: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match="quantized already"):
        quantize_checkpoint(written, tmp_path / "again", weight_format("int8_ch"))


def test_a_disk_that_does_not_take_the_file_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise SafetensorError("no space left")

    source = tiny(tmp_path / "source")
    monkeypatch.setattr(writing, "save_file", refuse)
    with pytest.raises(OSError, match=r"model\.safetensors cannot be written: no space left"):
        quantize_checkpoint(source, tmp_path / "out", weight_format("int8_ch"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_directory_in_use_is_left_alone(tmp_path: Path) -> None:
    source = tiny(tmp_path / "source")
    with pytest.raises(InvalidConfiguration, match="exists already"):
        quantize_checkpoint(source, source, weight_format("int8_ch"))
    (tmp_path / "empty").mkdir()
    quantize_checkpoint(source, tmp_path / "empty", weight_format("int8_ch"))
    assert QuantizedCheckpoint(tmp_path / "empty").manifest.form.name == "int8_ch"


def test_what_is_not_there_cannot_be_asked_for(tmp_path: Path) -> None:
    source, form = tiny(tmp_path / "source"), weight_format("int8_ch")
    with pytest.raises(InvalidConfiguration, match="norm cannot"):
        quantize_checkpoint(source, tmp_path / "out", form, also=["norm"])
    with pytest.raises(InvalidCheckpoint, match="lm_head"):
        quantize_checkpoint(source, tmp_path / "out", form, also=["lm_head"])
    with pytest.raises(InvalidCheckpoint, match="not a directory"):
        quantize_checkpoint(tmp_path / "absent", tmp_path / "out", form)


def test_other_names_are_refused_by_the_reader(written: Path) -> None:
    with QuantizedCheckpoint(written) as checkpoint:
        with pytest.raises(InvalidCheckpoint, match="is quantized"):
            checkpoint.tensor(Q_PROJ)
        with pytest.raises(InvalidCheckpoint, match="no quantized weight"):
            checkpoint.weight("model.norm.weight")
        with pytest.raises(InvalidCheckpoint, match="in none"):
            checkpoint.tensor("absent")
    shutil.rmtree(written)
    with pytest.raises(InvalidCheckpoint, match="not a directory"):
        QuantizedCheckpoint(written)
