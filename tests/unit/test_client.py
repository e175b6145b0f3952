"""The clients' pure parts: an answer followed over broken streams, statuses back to typed errors."""

from __future__ import annotations

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trireme import errors
from trireme.client import Accepted, ChoiceFinished, Delta, FinishReason, Sampling, Summary
from trireme.client.channels import Addresses
from trireme.client.requests import generate_request
from trireme.client.resumption import ResumableAnswer
from trireme.client.status_errors import error_from, is_resumable
from trireme.errors import InvalidConfiguration, InvalidRequest, Overloaded, RequestFailed, TriremeError
from trireme.runtime.status import GRPC_CODE
from trireme.wire.inference.v1 import inference_pb2 as pb

LENGTHS = (5, 3)


def ask(**options: object) -> pb.GenerateRequest:
    values = {
        "request_id": "r",
        "model": "m",
        "prompt": "p",
        "sampling": Sampling(n=2),
        "session_id": "",
        "slo": "",
        "priority": 0,
    }
    return generate_request(**{**values, **options})  # type: ignore[arg-type]


def server(request: pb.GenerateRequest, *, attached: bool, sizes: list[int]) -> list[pb.GenerateResponse]:
    """What a gateway streams for a request, with deltas of these sizes."""
    start = [*request.resume_from, 0, 0][:2]
    responses = [pb.GenerateResponse(request_id="r", accepted=pb.Accepted(seed=9, attached=attached))]
    for choice, length in enumerate(LENGTHS):
        index = start[choice]
        for size in [*sizes, length]:
            end = min(length, index + size)
            if end > index:
                ids = list(range(index, end))
                delta = pb.Delta(choice=choice, first_index=index, token_ids=ids, text="".join(map(str, ids)))
                responses.append(pb.GenerateResponse(delta=delta))
            index = end
        finished = pb.ChoiceFinished(choice=choice, reason=pb.FINISH_REASON_STOP)
        responses.append(pb.GenerateResponse(choice_finished=finished))
    return [*responses, pb.GenerateResponse(summary=pb.Summary())]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.lists(st.integers(1, 3), max_size=4)), max_size=5))
def test_an_answer_over_broken_streams_is_whole_and_shown_once(
    breaks: list[tuple[int, list[int]]],
) -> None:
    answer = ResumableAnswer(ask())
    events = []
    for number, (cut, sizes) in enumerate([*breaks, (100, [1])]):
        responses = server(answer.next_call(), attached=number > 0, sizes=sizes)
        for response in responses[:cut]:
            event = answer.take(response)
            if event is not None:
                events.append(event)
        if answer.done:
            break
    for choice, length in enumerate(LENGTHS):
        deltas = [e for e in events if isinstance(e, Delta) and e.choice == choice]
        assert [t for delta in deltas for t in delta.token_ids] == list(range(length))
        assert "".join(delta.text for delta in deltas) == "".join(map(str, range(length)))
    assert [type(event) for event in events].count(Accepted) == 1
    assert [e for e in events if isinstance(e, ChoiceFinished)] == [
        ChoiceFinished(0, FinishReason.STOP, ""),
        ChoiceFinished(1, FinishReason.STOP, ""),
    ]
    assert isinstance(events[-1], Summary) and answer.done


def test_a_resumed_call_names_its_seed_and_what_it_has() -> None:
    answer = ResumableAnswer(ask())
    for response in server(ask(), attached=False, sizes=[2])[:2]:
        answer.take(response)
    again = answer.next_call()
    assert (again.request_id, again.sampling.seed, list(again.resume_from)) == ("r", 9, [2, 0])


def test_missing_tokens_are_an_error_not_a_hole() -> None:
    answer = ResumableAnswer(ask())
    with pytest.raises(RequestFailed, match="tokens 0 to 3 are missing"):
        answer.take(pb.GenerateResponse(delta=pb.Delta(first_index=4, token_ids=[1])))


def test_an_accepted_answer_outlasts_a_full_gateway() -> None:
    answer = ResumableAnswer(ask())
    assert not answer.outlasts(Overloaded("full"))
    answer.take(pb.GenerateResponse(accepted=pb.Accepted()))
    assert answer.outlasts(Overloaded("full")) and not answer.outlasts(InvalidRequest("no"))


@pytest.mark.parametrize(
    "kind",
    [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, TriremeError) and value is not TriremeError
    ],
)
def test_every_error_comes_back_as_itself(kind: type[TriremeError]) -> None:
    metadata = {"trireme-error-code": kind.code, "trireme-error-param": "n", "retry-after-ms": "1500"}
    error = error_from(GRPC_CODE[kind.kind], "why", metadata)
    assert type(error) is kind
    assert (error.message, error.param, error.retry_after_s) == ("why", "n", 1.5)
    assert is_resumable(GRPC_CODE[kind.kind], metadata) == (kind is errors.ServiceUnavailable)


def test_broken_connections_are_resumable_and_bugs_are_not() -> None:
    assert is_resumable(grpc.StatusCode.UNAVAILABLE, {})
    assert is_resumable(grpc.StatusCode.CANCELLED, {})
    assert not is_resumable(grpc.StatusCode.UNKNOWN, {})
    assert not is_resumable(grpc.StatusCode.INVALID_ARGUMENT, {})
    assert type(error_from(grpc.StatusCode.UNKNOWN, "", {})) is RequestFailed


def test_prompts_of_each_kind() -> None:
    assert ask(prompt="text").text == "text"
    assert list(ask(prompt=[1, 2]).token_ids.ids) == [1, 2]
    chat = ask(prompt=[{"role": "user", "content": "hi"}]).chat
    assert (chat.messages[0].role, chat.messages[0].content) == ("user", "hi")
    for prompt in ([1, {"role": "user", "content": "x"}], [{"role": "user"}], [-1], [2**40]):
        with pytest.raises(InvalidRequest):
            ask(prompt=prompt)
    with pytest.raises(InvalidRequest, match="slo"):
        ask(slo="soon")


def test_addresses_are_asked_in_turn_and_pauses_grow_with_each_round() -> None:
    addresses = Addresses(["a", "b"])
    first = addresses.current
    assert addresses.advance(first) == 0.0
    assert {first, addresses.current} == {"a", "b"}
    pauses = [addresses.advance(addresses.current) for _ in range(40)]
    assert all(0 < pause <= 1.0 for pause in pauses) and pauses[-1] > pauses[0]
    addresses.answered(addresses.current)
    assert addresses.advance(addresses.current) == 0.0
    for wrong in ([], "a:1"):
        with pytest.raises(InvalidConfiguration):
            Addresses(wrong)


def test_calls_that_lose_a_gateway_together_move_on_together() -> None:
    addresses = Addresses(["a", "b", "c"])
    lost = addresses.current
    assert [addresses.advance(lost) for _ in range(100)] == [0.0] * 100
    second = addresses.current
    assert second != lost
    addresses.answered(lost)  # A last word from before.
    addresses.advance(second)
    assert len({lost, second, addresses.current}) == 3


def test_a_request_says_what_happens_when_the_context_overflows() -> None:
    request = ask(context_overflow="truncate_pinned", pinned_tokens=0)
    assert request.context_overflow == pb.CONTEXT_OVERFLOW_TRUNCATE_PINNED
    assert request.HasField("pinned_tokens") and request.pinned_tokens == 0
    assert ask().context_overflow == pb.CONTEXT_OVERFLOW_UNSPECIFIED and not ask().HasField("pinned_tokens")
    with pytest.raises(InvalidRequest, match="truncate_oldest"):
        ask(context_overflow="middle")
