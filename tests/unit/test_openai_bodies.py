"""Bodies of the OpenAI API: what other clients send passes, and what is wrong costs little to refuse."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest

from trireme.errors import InvalidRequest
from trireme.gateway.openai_api.bodies import ChatBody, CompletionBody, parse
from trireme.gateway.openai_api.sampling import chat_sampling, completion_sampling, context_overflow
from trireme.wire.inference.v1.inference_pb2 import (
    CONTEXT_OVERFLOW_ERROR,
    CONTEXT_OVERFLOW_TRUNCATE_OLDEST,
    CONTEXT_OVERFLOW_TRUNCATE_PINNED,
    CONTEXT_OVERFLOW_UNSPECIFIED,
)

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def chat(**changes: Any) -> ChatBody:
    return parse(ChatBody, json.dumps({**CHAT, **changes}).encode())


def test_an_answer_of_ours_may_be_sent_back_as_the_sdk_does_it() -> None:
    answer = {"role": "assistant", "content": "hello", "refusal": None}
    nothing = dict.fromkeys(["audio", "function_call", "tool_calls"])
    fuller: dict[str, Any] = {**answer, "annotations": [], **nothing}
    body = chat(messages=[*CHAT["messages"], answer, fuller])
    assert body.messages[1].for_template() == {"role": "assistant", "content": "hello"}
    with pytest.raises(InvalidRequest) as refused:
        chat(messages=[{**answer, "refusal": "no"}])
    assert refused.value.param == "messages[0].refusal"


def test_only_an_assistant_may_have_said_nothing() -> None:
    silent = {"role": "assistant", "content": None}
    assert chat(messages=[silent]).messages[0].for_template()["content"] == ""
    with pytest.raises(InvalidRequest) as refused:
        chat_sampling(chat(messages=[silent, {"role": "user", "content": None}]))
    assert refused.value.param == "messages[1].content"


def test_null_and_the_only_possible_value_ask_for_nothing() -> None:
    body = chat(
        stream=True,
        stream_options={"include_usage": None},
        modalities=["text"],
        **dict.fromkeys(["stop", "n", "seed", "tools", "logit_bias", "response_format", "max_tokens"]),
    )
    assert not body.includes_usage
    assert list(chat_sampling(body).stop) == [] and chat_sampling(body).n == 1


@pytest.mark.parametrize(("field", "body_class"), [("logprobs", CompletionBody), ("top_logprobs", ChatBody)])
def test_a_number_that_no_message_can_hold_is_refused(field: str, body_class: Any) -> None:
    body = {"model": "m", "prompt": "x"} if body_class is CompletionBody else {**CHAT, "logprobs": True}
    with pytest.raises(InvalidRequest) as refused:
        parse(body_class, json.dumps({**body, field: 10**20}).encode())
    assert refused.value.param == field


def test_two_spellings_of_one_token_are_not_merged_silently() -> None:
    body = parse(CompletionBody, b'{"model":"m","prompt":"x","logit_bias":{"5":1,"05":2}}')
    with pytest.raises(InvalidRequest, match="same token"):
        completion_sampling(body)


@pytest.mark.parametrize(
    ("rest", "param"),
    [
        (b'"prompt":[' + b"null," * 10**5 + b"1]", "prompt"),
        (b'"prompt":[' + b'["a"],' * 10**5 + b"[1]]", "prompt"),
        (b'"prompt":"x","stop":[' + b"1," * 10**5 + b"1]", "stop"),
        (b'"prompt":"x","stop_token_ids":[' + b"-1," * 10**5 + b"1]", "stop_token_ids[0]"),
        (b'"messages":[' + b"{}," * 10**5 + b"{}]", "messages[0].role"),
        (b'"prompt":"x",' + b",".join(b'"k%d":1' % i for i in range(5 * 10**4)), None),
        (
            b'"prompt":"x","logit_bias":{' + b",".join(b'"k%d":null' % i for i in range(5 * 10**4)) + b"}",
            "logit_bias",
        ),
        (b'"prompt":"x","' + b"k" * 10**6 + b'":1', "k" * 80),
    ],
)
def test_refusing_a_body_costs_memory_in_proportion_to_it(rest: bytes, param: str | None) -> None:
    raw = b'{"model":"m",' + rest + b"}"
    body_class: Any = ChatBody if b"messages" in rest else CompletionBody
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest) as refused:
            parse(body_class, raw)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert refused.value.param == param
    assert len(refused.value.message) < 500
    assert peak_bytes < 100 * len(raw)


@pytest.mark.parametrize(
    ("fields", "mode"),
    [
        ({}, CONTEXT_OVERFLOW_UNSPECIFIED),
        ({"truncation": "auto"}, CONTEXT_OVERFLOW_TRUNCATE_PINNED),
        ({"truncation": "disabled"}, CONTEXT_OVERFLOW_ERROR),
        ({"truncation": "auto", "context_overflow": "truncate_pinned"}, CONTEXT_OVERFLOW_TRUNCATE_PINNED),
        ({"truncation": None, "context_overflow": "truncate_oldest"}, CONTEXT_OVERFLOW_TRUNCATE_OLDEST),
    ],
)
def test_truncation_is_another_name_of_context_overflow(fields: dict[str, Any], mode: int) -> None:
    assert context_overflow(chat(**fields)) == mode


def test_two_names_may_not_say_different_things() -> None:
    with pytest.raises(InvalidRequest) as refused:
        context_overflow(chat(truncation="disabled", context_overflow="truncate_oldest"))
    assert refused.value.param == "truncation"
    with pytest.raises(InvalidRequest, match="context_overflow"):
        chat(context_overflow="middle-out")
