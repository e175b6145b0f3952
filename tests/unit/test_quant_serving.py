"""Models on weights in few bits: what they compute, whose KV they find, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.unit.engine_support import (
    answer,
    greedy,
    prompt_of,
    reference_model,
    request,
    run,
    save,
    settings,
    tokens_of,
)
from tests.unit.test_models_parity import all_logits
from trireme.engine import build
from trireme.errors import InvalidCheckpoint, InvalidConfiguration, InvalidRequest
from trireme.kernels import ops
from trireme.kernels.cpu_library import cpu_library
from trireme.kvcache.block_identity import root_salt
from trireme.loading.whole import load_model, load_whole
from trireme.models.checkpoint import Checkpoint
from trireme.models.weights import ModelWeights
from trireme.quant.format_choice import nearest_format
from trireme.quant.formats import FORMATS, WeightFormat, weight_format
from trireme.quant.precisions import AUTO, FLOATS, SHORT_NAMES
from trireme.quant.quantization import QuantizedWeight, dequantize, quantize
from trireme.quant.reading import QuantizedCheckpoint
from trireme.quant.weight_error import weight_error
from trireme.quant.writing import quantize_checkpoint
from trireme.runtime.fleet import Precision, WorkerGroup, load_fleet
from trireme.wire.worker.v1 import worker_pb2 as pb
from trireme.worker import engine_loading
from trireme.worker.variant_plan import plan_from_request, plans_of

REAL = Path(__file__).resolve().parents[2] / "checkpoints" / "trireme-py-1m"
needs_weights = pytest.mark.skipif(
    not (REAL / "model.safetensors").exists(), reason="the checkpoints are not in this checkout"
)
EXPANDED_TOLERANCE, NATIVE_TOLERANCE = 2e-6, 1e-3
"""Norm of the differences of logits over that of the logits. Native kernels round activations to 16 bits."""
ROW_FORMATS = ("fp6_e3m2", "fp6_e2m3", "fp5_e2m2", "int8_ch")
"""Those that take rows of any length."""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["expanded", "native"])
def tolerance(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """Both ways to compute with codes, and how far each may be from the weights that they stand for."""
    if request.param == "expanded":
        monkeypatch.setattr(ops, "takes_quantized", lambda form, device, dtype: False)
        return EXPANDED_TOLERANCE
    if cpu_library() is None:
        pytest.skip("the native kernels are not built, or this CPU lacks AVX2")
    return NATIVE_TOLERANCE


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


NO_TIER: Any = None


def quantized(source: Path, out: Path, form: str, **options: Any) -> Path:
    quantize_checkpoint(source, out, weight_format(form), **options)
    return out


def expanded_reference(model: Any, directory: Path) -> Any:
    """A model of transformers with the weights that a quantized checkpoint stands for."""
    with QuantizedCheckpoint(directory) as checkpoint, TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)  # names as in files: experts have others in memory
        path = Path(scratch) / "model.safetensors"
        tensors = load_file(path)
        for name in checkpoint.manifest.weights:
            tensors[name] = checkpoint.dequantized(name).to(tensors[name].dtype)
        save_file(tensors, path, metadata={"format": "pt"})
        return type(model).from_pretrained(scratch, dtype=model.dtype).eval()


def logits_of_reference(model: Any, token_ids: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([token_ids])).logits[0]
        return logits


def edit_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("form", ROW_FORMATS)
@pytest.mark.parametrize("name", ["llama_linear", "llama3", "qwen3", "mixtral", "phi3_partial", "gpt2"])
def test_logits_equal_those_of_transformers_on_the_weights_that_the_codes_stand_for(
    name: str, form: str, tolerance: float, tmp_path: Path
) -> None:
    source = save(reference_model(name), tmp_path / "source")
    stored = quantized(source, tmp_path / "stored", form)
    expected = logits_of_reference(expanded_reference(reference_model(name), stored), prompt_of(1, 60))
    found = all_logits(load_model(stored), prompt_of(1, 60))
    assert difference(found, expected) <= tolerance
    unquantized = logits_of_reference(reference_model(name), prompt_of(1, 60))
    assert difference(found, unquantized) > 5 * NATIVE_TOLERANCE, "the codes were not read"


@pytest.mark.parametrize("name", ["llama3", "gpt2"])
def test_weights_quantized_at_load_are_those_that_the_command_writes(name: str, tmp_path: Path) -> None:
    source = save(reference_model(name), tmp_path / "source", shard_size="20KB")
    stored = quantized(source, tmp_path / "stored", "int8_ch")
    token_ids = prompt_of(2, 40)
    at_load = load_whole(source, precision="int8")
    assert at_load.weight_format == "int8_ch"
    assert torch.equal(
        all_logits(at_load.model, token_ids), all_logits(load_model(stored, precision="int8"), token_ids)
    )


@needs_weights
@pytest.mark.parametrize("form", ["int4_g64", "int4_g128_zeros", "fp6_e2m3"])
def test_a_trained_model_answers_on_few_bits_as_transformers_does(
    form: str, tolerance: float, tmp_path: Path
) -> None:
    import importlib

    hf: Any = importlib.import_module("transformers")
    stored = quantized(REAL, tmp_path / "stored", form)
    reference = expanded_reference(hf.AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32), stored)
    token_ids = prompt_of(5, 120, vocab=4096)
    expected = logits_of_reference(reference.eval(), token_ids)
    assert difference(all_logits(load_model(stored), token_ids), expected) <= tolerance


@needs_weights
@pytest.mark.parametrize("precision", ["fp6", "int8", "int4"])
def test_an_answer_does_not_depend_on_who_runs_beside_it(precision: str) -> None:
    prompts = {str(seed): prompt_of(seed, 5 + 17 * seed, vocab=4096) for seed in range(5)}
    alone = {
        name: answer(build(REAL, settings=settings(), precision=precision), prompt, greedy(24))
        for name, prompt in prompts.items()
    }
    engine = build(REAL, settings=settings(), precision=precision)
    for name, prompt in prompts.items():
        engine.add(request(name, prompt, greedy(24)))
    assert tokens_of(run(engine)) == alone


@pytest.mark.parametrize("kind", ["embed_tokens", "lm_head"])
def test_embedding_and_head_may_be_quantized_too(kind: str, tolerance: float, tmp_path: Path) -> None:
    name = "llama3" if kind == "embed_tokens" else "qwen2"  # llama3's embedding is its head
    source = save(reference_model(name), tmp_path / "source")
    stored = quantized(source, tmp_path / "stored", "int8_ch", also=[kind])
    expected = logits_of_reference(expanded_reference(reference_model(name), stored), prompt_of(3, 30))
    assert difference(all_logits(load_model(stored), prompt_of(3, 30)), expected) <= tolerance


def test_layers_that_share_inputs_need_not_all_be_quantized(tmp_path: Path) -> None:
    class KeysOnly:
        form = weight_format("int8_ch")

        def __contains__(self, name: object) -> bool:
            return "k_proj" in str(name)

        def weight(self, name: str) -> QuantizedWeight:
            return quantize(tensors[name], self.form)

        def close(self) -> None: ...

    source = save(reference_model("llama2"), tmp_path)
    tensors = load_file(source / "model.safetensors")
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    with Checkpoint(source) as checkpoint:
        weights = ModelWeights(checkpoint, KeysOnly(), device=torch.device("cpu"), dtype=torch.float32)
        fused = weights.linear([(name, 32) for name in names], 32)
    parts = [dequantize(quantize(tensors[n], KeysOnly.form)) if "k_proj" in n else tensors[n] for n in names]
    x = torch.randn(4, 32)
    assert torch.allclose(ops.linear(x, fused), x @ torch.cat(parts).T, atol=1e-5)


@needs_weights
def test_blocks_of_one_precision_are_never_found_under_another(tmp_path: Path) -> None:
    group = WorkerGroup()
    namespaces = {}
    precisions = (AUTO, "int8", "fp6_e2m3", "fp6_e3m2", "int4_g64", "int4_g64_zeros", "bf16")
    cases = [
        *((precision, AUTO) for precision in precisions),
        ("int8", "int8"),
        ("int8", "fp8"),
        (AUTO, "bf16"),
    ]
    for precision, kv_dtype in cases:
        asked = pb.LoadVariantRequest(
            variant="v", checkpoint=str(REAL), precision=precision, kv_dtype=kv_dtype, kv_bytes=2**20
        )
        plan = plan_from_request(asked, group, block_tokens=16)
        first, again = (engine_loading.describe(engine_loading.build(plan, NO_TIER)[0]) for _ in range(2))
        namespaces[precision, kv_dtype] = first.kv_namespace
        assert again == first
        assert first.num_blocks == 2**20 // first.block_bytes
    stored = quantized(REAL, tmp_path / "stored", "int8_ch")
    namespaces["stored", AUTO] = load_whole(stored).key
    assert len(set(namespaces.values())) == len(namespaces)
    roots = {root_salt(tenant="t", model_key=key, kv_layout="l") for key in namespaces.values()}
    assert len(roots) == len(namespaces)


def test_fp6_is_the_kind_that_is_nearer_to_the_weights(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    candidates = tuple(FORMATS[name] for name in SHORT_NAMES["fp6"])
    chosen = {}
    for name, outlier in (("even", 1.0), ("lopsided", 60.0)):
        weight = torch.randn(96, 256, generator=generator)
        weight[:, 7] *= outlier
        directory = tmp_path / name
        directory.mkdir()
        save_file({"model.layers.0.mlp.up_proj.weight": weight}, directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))

        def error(form: WeightFormat, weight: Tensor = weight) -> float:
            return weight_error(weight, quantize(weight, form)).relative_frobenius

        chosen[name] = nearest_format(directory, candidates)
        assert chosen[name] == min(candidates, key=error)
    assert (chosen["even"].name, chosen["lopsided"].name) == ("fp6_e2m3", "fp6_e3m2")


def test_a_format_that_the_checkpoint_is_not_in_is_refused(tmp_path: Path) -> None:
    source = save(reference_model("llama2"), tmp_path / "source")
    stored = quantized(source, tmp_path / "stored", "fp6_e3m2")
    assert load_whole(stored, precision="fp6").weight_format == "fp6_e3m2"
    for precision in ("fp6_e2m3", "int8", "float32", "bf16"):
        with pytest.raises(InvalidConfiguration, match=f"holds fp6_e3m2, not {precision}"):
            load_model(stored, precision=precision)
    with pytest.raises(InvalidConfiguration, match="precision 'fp7' does not exist; use one of auto"):
        load_model(source, precision="fp7")


Damage = Callable[[Path], None]
CODES = "model.layers.1.mlp.down_proj.weight.codes"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda d: edit_config(d, lambda c: c["quantization"].update(layout="interleaved_v1")),
            "layout is 'int",
        ),
        (lambda d: edit_config(d, lambda c: c.update(intermediate_size=64)), r"\(56, 32\).*\(64, 32\)"),
        (lambda d: edit_tensors(d, lambda t: t.update({CODES: t[CODES][:, :9].contiguous()})), CODES),
        (lambda d: edit_tensors(d, lambda t: t.pop(CODES)), f"{CODES} is missing"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\1" * 99), "model.safetensors is not a readable"),
    ],
)
def test_a_damaged_checkpoint_is_refused_when_it_is_loaded(
    damage: Damage, words: str, tmp_path: Path
) -> None:
    source = save(reference_model("llama2"), tmp_path / "source")
    stored = quantized(source, tmp_path / "stored", "fp5_e2m2")
    damage(stored)
    with pytest.raises(InvalidCheckpoint, match=words):
        load_model(stored)


@pytest.mark.parametrize(
    ("precision", "value", "words"),
    [
        ("int8", float("nan"), r"v_proj\.weight\[3, 5\] is nan"),
        ("int4", 0.5, "32 input channels, no multiple"),
    ],
)
def test_weights_that_cannot_be_quantized_are_refused_when_they_are_loaded(
    precision: str, value: float, words: str, tmp_path: Path
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.v_proj.weight"][3, 5] = value

    source = save(reference_model("llama2"), tmp_path / "source")
    edit_tensors(source, change)
    with pytest.raises(InvalidCheckpoint, match=words):
        load_model(source, precision=precision)


FLEET = """
models:
  m:
    variants:
      few: {{checkpoint: {checkpoint}, precision: fp6, kv_mib: 1}}
      half: {{checkpoint: {checkpoint}, precision: bf16, kv_mib: 1}}
      plain: {{checkpoint: {checkpoint}, kv_mib: 1}}
      small: {{checkpoint: {checkpoint}, kv_mib: 1, kv_dtype: int8}}
