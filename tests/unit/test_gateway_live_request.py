"""A live request takes each token index once and in order, whatever the workers' streams do."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from trireme.errors import InvalidRequest, RequestFailed
from trireme.gateway.live_request import Applied, Choice, LiveRequest
from trireme.wire.bus.v1.facts_pb2 import AdmittedRequest
from trireme.wire.inference.v1.inference_pb2 import (
    FINISH_REASON_ERROR,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    SamplingParameters,
    TokenIds,
    Usage,
)
from trireme.wire.worker.v1.worker_pb2 import Admitted, Finished, SequenceUpdate

TRUTH = [[7, 3, 3, 9, 1, 4, 8, 2], [5, 5, 6, 0, 1]]


class Letters:
    """Token i shows as the i-th letter."""

    def push(self, token_id: int) -> str:
        return chr(ord("a") + token_id)

    def finish(self) -> str:
        return ""


def live(*, choices: int = 2, stops: tuple[str, ...] = (), attempt: int = 1) -> LiveRequest:
    admitted = AdmittedRequest(request_id="r", attempt=attempt, sampling=SamplingParameters(n=choices))
    return LiveRequest(admitted, [Choice(Letters(), stops=stops) for _ in range(choices)], now_s=0.0)


def update(choice: int, first: int, last: int, *, attempt: int = 1, ends: bool = False) -> SequenceUpdate:
    made = SequenceUpdate(
        request_id="r",
        attempt=attempt,
        choice=choice,
        first_index=first,
        token_ids=TRUTH[choice][first:last],
        admitted=Admitted(variant="v"),
    )
    if ends:
        made.finished.reason = FINISH_REASON_STOP
    return made


@st.composite
def noisy_streams(draw: st.DrawFn) -> list[SequenceUpdate]:
    """Slices of the truth, doubled, overlapping, reordered, from old attempts, with holes."""
    updates = []
    for _ in range(draw(st.integers(0, 30))):
        choice = draw(st.integers(0, 1))
        first = draw(st.integers(0, len(TRUTH[choice])))
        last = draw(st.integers(first, len(TRUTH[choice])))
        attempt = draw(st.sampled_from([1, 2, 2, 2, 3]))
        ends = last == len(TRUTH[choice]) and draw(st.booleans())
        updates.append(update(choice, first, last, attempt=attempt, ends=ends))
    return updates


@settings(max_examples=500, deadline=None)
@given(noisy_streams())
def test_what_is_taken_is_always_a_prefix_of_the_truth(updates: list[SequenceUpdate]) -> None:
    request = live(attempt=2)
    for number, one in enumerate(updates):
        before, attempt = request.received(), request.attempt
        outcome = request.apply(one, "w", float(number))
        assert request.attempt == max(attempt, one.attempt)
        for choice, truth in zip(request.choices, TRUTH, strict=True):
            assert list(choice.token_ids) == truth[: len(choice.token_ids)]
            assert "".join(choice.texts) == "".join(chr(ord("a") + t) for t in choice.token_ids)
        if one.attempt < attempt or one.first_index > before[one.choice]:
            assert request.received() == before
            ended = request.choices[one.choice].ended
            assert outcome is (Applied.STALE if one.attempt < attempt else Applied.GAP) or ended
    for choice in range(2):  # A replay completes it.
        request.apply(update(choice, 0, 99, attempt=request.attempt, ends=True), "w", 99.0)
    assert [list(choice.token_ids) for choice in request.choices] == TRUTH
    assert request.ended


def test_an_update_after_a_gap_is_dropped_and_reported() -> None:
    request = live()
    assert request.apply(update(0, 0, 2), "w", 0.0) is Applied.TAKEN
    assert request.apply(update(0, 3, 5, ends=True), "w", 0.0) is Applied.GAP
    assert request.received() == [2, 0]
    assert not request.choices[0].ended
    assert request.apply(update(0, 0, 8), "w", 0.0) is Applied.TAKEN
    assert request.received() == [8, 0]


def test_a_newer_attempt_is_adopted_and_the_older_one_dropped() -> None:
    request = live()
    request.apply(update(0, 0, 2), "w1", 0.0)
    request.apply(update(0, 1, 4, attempt=2), "w2", 0.0)
    assert (request.attempt, request.worker_id, request.received()) == (2, "w2", [4, 0])
    assert request.apply(update(0, 4, 8, attempt=1), "w1", 0.0) is Applied.STALE
    assert request.received() == [4, 0]


def test_a_stop_string_ends_the_choice_at_its_token() -> None:
    request = live(choices=1, stops=("dj",))  # tokens 3, 9
    assert request.apply(update(0, 0, 8), "w", 5.0) is Applied.STOP_CHOICE
    choice = request.choices[0]
    assert "".join(choice.texts) + choice.tail == "hd"
    assert list(choice.token_ids) == [7, 3, 3, 9]
    assert (choice.reason, choice.stop_string) == (FINISH_REASON_STOP, "dj")
    assert request.ended and not request.accounted
    usage = SequenceUpdate(request_id="r", attempt=1, first_index=8, usage=Usage(joules=1))
    request.apply(usage, "w", 6.0)
    assert request.accounted


def test_each_token_has_its_text_whatever_the_batches() -> None:
    whole, single = live(choices=1, stops=("dd!",)), live(choices=1, stops=("dd!",))
    whole.apply(update(0, 0, 8, ends=True), "w", 0.0)
    for index in range(8):
        single.apply(update(0, index, index + 1, ends=index == 7), "w", 0.0)
    assert whole.choices[0].texts == single.choices[0].texts == ["h", "", "", "ddj", "b", "e", "i", "c"]


def test_text_held_back_at_the_end_is_shown() -> None:
    request = live(choices=1, stops=("c!",))  # The last token is a c.
    request.apply(update(0, 0, 8, ends=True), "w", 0.0)
    choice = request.choices[0]
    assert choice.texts[-1] == "" and choice.tail == "c"


def test_stop_tokens_give_no_text_once_they_count() -> None:
    choice = Choice(Letters(), stop_token_ids=frozenset({3}), min_tokens=2)
    choice.extend([7, 3, 3])
    assert choice.texts == ["h", "d", ""]


def test_a_request_is_queued_again_with_what_was_delivered() -> None:
    request = live()
    request.apply(update(0, 0, 3), "w1", 0.0)
    request.apply(update(1, 0, 1), "w1", 0.0)
    again = request.again(gateway_id="g2", avoid_worker_id="w1")
    assert [list(tokens.ids) for tokens in again.delivered] == [[7, 3, 3], [5]]
    assert (again.gateway_id, list(again.avoid_worker_ids), again.attempt) == ("g2", ["w1"], 1)


def test_what_another_gateway_delivered_is_preloaded() -> None:
    request = live()
    request.preload([TokenIds(ids=[7, 3]), TokenIds(ids=[5])], 0.0)
    assert request.apply(update(0, 2, 5), "w", 0.0) is Applied.TAKEN
    assert list(request.choices[0].token_ids) == TRUTH[0][:5]


def test_pauses_are_timed_until_the_next_token() -> None:
    request = live()
    request.pause("lost", 10.0)
    request.apply(SequenceUpdate(request_id="r", attempt=2, admitted=Admitted(variant="v")), "w", 11.0)
    request.apply(update(0, 0, 1, attempt=2), "w", 12.5)
    request.apply(update(0, 1, 2, attempt=2), "w", 20.0)
    assert request.paused_s == 2.5


def test_an_engines_error_keeps_its_kind() -> None:
    for code, kind in (("invalid_request", InvalidRequest), ("anything", RequestFailed)):
        request = live(choices=1)
        finished = Finished(reason=FINISH_REASON_ERROR, error_code=code, error_message="no")
        request.apply(SequenceUpdate(request_id="r", attempt=1, finished=finished), "w", 0.0)
        assert type(request.error) is kind and request.ended


def test_an_update_for_a_choice_that_is_not_there_is_dropped() -> None:
    request = live(choices=1)
    foreign = SequenceUpdate(request_id="r", attempt=1, choice=7, token_ids=[1])
    assert request.apply(foreign, "w", 0.0) is Applied.STALE
    length = SequenceUpdate(request_id="r", attempt=1, finished=Finished(reason=FINISH_REASON_LENGTH))
    request.apply(length, "w", 0.0)
    assert request.ended
