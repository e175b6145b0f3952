"""Sequences that outgrow the context: what stays is moved, found again, and never changes by chance."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.engine_support import (
    answer,
    greedy,
    outputs_of,
    prompt_of,
    reference_model,
    request,
    run,
    save,
    settings,
    tokens_of,
)
from tests.unit.kv_movement_support import ChanceRoster, conserves
from trireme.engine import Engine, FinishReason, SamplingParams, SequenceRequest, StoredBlock, Truncation
from trireme.errors import ContextLengthExceeded, InvalidRequest
from trireme.kernels.attention_batch import AttentionBatch
from trireme.kvcache.block_codec import payload_checksum
from trireme.kvcache.block_identity import HashChain, Supply, hash_chain, truncated_prefix
from trireme.kvcache.supplied_blocks import supplied_blocks
from trireme.loading.whole import load_model
from trireme.models.model import LayerKv, Model, forward_then_score
from trireme.policies.kv_truncation import MAX_ROTATIONS, TruncationRule, plan_truncation

BLOCK, HEAD, WINDOW = 8, 8, 64
DROP = 32  # half of the 56 tokens behind the head, in whole blocks
SALT = b"tenant"
CUTS = Truncation(head_tokens=HEAD)
ROTARY = ("llama2", "llama3", "llama_linear", "qwen3")


pytestmark = pytest.mark.usefixtures("one_thread")


class Watched:
    """A model that sees no position and no context beyond the window."""

    def __init__(self, model: Model, window: int) -> None:
        self._model = model
        self._window = window

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(
        self, tokens: Tensor, positions: Tensor, kv: Sequence[LayerKv], batch: AttentionBatch
    ) -> Tensor:
        assert int(positions.max()) < self._window
        return self._model.forward(tokens, positions, kv, batch)

    def forward_scored(
        self,
        tokens: Tensor,
        positions: Tensor,
        kv: Sequence[LayerKv],
        batch: AttentionBatch,
        scored: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return forward_then_score(self, tokens, positions, kv, batch, scored)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    names = (*ROTARY, "gpt2")
    return {name: load_model(save(reference_model(name), tmp_path_factory.mktemp(name))) for name in names}


@pytest.fixture(scope="module")
def frequencies() -> dict[str, np.ndarray[Any, Any]]:
    """Radians per position, as transformers has them."""
    return {name: reference_model(name).model.rotary_emb.inv_freq.double().numpy() for name in ROTARY}


def engine_of(model: Model, *, window: int = WINDOW, **changes: Any) -> Engine:
    return Engine(Watched(model, window), settings(max_model_len=window, **changes))


class ByHand:
    """One sequence, token by token over contiguous tensors; keys are moved in float64."""

    def __init__(self, model: Model, frequencies: np.ndarray[Any, Any] | None, window: int) -> None:
        config = model.config
        shape = (window // BLOCK, BLOCK, config.num_kv_heads, config.head_dim)
        self.model = model
        self.frequencies = frequencies
        self.kv = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_layers)]
        self.tokens: list[int] = []

    def read(self, token_ids: Sequence[int]) -> int:
        """Compute tokens; returns the likeliest next one."""
        start, count = len(self.tokens), len(token_ids)
        batch = AttentionBatch(
            query_lens=[count],
            context_lens=[start + count],
            block_tables=np.arange(len(self.kv[0][0]))[None],
            block_size=BLOCK,
            device=self.model.device,
            dtype=self.model.dtype,
        )
        hidden = self.model.forward(
            torch.tensor(token_ids), torch.arange(start, start + count), self.kv, batch
        )
        self.tokens += token_ids
        return int(self.model.logits(hidden[-1:]).argmax())

    def cut(self, gone: int) -> None:
        """Drop so many tokens behind the head; the rest moves, or is computed from what stays."""
        kept = self.tokens[:HEAD] + self.tokens[HEAD + gone :]
        if self.frequencies is None:
            self.tokens = []
            self.read(kept)
            return
        for keys, values in self.kv:
            flat_keys, flat_values = keys.flatten(0, 1), values.flatten(0, 1)
            stays = flat_keys[HEAD + gone : len(self.tokens)].double().numpy()
            half = stays.shape[-1] // 2
            turned = (stays[..., :half] + 1j * stays[..., half:]) * np.exp(-1j * gone * self.frequencies)
            moved = torch.from_numpy(np.concatenate((turned.real, turned.imag), -1)).float()
            flat_keys[HEAD : len(kept)] = moved
            flat_values[HEAD : len(kept)] = flat_values[HEAD + gone : len(self.tokens)].clone()
        self.tokens = kept

    def answer(self, prompt: Sequence[int], count: int, window: int = WINDOW, drop: int = DROP) -> list[int]:
        """Greedy, cut whenever the window is full."""
        answer = [self.read(prompt)]
        while len(answer) < count:
            if len(self.tokens) + 1 >= window:
                self.cut(drop)
            answer.append(self.read(answer[-1:]))
        return answer


@pytest.mark.parametrize("name", [*ROTARY, "gpt2"])
def test_an_answer_goes_on_over_cuts_as_it_does_by_hand(
    models: dict[str, Model], frequencies: dict[str, np.ndarray[Any, Any]], name: str
) -> None:
    model, prompt = models[name], prompt_of(1, 45)
    engine = engine_of(model)
    engine.add(request("one", prompt, greedy(150), truncation=CUTS, salt=SALT))
    results = run(engine)
    expected = ByHand(model, frequencies.get(name), WINDOW).answer(prompt, 150)
    assert tokens_of(results)["one"] == expected
    outputs = outputs_of(results)["one"]
    dropped = [output.dropped_tokens for output in outputs if output.dropped_tokens is not None]
    assert dropped == [DROP * number for number in range(1, 6)]
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    stats = engine.stats()
    assert stats.context_cuts == 5
    assert (stats.rerotated_blocks > 0) == (name != "gpt2")
    assert conserves(engine._cache.pool) and stats.kv_blocks_used == 0


def test_a_cut_that_forgets_to_move_the_keys_would_be_seen(models: dict[str, Model]) -> None:
    """The reference above is not equal to what it must not be: keys left as they are, or computed anew."""
    model, prompt = models["llama3"], prompt_of(1, 45)
    still = ByHand(model, np.zeros(model.config.head_dim // 2), WINDOW).answer(prompt, 150)
    anew = ByHand(model, None, WINDOW).answer(prompt, 150)
    assert answer(engine_of(model), prompt, greedy(150), truncation=CUTS) not in (still, anew)


def test_without_consent_the_window_ends_the_answer(models: dict[str, Model]) -> None:
    engine = engine_of(models["llama3"])
    assert len(answer(engine, prompt_of(1, 45), greedy(150))) == WINDOW - 45
    with pytest.raises(ContextLengthExceeded):
        engine.add(request("long", prompt_of(1, WINDOW), greedy(1)))
    assert engine.stats().context_cuts == 0


def next_turn(
    name: str, whole: Sequence[int], max_tokens: int, *, window: int = WINDOW
) -> tuple[SequenceRequest, tuple[int, ...]]:
    """The request that a gateway makes of a conversation."""
    rule = TruncationRule(window=window, block_size=BLOCK)
    plan = plan_truncation(rule, len(whole), reserved_tokens=max_tokens)
    chain, supplies = HashChain(SALT), tuple[Supply, ...]()
    if plan.cuts:
        prefix = truncated_prefix(whole, BLOCK, chain, head=plan.head, cuts=plan.cuts, window=window)
        chain, supplies = prefix.chain, prefix.supplies
    truncation = Truncation(head_tokens=plan.head, cuts=plan.cuts, supplies=supplies)
    return (
        request(
            name, plan.keep(whole), greedy(max_tokens), truncation=truncation, salt=SALT, joints=chain.joints
        ),
        plan.cuts,
    )


def test_the_next_turn_finds_the_text_as_it_was_cut(models: dict[str, Model]) -> None:
    for model in (models["llama3"], models["gpt2"]):
        engine = engine_of(model)
        first, cuts = next_turn("first", prompt_of(2, 40), 60)
        assert cuts == ()
        engine.add(first)
        said = tokens_of(run(engine))["first"]
        whole = [*first.prompt_token_ids, *said]
        second, cuts = next_turn("second", [*whole, *prompt_of(3, 5)], 4)
        assert len(cuts) == 2  # both were made while the answer was written
        engine.add(second)
        found = outputs_of(run(engine))["second"][0]
        computed = len(second.prompt_token_ids) - 5 - 1  # the last token of an answer is not computed
        assert found.cached_tokens == computed // BLOCK * BLOCK


def test_a_prompt_that_is_cut_takes_its_keys_from_before_the_cut(
    models: dict[str, Model], frequencies: dict[str, np.ndarray[Any, Any]]
) -> None:
    model = models["llama3"]
    engine = engine_of(model)
    first, cuts = next_turn("first", prompt_of(4, 55), 3)
    assert cuts == ()
    engine.add(first)
    said = tokens_of(run(engine))["first"]
    before = [*first.prompt_token_ids, *said]
    second, cuts = next_turn("second", [*before, *prompt_of(5, 10)], 8)
    assert cuts == (HEAD + DROP,)
    engine.add(second)
    outputs = outputs_of(run(engine))["second"]
    whole_blocks = (len(before) - 1) // BLOCK * BLOCK
    assert outputs[0].cached_tokens == whole_blocks - DROP
    assert engine.stats().rerotated_blocks == (whole_blocks - DROP - HEAD) // BLOCK

    hand = ByHand(model, frequencies["llama3"], WINDOW)
    hand.read(before[:whole_blocks])
    hand.cut(DROP)
    expected = hand.answer(second.prompt_token_ids[whole_blocks - DROP :], 8)
    assert [output.token_id for output in outputs] == expected

    repeated, _ = next_turn("again", first.prompt_token_ids, 3)
    engine.add(repeated)  # its blocks are where they were, and what they were
    again = run(engine)
    assert tokens_of(again)["again"] == said
    assert outputs_of(again)["again"][0].cached_tokens == 54 // BLOCK * BLOCK


def stored_blocks(engine: Engine, names: Sequence[bytes], damaged: bytes = b"") -> list[StoredBlock]:
    """What a lower tier would have saved of these blocks."""
    found = []
    for name in names:
        payload = engine.export_block(name)
        assert payload is not None
        checksum = payload_checksum(payload) ^ (name == damaged)
        found.append(StoredBlock(name, payload, checksum))
    return found


@pytest.mark.parametrize("resident", [0, 1, 2])
@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_prompt_that_is_cut_takes_its_keys_from_a_lower_tier(
    models: dict[str, Model], resident: int, is_damaged: bool
) -> None:
    """Head and supply are stored, some of them resident too: what comes back is what never left."""
    model = models["llama3"]
    engine = engine_of(model)
    first, _ = next_turn("first", prompt_of(4, 55), 3)
    engine.add(first)
    before = [*first.prompt_token_ids, *tokens_of(run(engine))["first"]]
    second, _ = next_turn("second", [*before, *prompt_of(5, 10)], 8)
    assert second.truncation is not None
    supply = second.truncation.supplies[0].hashes[
        : ((len(before) - 1) // BLOCK * BLOCK - DROP - HEAD) // BLOCK
    ]
    names = [*second.chain.extend((), second.prompt_token_ids[:HEAD], BLOCK), *supply]
    assert len(names) == 3
    damaged = names[-1] if is_damaged else b""
    stored = stored_blocks(engine, names, damaged)
    engine.add(second)
    expected = outputs_of(run(engine))["second"]

    fresh = engine_of(model)
    for block in stored[:resident]:
        assert fresh.import_block(block.block_hash, block.payload)
    fresh.add(second, awaited_tokens=len(names) * BLOCK)
    assert not fresh.step().outputs
    assert fresh.preload("second", stored)
    outputs = outputs_of(run(fresh))["second"]
    found = len(names) - is_damaged
    assert outputs[0].cached_tokens == found * BLOCK
    stats = fresh.stats()
    assert stats.preload_blocks == found - resident and stats.rerotated_blocks == found - HEAD // BLOCK
    if not is_damaged:
        assert [one.token_id for one in outputs] == [one.token_id for one in expected]
    assert conserves(fresh._cache.pool) and stats.kv_blocks_used == 0


def test_a_supply_that_stands_in_its_own_way_is_given_up(models: dict[str, Model]) -> None:
    """The pool holds one window: sources and targets do not fit beside each other."""
    engine = engine_of(models["llama3"], num_blocks=WINDOW // BLOCK)
    first, _ = next_turn("first", prompt_of(4, 55), 3)
    engine.add(first)
    said = tokens_of(run(engine))["first"]
    second, cuts = next_turn("second", [*first.prompt_token_ids, *said, *prompt_of(5, 20)], 1)
    assert cuts
    engine.add(second)
    assert len(tokens_of(run(engine))["second"]) == 1
    assert conserves(engine._cache.pool) and engine.stats().kv_blocks_used == 0


def test_keys_that_were_turned_too_often_are_computed_again(models: dict[str, Model]) -> None:
    model, window, drop = models["llama3"], 128, 64
    prompt = prompt_of(6, 100)
    for made, is_turned in (((16,), True), ((16, 24, 32, 40, 48), False)):
        engine = engine_of(model, window=window)
        truncation = Truncation(head_tokens=HEAD, cuts=made)
        tokens = answer(engine, prompt, greedy(60), truncation=truncation)
        stats = engine.stats()
        assert stats.context_cuts == 1 and (stats.rerotated_blocks > 0) == is_turned
        anew = ByHand(model, None, window).answer(prompt, 60, window, drop)
        assert (tokens == anew) is not is_turned


def test_a_supply_ends_where_keys_were_turned_often_enough() -> None:
    names = [bytes([number]) * 16 for number in range(8)]
    supplies = (Supply(tuple(names), BLOCK),)
    rule = TruncationRule(window=128, block_size=BLOCK)
    for count in range(1, 8):
        cuts = tuple(HEAD + BLOCK * number for number in range(1, count + 1))
        found = supplied_blocks(supplies, rule, cuts, num_own=1, most=8, count_leading=len)
        # All blocks were there at all cuts but the last, which is still to come.
        assert len(found.hashes) == (8 if count - 1 < MAX_ROTATIONS else 0)
    one = supplied_blocks(supplies, rule, (16,), num_own=0, most=8, count_leading=len)
    assert one.hashes == []  # the head must be there
    one = supplied_blocks(supplies, rule, (16,), num_own=4, most=2, count_leading=len)
    assert one.hashes == names[3:5]
    older = Supply(tuple(reversed(names)), 2 * BLOCK)
    there = {*names[:3], *names[4:]}
    both = supplied_blocks(
        (*supplies, older),
        rule,
        (16, 24),
        num_own=1,
        most=8,
        count_leading=lambda some: sum(1 for _ in takewhile(there.__contains__, some)),
    )
    assert both == (list(older.hashes[:4]), 2 * BLOCK)  # the one that reaches farther


def test_a_prompt_longer_than_the_engine_holds_is_cut_as_at_the_gateway(models: dict[str, Model]) -> None:
    prompt = prompt_of(7, 150)
    rule = TruncationRule(window=WINDOW, block_size=BLOCK)
    kept = plan_truncation(rule, len(prompt), reserved_tokens=6).keep(prompt)
    for model in (models["llama3"], models["gpt2"]):
        engine = engine_of(model)
        engine.add(request("long", prompt, greedy(6), truncation=CUTS))
        outputs = outputs_of(run(engine))["long"]
        assert [output.token_id for output in outputs] == answer(engine_of(model), kept, greedy(6))
        assert outputs[0].dropped_tokens == len(prompt) - len(kept)


def test_what_cannot_be_cut_is_refused(models: dict[str, Model]) -> None:
    engine = engine_of(models["llama3"])
    with pytest.raises(ContextLengthExceeded, match="pin fewer"):
        engine.add(request("one", prompt_of(1, 60), greedy(9), truncation=Truncation(head_tokens=56)))
    with pytest.raises(InvalidRequest, match="whole blocks"):
        wrong = Truncation(head_tokens=HEAD, cuts=(HEAD + 5,))
        engine.add(request("one", prompt_of(1, 60), greedy(9), truncation=wrong))
    assert not engine.has_work


@pytest.mark.parametrize("name", ["llama3", "gpt2"])
@hypothesis_settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_chance_changes_no_token(models: dict[str, Model], name: str, seed: int) -> None:
    """Sequences of one prompt and of others, paused, swapped, evicted, cut, and taken to other engines."""
    chance = random.Random(seed)
    model = models[name]
    wanted: dict[str, SequenceRequest] = {}
    for number in range(4):
        prompt = prompt_of(chance.choice([seed, seed + number]), chance.randint(10, WINDOW + 20))
        sampling = SamplingParams(
            max_tokens=chance.randint(20, 120),
            temperature=chance.choice([0.0, 1.0]),
            seed=number,
            frequency_penalty=chance.choice([0.0, 0.5]),
        )
        borders = tuple(sorted(chance.sample(range(200), chance.randint(0, 6))))
        cuts = Truncation(head_tokens=chance.choice([0, HEAD, 2 * HEAD]), borders=borders)
        wanted[f"s{number}"] = request(f"s{number}", prompt, sampling, truncation=cuts, salt=SALT)
    expected = {}
    for key, one in wanted.items():
        roomy = engine_of(model)
        roomy.add(one)
        expected[key] = tokens_of(run(roomy))[key]

    made: dict[str, list[int]] = {key: [] for key in wanted}
    open_ones = dict(wanted)
    for _ in range(20):
        engine = engine_of(model, num_blocks=chance.randint(8, 24), host_blocks=chance.choice([0, 12]))
        if chance.random() < 0.7:
            engine._roster = ChanceRoster(engine, chance)  # type: ignore[assignment]
        for key, one in open_ones.items():
            engine.add(
                request(
                    key,
                    one.prompt_token_ids,
                    one.sampling,
                    truncation=one.truncation,
                    salt=SALT,
                    delivered_token_ids=tuple(made[key]),
                )
            )
        steps = chance.randint(20, 400)
        while engine.has_work and steps:
            steps -= 1
            for output in engine.step().outputs:
                assert output.error is None
                if output.token_id is not None:
                    assert output.index == len(made[output.sequence_id])
                    made[output.sequence_id].append(output.token_id)
                if output.finish_reason is not None:
                    del open_ones[output.sequence_id]
            assert conserves(engine._cache.pool)
        for key in open_ones:
            engine.cancel(key)
        engine._cache.wait_for_draining()
        assert engine.stats().kv_blocks_used == 0
        engine.close()
        if not open_ones:
            break
    for key, tokens in made.items():
        assert tokens == expected[key][: len(tokens)]


def test_a_sequence_whose_kv_was_lost_is_led_through_its_history(models: dict[str, Model]) -> None:
    model = models["llama3"]
    expected = answer(engine_of(model), prompt_of(8, 30), greedy(200), truncation=CUTS)
    for delivered in (1, 33, 34, 35, 100, 199, 200):
        engine = engine_of(model)
        engine.add(
            request(
                "moved",
                prompt_of(8, 30),
                greedy(200),
                truncation=CUTS,
                delivered_token_ids=tuple(expected[:delivered]),
            )
        )
        outputs = outputs_of(run(engine))["moved"]
        assert [o.token_id for o in outputs if o.token_id is not None] == expected[delivered:]
        cuts = 1 + (30 + 199 - WINDOW) // DROP
        told = [o.dropped_tokens for o in outputs if o.dropped_tokens is not None]
        assert told[-1:] == [cuts * DROP]


def test_tenants_share_public_blocks_and_no_other(models: dict[str, Model]) -> None:
    public, private = prompt_of(9, 3 * BLOCK), prompt_of(10, 20)
    engine = engine_of(models["llama3"])

    def ask(name: str, tenant: bytes, num_public: int) -> tuple[list[int], int | None]:
        prompt = [*public, *private]
        chain = hash_chain(prompt, BLOCK, salt=tenant, public_root=b"all", num_public_blocks=num_public)
        engine.add(request(name, prompt, greedy(5), salt=tenant, joints=chain.joints))
        outputs = outputs_of(run(engine))[name]
        return [o.token_id for o in outputs if o.token_id is not None], outputs[0].cached_tokens

    tokens, found = ask("a", b"a", 3)
    assert found == 0
    hits = engine.stats().prefix_hit_tokens
    assert ask("b", b"b", 3) == (tokens, 3 * BLOCK)
    assert engine.stats().prefix_hit_tokens - hits == 3 * BLOCK
    assert ask("b2", b"b", 3) == (tokens, 43 // BLOCK * BLOCK)
    assert ask("c", b"c", 0) == (tokens, 0)  # nothing was declared
    assert ask("d", b"d", 0) == (tokens, 0)
    assert ask("d2", b"d", 0) == (tokens, 43 // BLOCK * BLOCK)
