"""GGUF files become checkpoints: the same weights, logits and tokens; damaged files become clear errors."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import random
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Form
from safetensors.torch import load_file
from tokenizers import Tokenizer

from tests.unit.engine_support import LLAMA3_ROPE, VOCAB, answer, greedy, prompt_of, reference_model, settings
from tests.unit.gguf_blocks import DECODED
from tests.unit.gguf_support import as_stored, interleaved, tensors_of, write_gguf
from tests.unit.test_models_parity import all_logits
from trireme.cli.__main__ import app
from trireme.engine import build
from trireme.errors import InvalidCheckpoint, InvalidConfiguration
from trireme.gguf_import.importing import import_gguf
from trireme.gguf_import.tensors import READ
from trireme.gguf_import.tokenizer import read_tokenizer
from trireme.loading.whole import load_model
from trireme.quant.reading import QuantizedCheckpoint

ROOT = Path(__file__).resolve().parents[2]
OURS = ROOT / "checkpoints" / "trireme-py-1m"
TEXTS = (
    "def take(self, count: int) -> bytes:\n    return self._data[:count]  # 12345 and 6\n",
    "It's   what they'LL say:\r\n\r\n\tnaïve façade, 数字 123, ½ — ‘so’…   ",
    " \n\n \x00 emoji 🏛🏛️ ſ ﬁ Ⅷ ４２",
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def wide() -> Any:
    """A Llama whose rows are whole blocks of every type."""
    hf: Any = importlib.import_module("transformers")
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
    )
    return hf.LlamaForCausalLM(config).eval()


def halves_from_neighbours(weight: np.ndarray, heads: int) -> np.ndarray:
    """What the converter's permutation undoes, row by row."""
    out = np.empty_like(weight)
    head_dim = len(weight) // heads
    for row in range(len(weight)):
        head, place = divmod(row, head_dim)
        pair, which = divmod(place, 2)
        out[head * head_dim + which * head_dim // 2 + pair] = weight[row]
    return out


@pytest.mark.parametrize("form", sorted(READ), ids=lambda form: form.name)
def test_weights_are_exactly_those_of_the_file(form: Form, wide: Any, tmp_path: Path) -> None:
    report = import_gguf(write_gguf(tmp_path / "a.gguf", wide, form), tmp_path / "out")
    assert report.coded == (9 if form is Form.Q4_0 else 0)
    held = load_file(tmp_path / "out" / "model.safetensors")
    if report.coded:
        with QuantizedCheckpoint(tmp_path / "out") as coded:
            held |= {name: coded.dequantized(name) for name in coded.manifest.weights}
    stored = as_stored(wide, form)
    kept = {Form.F16: torch.float16, Form.BF16: torch.bfloat16}.get(form, torch.float32)
    for name, (_, data, kind) in stored.items():
        expected = gguf.quants.dequantize(data, kind)
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads:
            expected = halves_from_neighbours(expected, heads)
        assert np.array_equal(held[name].float().numpy(), expected), name
        assert held[name].dtype == (kept if held[name].dim() == 2 else torch.float32)
    if form not in (Form.F32, Form.F16, Form.BF16, Form.Q6_K):
        return  # Weights of float32 as well: what was shown of them is shown of these.
    prompt = prompt_of(1, 40)
    theirs = importlib.import_module("transformers").LlamaForCausalLM.from_pretrained(tmp_path / "out")
    with torch.inference_mode():
        expected_logits = theirs.float()(torch.tensor([prompt])).logits[0]
    difference = (all_logits(load_model(tmp_path / "out"), prompt) - expected_logits).abs().max()
    assert difference <= 1e-3 * max(1.0, float(expected_logits.abs().max()))


@pytest.mark.parametrize("form", sorted(DECODED), ids=lambda form: form.name)
def test_blocks_are_read_as_their_layout_says(form: Form, wide: Any, tmp_path: Path) -> None:
    import_gguf(write_gguf(tmp_path / "a.gguf", wide, form), tmp_path / "out")
    held = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    raw = as_stored(wide, form)[name][1].tobytes()
    size = gguf.GGML_QUANT_SIZES[form][1]
    expected = [w for at in range(0, len(raw), size) for w in DECODED[form](raw[at : at + size])]
    assert held[name].flatten().tolist() == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(
    ("form", "bits"), [(Form.Q4_0, 4), (Form.Q4_1, 4), (Form.Q5_0, 5), (Form.Q5_1, 5), (Form.Q8_0, 8)]
)
def test_what_the_package_quantized_is_near_to_what_it_was(
    form: Form, bits: int, wide: Any, tmp_path: Path
) -> None:
    import_gguf(write_gguf(tmp_path / "a.gguf", wide, form), tmp_path / "out", dtype="float32")
    held = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in tensors_of(wide).items():
        if weight.ndim == 2:
            groups = weight.reshape(-1, 32)
            step = (groups.max(1) - groups.min(1)).max() / (2**bits - 2)
            assert np.abs(held[name].numpy() - weight).max() <= 1.01 * step, name


@pytest.mark.parametrize("name", ["llama2", "llama3", "qwen2", "qwen3"])
def test_logits_are_those_of_the_model_that_the_file_was_made_from(name: str, tmp_path: Path) -> None:
    reference = reference_model(name)
    factors = llama3_factors() if name == "llama3" else ()
    path = write_gguf(tmp_path / "a.gguf", reference, rope_factors=factors)
    import_gguf(path, tmp_path / "out", shard_bytes=20_000)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    prompt = prompt_of(1, 100)
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    assert (all_logits(load_model(tmp_path / "out"), prompt) - expected).abs().max().item() <= 1e-4


def llama3_factors() -> list[float]:
    """What llama.cpp's converter divides the frequencies of `engine_support.LLAMA3_ROPE` by."""
    rope, head_dim, factors = LLAMA3_ROPE, 8, []
    old, low, high = (
        float(rope[key])
        for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * float(rope["rope_theta"]) ** (2 * pair / head_dim)
        if wavelength < old / high:
            factors.append(1.0)
        elif wavelength > old / low:
            factors.append(float(rope["factor"]))
        else:
            smooth = (old / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / float(rope["factor"]) + smooth))
    return factors


@pytest.mark.skipif(
    not (OURS / "model.safetensors").exists(), reason="the checkpoints are not in this checkout"
)
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_checkpoint_that_went_there_and_back_says_the_same(dtype: str, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from benchmarks.gguf_export import export

    export(OURS, tmp_path / "a.gguf")
    out = tmp_path / "out"
    told = CliRunner().invoke(app, ["import-gguf", str(tmp_path / "a.gguf"), str(out), "--dtype", dtype])
    assert told.exit_code == 0, told.output
    theirs, ours = (Tokenizer.from_file(str(each / "tokenizer.json")) for each in (OURS, out))
    for text in (*TEXTS, "<|user|>\nhello<|end|>"):
        assert ours.encode(text).ids == theirs.encode(text).ids
        assert ours.decode(ours.encode(text).ids) == theirs.decode(theirs.encode(text).ids)
    prompt = theirs.encode(TEXTS[0]).ids
    expected = answer(build(OURS, settings=settings()), prompt, greedy(48))
    assert answer(build(out, settings=settings()), prompt, greedy(48)) == expected


def byte_level(pre: str, **changes: Any) -> dict[str, Any]:
    """Metadata of a small vocabulary over bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*sorted(ByteLevel.alphabet()), "Ġt", "he", "Ġthe", "ing", "in", "12", "123", "<|end|>"]
    merges = ["Ġ t", "h e", "Ġt he", "i n", "in g", "1 2", "12 3"]
    types = [1] * (len(tokens) - 1) + [3]
    fields = {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": merges, "token_type": types, **changes}
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


def tokenizer_of(values: dict[str, Any], vocabulary_size: int = 4096) -> Tokenizer:
    read = read_tokenizer(values, source="a.gguf", vocabulary_size=vocabulary_size)
    return Tokenizer.from_str(read.tokenizer)


def test_words_are_cut_as_the_published_tokenizers_cut_them() -> None:
    hf: Any = importlib.import_module("transformers")
    slow: Any = importlib.import_module("transformers.convert_slow_tokenizer")
    values = byte_level("qwen2")
    vocab = {token: index for index, token in enumerate(values["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    qwen = hf.Qwen2Tokenizer(vocab=vocab, merges=merges)
    gpt2 = hf.GPT2Tokenizer(vocab=vocab, merges=merges)
    for pre, theirs in (("qwen2", qwen), ("gpt-2", gpt2)):
        ours = tokenizer_of(byte_level(pre))
        for text in TEXTS:
            assert ours.encode(text).ids == theirs(text, add_special_tokens=False)["input_ids"], (pre, text)
    pattern = json.loads(tokenizer_of(byte_level("llama-bpe")).to_str())["pre_tokenizer"]["pretokenizers"][0]
    assert pattern["pattern"]["Regex"] == slow.TikTokenConverter(vocab_file="none").pattern


def test_the_beginning_and_control_tokens_are_as_the_file_says() -> None:
    end = len(byte_level("gpt-2")["tokenizer.ggml.tokens"]) - 1
    plain = tokenizer_of(byte_level("gpt-2", bos_token_id=end)).encode("the<|end|>")
    llama = tokenizer_of(byte_level("llama-bpe", bos_token_id=end)).encode("the<|end|>")
    assert llama.ids == [end, *plain.ids]
    assert plain.ids[-1] == end
    both = byte_level("gpt-2", bos_token_id=end, eos_token_id=end, add_bos_token=True, add_eos_token=True)
    assert tokenizer_of(both).encode("the<|end|>").ids == [end, *plain.ids, end]
    read = read_tokenizer(
        byte_level("gpt-2", eos_token_id=3, eot_token_id=end), source="a", vocabulary_size=512
    )
    assert read.eos_token_ids == (3, end)


def sentence_piece(seed: int) -> dict[str, Any]:
    """Metadata of a random vocabulary with scores, grown by joining tokens."""
    rng = random.Random(seed)
    letters = ["\u2581", *"abcdé"]
    pieces = list(letters)
    while len(pieces) < 60:
        joined = rng.choice(pieces) + rng.choice(pieces)
        if joined not in pieces and len(joined) <= 6:
            pieces.append(joined)
    special = ["<unk>", "<s>", "</s>"]
    by_byte = [f"<0x{code:02X}>" for code in range(256)]
    joined_pieces = pieces[len(letters) :]
    rng.shuffle(joined_pieces)
    tokens = [*special, *by_byte, *joined_pieces, *letters]
    types = [2, 3, 3] + [6] * 256 + [1] * len(pieces)
    scores = [0.0] * 259 + [-float(number) for number in range(len(pieces))]
    fields = {
        "model": "llama",
        "tokens": tokens,
        "token_type": types,
        "scores": scores,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


def joined_by_score(text: str, values: dict[str, Any]) -> list[int]:
    """SentencePiece's rule, plainly: join the neighbours whose union has the highest score."""
    tokens, scores = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.scores"]
    ids = {token: index for index, token in enumerate(tokens)}
    pieces = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        found = [
            (-scores[ids[left + right]], place)
            for place, (left, right) in enumerate(itertools.pairwise(pieces))
            if left + right in ids
        ]
        if not found:
            break
        place = min(found)[1]
        pieces[place : place + 2] = ["".join(pieces[place : place + 2])]
    out = []
    for piece in pieces:
        out += [ids[piece]] if piece in ids else [ids[f"<0x{code:02X}>"] for code in piece.encode()]
    return out


@pytest.mark.parametrize("seed", range(5))
def test_scores_join_tokens_as_sentencepiece_does(seed: int) -> None:
    values = sentence_piece(seed)
    tokenizer = tokenizer_of(values)
    rng = random.Random(seed)
    for _ in range(60):
        text = "".join(rng.choices(["a", "b", "c", "d", "é", " ", "数"], k=rng.randint(1, 24)))
        assert tokenizer.encode(text).ids == [1, *joined_by_score(text, values)], text
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole file."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "a.gguf", reference_model("llama2")).read_bytes()


def refused(data: bytes, tmp_path: Path) -> str:
    """The error of a file; it leaves nothing behind."""
    path, out = tmp_path / "a.gguf", tmp_path / "out"
    path.write_bytes(data)
    with pytest.raises(InvalidCheckpoint) as caught:
        import_gguf(path, out)
    assert [each.name for each in tmp_path.iterdir()] == ["a.gguf"]
    return str(caught.value)


def test_a_file_cut_short_anywhere_is_refused(small: bytes, tmp_path: Path) -> None:
    rng = random.Random(1)
    cuts = {0, 3, 4, 8, 23, 24, len(small) - 1, *rng.sample(range(len(small)), 120), *range(24, 400, 7)}
    for cut in sorted(cuts):
        assert str(tmp_path / "a.gguf") in refused(small[:cut], tmp_path)


def test_damaged_headers_are_refused_or_harmless(small: bytes, tmp_path: Path) -> None:
    rng = random.Random(2)
    header = 6000
    outcomes = {"refused": 0, "read": 0}
    for number in range(250):
        damaged = bytearray(small)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(header)] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        path, out = tmp_path / "a.gguf", tmp_path / f"out{number}"
        path.write_bytes(damaged)
        try:
            import_gguf(path, out)
            outcomes["read"] += 1
        except InvalidCheckpoint:
            outcomes["refused"] += 1
            assert not out.exists()
    assert outcomes["refused"] >= 50


def test_absurd_counts_cost_nothing(small: bytes, tmp_path: Path) -> None:
    for place in (8, 16):  # numbers of tensors and of keys
        for count in (1 << 63, 1 << 40, 60_000):
            damaged = small[:place] + struct.pack("<Q", count) + small[place + 8 :]
            assert refused(damaged, tmp_path)
    place = small.index(b"llama.block_count") + len(b"llama.block_count") + 4
    damaged = small[:place] + struct.pack("<I", 0xFFFFFFFF) + small[place + 4 :]
    assert "block_count" in refused(damaged, tmp_path)
    place = small.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    damaged = small[:place] + struct.pack("<Q", 1 << 60) + small[place + 8 :]
    assert "tokenizer.ggml.tokens" in refused(damaged, tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("model", "bert", "gpt2 or llama"),
        ("pre", "tekken", "llama-bpe"),
        ("tokens", ["a", "a"], "twice"),
        ("tokens", ["a"] * 5000, "5000 tokens"),
        ("tokens", [1, 2], "strings"),
        ("token_type", [1], "token_type"),
        ("merges", ["a b c"], "merges"),
        ("merges", ["nowhere tofind"], "do not fit"),
        ("bos_token_id", 1 << 31, "bos_token_id"),
        ("add_bos_token", 1, "add_bos_token"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_refused_by_key(key: str, value: Any, named: str) -> None:
    with pytest.raises(InvalidCheckpoint, match=named):
        tokenizer_of({**byte_level("gpt-2"), f"tokenizer.ggml.{key}": value})


def test_what_is_not_served_is_refused_by_name(small: bytes, wide: Any, tmp_path: Path) -> None:
    other = small.replace(b"llama.", b"mamba.").replace(
        struct.pack("<Q", 5) + b"llama", struct.pack("<Q", 5) + b"mamba"
    )
    assert "'mamba'" in refused(other, tmp_path)
    assert "blk.0.attn_x.weight" in refused(small.replace(b"blk.0.attn_q.", b"blk.0.attn_x."), tmp_path)
    (tmp_path / "a.gguf").unlink()
    write_gguf(tmp_path / "b.gguf", wide, Form.F32)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for out, dtype in ((tmp_path / "full", "auto"), (tmp_path / "out", "int3")):
        with pytest.raises(InvalidConfiguration):
            import_gguf(tmp_path / "b.gguf", out, dtype=dtype)


def test_weights_that_are_no_numbers_are_refused(wide: Any, tmp_path: Path) -> None:
    for form in (Form.Q4_0, Form.Q8_0, Form.F16):
        path = write_gguf(tmp_path / f"{form.name}.gguf", wide, form)
        data = bytearray(path.read_bytes())
        reader = gguf.GGUFReader(str(path))
        at = next(each.data_offset for each in reader.tensors if each.name == "blk.0.ffn_up.weight")
        data[int(at) : int(at) + 2] = np.float16(np.inf).tobytes()
        path.write_bytes(data)
        with pytest.raises(InvalidCheckpoint, match=r"blk\.0\.ffn_up\.weight"):
            import_gguf(path, tmp_path / "out")


def test_the_permutation_of_the_writer_is_undone_by_the_one_of_the_test() -> None:
    weight = np.arange(48 * 2, dtype=np.float32).reshape(48, 2)
    assert np.array_equal(halves_from_neighbours(interleaved(weight, 3), 3), weight)
