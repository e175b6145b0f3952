"""A response's events follow from its output and its end alone, however they are cut into pieces."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from trireme.gateway.openai_api.responses_shapes import End, Entry, EventLog, response_object

CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
ENTRIES = st.lists(
    st.builds(
        Entry,
        st.sampled_from(["", "a", "é", "two words", "\n"]),
        st.sampled_from([(), [{"token": "a", "logprob": -1.0}]]),
    ),
    max_size=12,
)
ENDS = st.builds(
    End,
    status=st.sampled_from(["completed", "incomplete", "failed", "cancelled"]),
    tool_calls=st.sampled_from([(), (CALL,)]),
)


def shown(*, background: bool = False) -> dict[str, Any]:
    return {"id": "resp_1", "object": "response", "background": background, "status": "queued", "output": []}


def events_of(entries: list[Entry], end: End, cuts: list[int]) -> list[dict[str, Any]]:
    log = EventLog(shown(background=True))
    events = log.opening()
    for start, stop in pairwise([0, *sorted(min(cut, len(entries)) for cut in cuts), len(entries)]):
        events += log.add(entries[start:stop])
    return events + log.finish(end)


@given(ENTRIES, ENDS, st.lists(st.integers(0, 12), max_size=4))
def test_how_the_output_came_in_does_not_show(entries: list[Entry], end: End, cuts: list[int]) -> None:
    whole, pieces = events_of(entries, end, []), events_of(entries, end, cuts)
    assert pieces == whole
    assert [event["sequence_number"] for event in whole] == list(range(len(whole)))


@given(ENTRIES, ENDS)
def test_the_events_and_the_object_say_the_same(entries: list[Entry], end: End) -> None:
    events = events_of(entries, end, [])
    last = events[-1]["response"]
    texts = [entry.text for entry in entries]
    rows = [row for entry in entries for row in entry.logprobs]
    assert last == response_object(shown(background=True), texts, rows, end)
    assert "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta") == "".join(texts)
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    if end.status in ("completed", "incomplete"):
        assert done == last["output"]
    else:
        assert events[-1]["type"] == "response.failed" and last["status"] == end.status and not done


@given(ENTRIES)
def test_what_is_stored_comes_back(entries: list[Entry]) -> None:
    back = [Entry.decoded(entry.encoded()) for entry in entries]
    assert [(e.text, list(e.logprobs)) for e in back] == [(e.text, list(e.logprobs)) for e in entries]
