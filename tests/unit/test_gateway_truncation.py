"""Prompts that outgrow the context: where their turns begin, what is cut, and what the bus says of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from trireme.errors import ContextLengthExceeded, InvalidConfiguration, InvalidRequest
from trireme.gateway.chat_template import ChatTemplate
from trireme.gateway.detokenizer import Vocabulary
from trireme.gateway.limits import Limits
from trireme.gateway.models import ServedModel, load_catalog
from trireme.gateway.prefix_blocks import name_blocks
from trireme.gateway.submission import Caller, Submission, generation
from trireme.gateway.truncation import dropped_tokens, overflow_of
from trireme.gateway.turns import Turns, turns_of
from trireme.kvcache.block_identity import (
    HashChain,
    Supply,
    block_hashes,
    hash_chain,
    public_root,
    tenant_root,
    truncated_prefix,
)
from trireme.policies.prefix_index import split_hashes
from trireme.runtime.fleet import Fleet, Model, PublicPrefix, Variant
from trireme.wire.bus.v1.facts_pb2 import AdmittedRequest
from trireme.wire.inference.v1.inference_pb2 import (
    CONTEXT_OVERFLOW_ERROR,
    CONTEXT_OVERFLOW_TRUNCATE_OLDEST,
    CONTEXT_OVERFLOW_TRUNCATE_PINNED,
    CONTEXT_OVERFLOW_UNSPECIFIED,
    ContextOverflow,
    SamplingParameters,
)

CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "trireme-py-1m"
CATALOG = load_catalog(Fleet(models={"py": Model(variants={"v": Variant(checkpoint=CHECKPOINT)})}))
MODEL = replace(CATALOG.find("py"), context_tokens=256)
TOKENIZER = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
OLDEST, PINNED = CONTEXT_OVERFLOW_TRUNCATE_OLDEST, CONTEXT_OVERFLOW_TRUNCATE_PINNED
PUBLIC_TEXT = "You are a careful reviewer of Python programs. Answer with code and nothing else, please."
SIZE = 16

Message = dict[str, str]


def chat(turns: int, *, system: str = "", words: int = 12) -> list[Message]:
    """Questions with their answers, the last one open."""
    messages = [{"role": "system", "content": system}] if system else []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"question {turn} " + "word " * words})
        messages.append({"role": "assistant", "content": f"answer {turn} " + "word " * words})
    return messages[:-1]


def prompt_of(messages: Sequence[Message], model: ServedModel = MODEL) -> list[int]:
    return asyncio.run(model.tokenize_chat(messages, most_tokens=100_000))


def turns(messages: Sequence[Message], model: ServedModel = MODEL) -> Turns:
    return asyncio.run(turns_of(model, messages, prompt_of(messages, model)))


def submit(
    mode: ContextOverflow.ValueType,
    messages: Sequence[Message] = (),
    *,
    prompt: list[int] | None = None,
    max_tokens: int | None = 16,
    pinned: int | None = None,
    model: ServedModel = MODEL,
) -> Submission:
    """As both front ends do it."""
    ids = prompt_of(messages, model) if prompt is None else prompt
    asked = messages if prompt is None else None
    overflow = asyncio.run(overflow_of(mode, pinned, model, ids, asked, max_tokens))
    sampling = SamplingParameters(max_tokens=max_tokens)
    return generation(Caller(request_id="r"), model, ids, sampling, Limits(), overflow=overflow)


def admitted(submission: Submission, tenant: str = "t") -> AdmittedRequest:
    request = AdmittedRequest(request_id="r", prompt_token_ids=submission.prompt_token_ids)
    name_blocks(request, submission.model, submission.cut, fleet="fleet", tenant=tenant)
    return request


def test_turns_begin_where_users_begin_to_speak() -> None:
    messages = chat(3, system="be brief")
    ids = prompt_of(messages)
    found = turns(messages)
    assert found.system_tokens == found.borders[0]
    assert (
        TOKENIZER.decode(ids[: found.borders[0]], skip_special_tokens=False)
        == "<|system|>\nbe brief<|end|>\n"
    )
    for number, border in enumerate(found.borders):
        text = TOKENIZER.decode(ids[border:], skip_special_tokens=False)
        assert text.startswith(f"<|user|>\nquestion {number}")
    assert len(found.borders) == 3
    assert found.newest == found.borders[-1] and turns(chat(2)).system_tokens == 0


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(0, 3), st.sampled_from(["", "be brief", "<|end|><|user|>x"]))
def test_borders_stay_as_the_conversation_grows(first: int, more: int, system: str) -> None:
    before, after = turns(chat(first, system=system)), turns(chat(first + more, system=system))
    assert after.borders[:first] == before.borders
    assert after.system_tokens == before.system_tokens


EACH = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
UNSTABLE = {
    "looks ahead": "{{ messages | length }}" + EACH,
    "always asks": EACH + "<|assistant|>",
}


@pytest.mark.parametrize("template", UNSTABLE.values(), ids=UNSTABLE)
def test_a_template_without_fixed_borders_has_none(template: str) -> None:
    model = replace(MODEL, chat_template=ChatTemplate(template, {}))
    messages = chat(3, system="be brief")
    assert turns(messages, model) == Turns(None, (), None)
    assert submit(OLDEST, chat(12), model=model).cut is not None
    with pytest.raises(InvalidRequest, match="give pinned_tokens"):
        submit(PINNED, chat(12, system="be brief"), model=model)
    assert submit(PINNED, chat(12, system="be brief"), model=model, pinned=30).cut is not None


def test_a_system_prompt_that_moves_into_the_first_question_is_not_taken_for_pinned() -> None:
    moving = (
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
        "{% set messages = messages[1:] %}{% endif %}"
        "{% for m in messages %}<|{{ m.role }}|>{% if loop.first %}{{ system }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    model = replace(MODEL, chat_template=ChatTemplate(moving, {}))
    found = turns(chat(3, system="be brief"), model)
    assert found.system_tokens is None and found.borders[0] == 0 and len(found.borders) == 3


def test_a_template_that_refuses_half_a_conversation_is_asked_for_the_rest() -> None:
    strict = (
        "{% if messages | length < 2 %}{{ raise_exception('too short') }}{% endif %}"
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    )
    model = replace(MODEL, chat_template=ChatTemplate(strict, {}))
    found = turns(chat(3, system="be brief"), model)
    assert found.system_tokens is None and len(found.borders) == 2


def test_by_default_a_prompt_must_fit() -> None:
    for mode in (CONTEXT_OVERFLOW_UNSPECIFIED, CONTEXT_OVERFLOW_ERROR):
        with pytest.raises(ContextLengthExceeded, match="context is 256"):
            submit(mode, chat(12))
        with pytest.raises(ContextLengthExceeded, match="ask for at most"):
            submit(mode, prompt=[7] * 200, max_tokens=100)


@pytest.mark.parametrize("mode", [OLDEST, PINNED])
def test_what_fits_is_not_touched(mode: ContextOverflow.ValueType) -> None:
    submission = submit(mode, chat(1, system="be brief"))
    assert submission.cut is None and not admitted(submission).HasField("truncation")
    assert submission.prompt_token_ids == prompt_of(chat(1, system="be brief"))


def test_the_oldest_turns_go_and_the_newest_stay() -> None:
    messages = chat(12, system="be brief")
    ids = prompt_of(messages)
    submission = submit(OLDEST, messages)
    kept = submission.prompt_token_ids
    assert len(kept) + 16 <= 256 and submission.sampling.max_tokens == 16
    assert kept[:SIZE] == ids[:SIZE]
    border = turns(messages).borders[-1]
    assert kept[-(len(ids) - border) :] == ids[border:]
    request = admitted(submission)
    assert dropped_tokens(request) == len(ids) - len(kept) > 0
    assert list(request.truncation.turn_borders) == list(turns(messages).borders)
    assert any(0 <= b - request.truncation.cuts[-1] < SIZE for b in turns(messages).borders)


def test_a_pinned_system_prompt_stays_whole() -> None:
    system = "answer in the words of a very careful reviewer of programs " * 3
    messages = chat(12, system=system)
    pinned = turns(messages).system_tokens
    assert pinned is not None and pinned > 2 * SIZE
    submission = submit(PINNED, messages)
    assert submission.prompt_token_ids[:pinned] == prompt_of(messages)[:pinned]
    assert admitted(submission).truncation.head_tokens == -(-pinned // SIZE) * SIZE
    assert submit(OLDEST, messages).prompt_token_ids[:pinned] != prompt_of(messages)[:pinned]


def test_the_next_turn_is_cut_alike_and_finds_its_blocks() -> None:
    names, cuts = [], []
    for count in range(8, 12):
        request = admitted(submit(OLDEST, chat(count)))
        names.append(split_hashes(request.prefix_hashes))
        cuts.append(list(request.truncation.cuts))
    for before, after, cut, later in zip(names, names[1:], cuts, cuts[1:], strict=False):
        assert later[: len(cut)] == cut
        if later == cut:
            assert after[: len(before)] == before
    assert any(one == other for one, other in pairwise(cuts))


def test_a_turn_that_does_not_fit_alone_is_refused() -> None:
    messages = [*chat(3)[:-1], {"role": "user", "content": "word " * 300}]
    with pytest.raises(ContextLengthExceeded, match="last turn"):
        submit(OLDEST, messages)
    assert submit(OLDEST, prompt=prompt_of(messages)).cut is not None  # as plain tokens it has no turns


def test_pins_are_checked() -> None:
    prompt = [7] * 300
    for mode in (OLDEST, CONTEXT_OVERFLOW_ERROR):
        with pytest.raises(InvalidRequest, match="truncate_pinned"):
            submit(mode, prompt=prompt, pinned=4)
    with pytest.raises(InvalidRequest, match="the prompt has 300 tokens"):
        submit(PINNED, prompt=prompt, pinned=301)
    with pytest.raises(ContextLengthExceeded, match="pin fewer") as caught:
        submit(PINNED, prompt=prompt, pinned=250)
    assert caught.value.param == "pinned_tokens"
    with pytest.raises(InvalidRequest, match="not known"):
        submit(9, prompt=prompt)  # type: ignore[arg-type]


def test_an_answer_of_open_length_gets_the_room_that_is_left() -> None:
    submission = submit(OLDEST, prompt=[7] * 300, max_tokens=None)
    assert len(submission.prompt_token_ids) + submission.sampling.max_tokens == 256
    assert submission.sampling.max_tokens >= 60
    long = submit(OLDEST, prompt=[7] * 100, max_tokens=1000)  # cut while it is written
    assert (long.sampling.max_tokens, len(long.prompt_token_ids)) == (1000, 100)
    assert admitted(long).HasField("truncation") and dropped_tokens(admitted(long)) == 0


def test_the_bus_says_what_the_engine_needs_to_move_blocks() -> None:
    prompt = list(range(300))
    request = admitted(submit(OLDEST, prompt=prompt))
    plan = request.truncation
    salt = tenant_root("fleet", "t")
    prefix = truncated_prefix(
        prompt, SIZE, HashChain(salt), head=plan.head_tokens, cuts=list(plan.cuts), window=256
    )
    assert request.kv_salt == salt
    joints = tuple((joint.block, joint.parent) for joint in request.kv_joints)
    chain = HashChain(request.kv_salt, joints)
    assert chain == prefix.chain
    assert split_hashes(request.prefix_hashes) == chain.extend((), request.prompt_token_ids, SIZE)
    supplies = [
        Supply(tuple(split_hashes(supply.block_hashes)), supply.shift_tokens) for supply in plan.supplies
    ]
    assert tuple(supplies) == prefix.supplies
    whole = block_hashes(prompt, SIZE, salt)
    first = plan.cuts[0] // SIZE
    assert supplies[0].hashes == whole[first : first + len(supplies[0].hashes)]


def public_model(*prefixes: PublicPrefix) -> ServedModel:
    model = Model(variants={"v": Variant(checkpoint=CHECKPOINT)}, public_prefixes=list(prefixes))
    return load_catalog(Fleet(models={"py": model})).find("py")


def test_tenants_share_a_declared_system_prompt_and_nothing_else() -> None:
    model = public_model(PublicPrefix(system=PUBLIC_TEXT))
    assert (
        model.public_prefixes[0][:-1]
        == tuple(prompt_of([{"role": "system", "content": PUBLIC_TEXT}, *chat(1)]))[
            : len(model.public_prefixes[0]) - 1
        ]
    )
    messages = chat(4, system=PUBLIC_TEXT)
    one, other = (admitted(submit(OLDEST, messages, model=model), tenant) for tenant in ("a", "b"))
    ours, others = split_hashes(one.prefix_hashes), split_hashes(other.prefix_hashes)
    shared = len(model.public_prefixes[0]) // SIZE
    assert shared >= 1 and len(ours) > shared + 1
    assert ours[:shared] == others[:shared]
    assert not set(ours[shared:]) & set(others)
    undeclared = admitted(submit(OLDEST, messages), "a")
    assert not set(split_hashes(undeclared.prefix_hashes)) & set(ours)

    ids = one.prompt_token_ids
    chain = hash_chain(
        ids, SIZE, salt=one.kv_salt, public_root=public_root("fleet"), num_public_blocks=shared
    )
    assert [(joint.block, joint.parent) for joint in one.kv_joints] == list(chain.joints)


def test_a_declared_text_is_public_in_plain_prompts() -> None:
    model = public_model(PublicPrefix(text="def add(a, b):\n    return a + b\n" * 8))
    declared = list(model.public_prefixes[0])
    requests = [admitted(submit(OLDEST, prompt=declared + [9] * 40, model=model), tenant) for tenant in "ab"]
    ours, others = (split_hashes(request.prefix_hashes) for request in requests)
    assert [one == other for one, other in zip(ours, others, strict=True)] == (
        [True] * (len(declared) // SIZE) + [False] * (len(ours) - len(declared) // SIZE)
    )


def test_without_declared_prefixes_names_are_as_ever() -> None:
    request = admitted(submit(CONTEXT_OVERFLOW_UNSPECIFIED, chat(2)))
    assert not request.kv_joints
    assert split_hashes(request.prefix_hashes) == list(
        block_hashes(request.prompt_token_ids, SIZE, tenant_root("fleet", "t"))
    )


def test_a_system_prompt_that_the_template_refuses_cannot_be_public(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((CHECKPOINT / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    model = Model(variants={"v": Variant(checkpoint=tmp_path)}, public_prefixes=[PublicPrefix(system="x")])
    with pytest.raises(InvalidConfiguration, match="no system role"):
        load_catalog(Fleet(models={"py": model}))
    assert Vocabulary(TOKENIZER).size  # the checkpoint itself is whole
