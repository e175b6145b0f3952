"""A response's body says the same as the body of the chat that it becomes."""

from __future__ import annotations

import json
from typing import Any

from trireme.gateway.openai_api.bodies import ChatBody, parse
from trireme.gateway.openai_api.responses_asking import Asked, ResponseBody, ask, messages_of, response_id_of
from trireme.gateway.submission import Caller

CALLER = Caller(request_id="req-1", tenant="t")


def asked(**body: Any) -> Asked:
    given = parse(ResponseBody, json.dumps({"model": "m", "input": "hi", **body}).encode())
    before = [{"role": "user", "content": "earlier"}, {"role": "assistant", "content": "yes"}]
    return ask(given, CALLER, response_id="resp_1", created_at=1, seed=5, before=before, session_id="s")


def test_a_conversation_goes_on_under_new_instructions() -> None:
    found = asked(instructions="be brief", max_output_tokens=9, temperature=0.5)
    assert [message["content"] for message in found.chat["messages"]] == ["be brief", "earlier", "yes", "hi"]
    assert [message["content"] for message in found.messages] == ["earlier", "yes", "hi"]
    body = found.chat_body()
    assert (body.max_completion_tokens, body.temperature, body.seed) == (9, 0.5, 5)
    assert asked(seed=7).chat_body().seed == 7
    assert found.caller_again().session_id == "s"
    assert Asked.from_json(json.loads(json.dumps(found.as_json()))) == found


def test_calls_of_tools_and_their_answers_become_a_chats() -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
    messages = messages_of(
        [
            {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
            call,
            {**call, "call_id": "c2"},
            {"type": "function_call_output", "call_id": "c1", "output": "1"},
        ]
    )
    assert [message["role"] for message in messages] == ["user", "assistant", "tool"]
    assert [found["id"] for found in messages[1]["tool_calls"]] == ["c1", "c2"]
    assert (messages[2]["tool_call_id"], messages[2]["content"]) == ("c1", "1")
    parse(ChatBody, json.dumps({"model": "m", "messages": messages}).encode())


def test_tools_and_formats_have_a_chats_shape() -> None:
    tool = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}
    form = {"type": "json_schema", "name": "n", "schema": {"type": "object"}}
    found = asked(tools=[tool], tool_choice={"type": "function", "name": "f"}, parallel_tool_calls=False)
    body = found.chat_body()
    assert body.tools is not None and body.tools[0].function.name == "f" and body.parallel_tool_calls is False
    assert asked(text={"format": form}).chat["response_format"]["json_schema"]["name"] == "n"


def test_a_retried_call_finds_its_response_and_no_other_tenants() -> None:
    assert response_id_of("t", "a") == response_id_of("t", "a")
    assert len({response_id_of("t", "a"), response_id_of("u", "a"), response_id_of("t", "b")}) == 3