workers: [{{variants: [few, half, plain, small]}}]
"""


@needs_weights
def test_a_fleet_file_says_in_which_precision_a_variant_is_served(tmp_path: Path) -> None:
    (tmp_path / "fleet.yaml").write_text(FLEET.format(checkpoint=REAL))
    fleet = load_fleet(tmp_path / "fleet.yaml")
    plans = {plan.variant: plan for plan in plans_of(fleet, fleet.workers[0])}
    assert {name: (plan.precision, plan.dtype) for name, plan in plans.items()} == {
        "few": ("fp6", "auto"),
        "half": ("bf16", "bfloat16"),
        "plain": ("auto", "auto"),
        "small": ("auto", "auto"),
    }
    engines = {name: engine_loading.build(plan, NO_TIER)[0] for name, plan in plans.items()}
    prompt = prompt_of(3, 50, vocab=4096)
    stored = build(quantized(REAL, tmp_path / "stored", "fp6_e2m3"), settings=settings())
    assert answer(engines["few"], prompt, greedy(12)) == answer(stored, prompt, greedy(12))
    assert engines["half"].model.dtype == torch.bfloat16
    assert len({engine.model_key for engine in engines.values()}) == 2, "bf16 differs by its KV layout"
    assert len({engine_loading.describe(engine).kv_namespace for engine in engines.values()}) == 4
    blocks = {name: engine.settings.num_blocks for name, engine in engines.items()}
    rows = 2 * 3 * 16 * 2  # of one block: keys and values, layers, tokens, heads; each of 32 numbers
    assert blocks["plain"] == 2**20 // (rows * 32 * 4)
    assert blocks["small"] == 2**20 // (rows * (32 + 4)), "a byte a number, and four for their scale"
    assert len(answer(engines["small"], prompt, greedy(12))) == 12


def test_the_fleet_file_knows_the_precisions_that_there_are() -> None:
    assert set(get_args(Precision)) == {AUTO, *FLOATS, *SHORT_NAMES, *FORMATS}


def test_a_precision_that_does_not_fit_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    text = "models: {{m: {{variants: {{v: {{checkpoint: a, precision: {}, dtype: {}}}}}}}}}"
    for precision, dtype, says in (("fp7", "auto", "precision"), ("bf16", "float32", "differ")):
        (tmp_path / "fleet.yaml").write_text(text.format(precision, dtype))
        with pytest.raises(InvalidConfiguration, match=says):
            load_fleet(tmp_path / "fleet.yaml")
    asked = pb.LoadVariantRequest(variant="v", checkpoint="a", precision="fp7")
    with pytest.raises(InvalidRequest, match="precision"):
        plan_from_request(asked, WorkerGroup(), block_tokens=16)
