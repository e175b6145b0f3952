"""All layers in one native call: transformers' logits, and the same bits whatever shares the step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trireme.kernels.attention_batch import AttentionBatch
from trireme.kernels.cpu_library import cpu_library
from trireme.kernels.kv_forms import KV_DTYPES, decode, encode, kv_form
from trireme.loading.whole import load_model
from trireme.models.decoder import Decoder

pytestmark = pytest.mark.skipif(
    cpu_library() is None, reason="the CPU kernels are not built for this machine"
)

BLOCK = 16
NUM_BLOCKS = 64
VOCAB = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 104,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {"sliding_window": 37},
    "Qwen2": {},
    "Qwen3": {"head_dim": 80},
    "Phi3": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
        "pad_token_id": 0,
    },
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "Qwen3Moe": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "head_dim": 16,
        "mlp_only_layers": [1],
    },
    "Gemma": {"head_dim": 32},
    "Gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 37,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "Gemma3": {
        "head_dim": 48,
        "sliding_window": 29,
        "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
    },
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Decoder]:
    """A random model of transformers, and ours of its bfloat16 weights, computing in float32."""
    import transformers

    torch.manual_seed(3)
    name = "Gemma3TextConfig" if request.param == "Gemma3" else f"{request.param}Config"
    config = getattr(transformers, name)(**SIZES, **FAMILIES[request.param])
    kind = getattr(transformers, f"{request.param}ForCausalLM")
    theirs = kind(config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif "norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            elif "q_proj" in name or "k_proj" in name:
                parameter.mul_(4.0)  # scores that a cap bends
    directory: Path = tmp_path_factory.mktemp(request.param)
    theirs.bfloat16().save_pretrained(directory)
    ours = load_model(directory)
    assert isinstance(ours, Decoder) and ours._native is not None
    return kind.from_pretrained(directory, dtype=torch.float32).eval(), ours


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class Cache:
    """A paged cache, and where its sequences' tokens lie."""

    def __init__(self, model: Decoder, kv_dtype: str = "auto") -> None:
        config, form = model.config, kv_form(kv_dtype, torch.float32)
        shape, dtype = (
            (NUM_BLOCKS, BLOCK, config.num_kv_heads, form.row_elements(config.head_dim)),
            form.storage,
        )
        self.model = model
        self.kv = [
            (torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))
            for _ in range(config.num_layers)
        ]
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}
        self._free = list(np.random.default_rng(7).permutation(NUM_BLOCKS))

    def step(self, parts: Sequence[tuple[int, Sequence[int]]], *, gated: bool = False) -> dict[int, Tensor]:
        """Tokens of sequences, one alone first; the final hidden states of each."""
        parts = sorted(parts, key=lambda part: len(part[1]) > 1)
        with torch.inference_mode():
            hidden = self.model.forward(*self._inputs(parts, gated=gated))
        states = torch.split(hidden, [len(tokens) for _, tokens in parts])
        return {sequence: state for (sequence, _), state in zip(parts, states, strict=True)}

    @torch.inference_mode()
    def scored_step(
        self, parts: Sequence[tuple[int, Sequence[int]]], scored: Tensor | None, *, gated: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The final hidden states of all tokens, and the scores behind some of them."""
        return self.model.forward_scored(*self._inputs(parts, gated=gated), scored)

    def _inputs(self, parts: Sequence[tuple[int, Sequence[int]]], *, gated: bool) -> Any:
        parts = sorted(parts, key=lambda part: len(part[1]) > 1)
        for sequence, tokens in parts:
            self.lengths[sequence] = self.lengths.get(sequence, 0) + len(tokens)
            table = self.tables.setdefault(sequence, [])
            while len(table) * BLOCK < self.lengths[sequence]:
                table.append(int(self._free.pop()))
        width = max(len(self.tables[sequence]) for sequence, _ in parts)
        tables = np.zeros((len(parts), width), dtype=np.int64)
        for row, (sequence, _) in enumerate(parts):
            tables[row, : len(self.tables[sequence])] = self.tables[sequence]
        batch = AttentionBatch(
            query_lens=[len(tokens) for _, tokens in parts],
            context_lens=[self.lengths[sequence] for sequence, _ in parts],
            block_tables=tables,
            block_size=BLOCK,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        positions = [
            torch.arange(self.lengths[sequence] - len(tokens), self.lengths[sequence])
            for sequence, tokens in parts
        ]
        flat = torch.tensor([token for _, tokens in parts for token in tokens])
        kv = Walked(self.kv) if gated else self.kv
        return flat, torch.cat(positions), kv, batch


class Walked:
    """Layers that are handed over one by one, in order."""

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.layers = layers
        self.walked: list[int] = []

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index >= len(self.layers):
            raise IndexError(index)
        self.walked.append(index)
        return self.layers[index]


def tokens_of(seed: int, count: int) -> list[int]:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_logits_are_those_of_transformers(pair: tuple[Any, Decoder]) -> None:
    theirs, ours = pair
    prompt = tokens_of(0, 150)
    with torch.inference_mode():
        expected = theirs(torch.tensor([prompt])).logits[0]
    cache = Cache(ours)
    states = [cache.step([(0, part)])[0] for part in (prompt[:70], prompt[70:71], prompt[71:])]
    logits = ours.logits(torch.cat(states))
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert (logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("gated", [False, True])
def test_scores_of_the_same_call_are_those_of_a_call_of_their_own(
    pair: tuple[Any, Decoder], gated: bool
) -> None:
    _, ours = pair
    parts = [(0, [5]), (1, tokens_of(1, 30)), (2, tokens_of(2, 9))]
    expected = Cache(ours).step(parts)
    hidden = torch.cat([expected[number] for number in range(3)])
    for rows in ([0, 30, 39], [7], [], None):
        scored = None if rows is None else torch.tensor(rows, dtype=torch.int64)
        states, scores = Cache(ours).scored_step(parts, scored, gated=gated)
        with torch.inference_mode():
            apart = ours.logits(hidden if scored is None else hidden[scored])
        assert torch.equal(states, hidden)
        # A cap is a tanh, and PyTorch has another.
        assert torch.allclose(scores, apart, rtol=1e-6, atol=1e-6) and scores.shape == apart.shape
        assert ours.config.logit_cap is not None or torch.equal(scores, apart)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_row_is_the_same_to_the_last_bit_whatever_shares_its_step(
    pair: tuple[Any, Decoder], kv_dtype: str
) -> None:
    _, ours = pair
    prompts = {number: tokens_of(number, length) for number, length in enumerate((90, 13, 1, 130, 33))}
    alone: dict[int, Tensor] = {}
    torch.set_num_threads(1)
    for number, prompt in prompts.items():
        alone[number] = Cache(ours, kv_dtype).step([(number, prompt)])[number]
    for threads, gated, size in ((1, False, 17), (2, True, 40), (3, False, 130), (2, False, 1)):
        torch.set_num_threads(threads)
        cache = Cache(ours, kv_dtype)
        found: dict[int, list[Tensor]] = {number: [] for number in prompts}
        rest = dict(prompts)
        while rest:
            parts = [(number, left[:size]) for number, left in rest.items()]
            for number, state in cache.step(parts, gated=gated).items():
                found[number].append(state)
            rest = {number: left[size:] for number, left in rest.items() if left[size:]}
        for number, states in found.items():
            assert torch.equal(torch.cat(states), alone[number]), (number, threads, size)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_the_operators_one_by_one_give_the_same(pair: tuple[Any, Decoder], kv_dtype: str) -> None:
    _, ours = pair
    native = ours._native
    # In fewer bits one rounding of a key or value may fall the other way.
    limit = {"auto": 2e-5, "fp8": 8e-2}.get(kv_dtype, 1e-2)
    one, other = Cache(ours, kv_dtype), Cache(ours, kv_dtype)
    for parts in (
        [(0, tokens_of(1, 60))],
        [(0, [5]), (1, tokens_of(2, 44))],
        [(0, [3]), (1, [4])],
    ):
        found = one.step(parts)
        ours._native = None
        expected = other.step(parts)
        ours._native = native
        for number, state in found.items():
            assert torch.allclose(state, expected[number], rtol=limit, atol=limit)
    for mine, theirs in zip(one.kv, other.kv, strict=True):
        for cache, reference in zip(mine, theirs, strict=True):
            kept, expected = (decode(part, torch.float32).nan_to_num() for part in (cache, reference))
            assert (kept - expected).abs().max() <= limit * expected.abs().max()


def test_what_is_no_number_stays_with_its_sequence(pair: tuple[Any, Decoder]) -> None:
    _, ours = pair
    clean, dirty = Cache(ours), Cache(ours)
    for cache in (clean, dirty):
        cache.step([(0, tokens_of(1, 20)), (1, tokens_of(2, 20))])
    for keys, _ in dirty.kv:
        keys[dirty.tables[1][0], 3] = float("nan")
    expected, found = (cache.step([(0, [7]), (1, [8])]) for cache in (clean, dirty))
    assert torch.equal(found[0], expected[0]) and found[1].isnan().all()


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_a_row_of_the_cache_is_rounded_as_the_reference_rounds_it(
    pair: tuple[Any, Decoder], kv_dtype: str
) -> None:
    """Values are what the layer's product gives, so they are the same floats; some rows are nearly 0."""
    _, ours = pair
    plain, coded = Cache(ours), Cache(ours, kv_dtype)
    for cache in (plain, coded):
        cache.step([(0, tokens_of(1, 100))])
    (_, values), (_, codes) = plain.kv[0], coded.kv[0]
    written = (codes != 0).any(-1)
    assert torch.equal(codes[written], encode(values, codes.dtype)[written])
