"""What passes between a worker and its engine process arrives as it was sent, whole and once."""

from __future__ import annotations

import subprocess
import sys
from array import array
from typing import get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trireme.engine import Engine, EngineSettings, StepResult
from trireme.errors import InvalidRequest, TriremeError
from trireme.models.null import NullModel
from trireme.wire.bus.v1.facts_pb2 import AdmittedRequest, RequestKind
from trireme.wire.inference.v1.inference_pb2 import SamplingParameters, TokenIds
from trireme.worker.frames import FrameCutter, FrameKind, frame
from trireme.worker.served_engine import ResidencyLog, ServedEngine
from trireme.worker.step_news import Ending, EngineFigures, Output, StepNews, Turn, Work, pack, unpack

VOCABULARY = 50
whole = st.integers(0, 2**62)
real = st.floats(allow_nan=False)
outputs = st.builds(
    Output,
    handle=whole,
    place=whole,
    token_id=st.none() | whole,
    logprob=st.none() | real,
    top_logprobs=st.lists(st.tuples(whole, real), max_size=3).map(tuple),
    finish_reason=st.none() | st.sampled_from(["stop", "length", "error"]),
    error_code=st.text(max_size=8),
    error_message=st.text(max_size=8),
    cached_tokens=st.none() | whole,
    dropped_tokens=st.none() | whole,
    prompt_logprobs=st.none()
    | st.lists(st.tuples(real, st.lists(st.tuples(whole, real), max_size=2).map(tuple)), max_size=3).map(
        tuple
    ),
)
figures = get_type_hints(EngineFigures).values()
steps = st.builds(
    StepNews,
    variant=st.text(min_size=1, max_size=20),
    figures=st.tuples(*[real if kind is float else whole for kind in figures]).map(EngineFigures._make),
    seconds=real,
    prefill_tokens=whole,
    prefill_s=real,
    tokens=st.lists(st.tuples(whole, whole, whole), max_size=70).map(
        lambda rows: array("q", [number for row in rows for number in row])
    ),
    token_s=real,
    outputs=st.lists(outputs, max_size=4).map(tuple),
    work=st.lists(st.builds(Work, whole, real), max_size=4).map(tuple),
    endings=st.lists(
        st.builds(Ending, whole, st.lists(real, max_size=3).map(tuple), st.just(()), whole), max_size=2
    ).map(tuple),
    turns=st.lists(st.builds(Turn, whole, st.text(max_size=8), st.text(max_size=20)), max_size=2).map(tuple),
    came=st.lists(st.binary(min_size=16, max_size=16), max_size=5).map(b"".join),
    left=st.lists(st.binary(min_size=16, max_size=16), max_size=5).map(b"".join),
)


@given(steps)
def test_news_arrives_as_it_was_packed(news: StepNews) -> None:
    assert unpack(pack(news)) == news


@given(st.lists(st.tuples(st.sampled_from(FrameKind), st.binary(max_size=300)), max_size=12), st.data())
def test_frames_are_whole_however_the_stream_is_cut(
    sent: list[tuple[FrameKind, bytes]], data: st.DataObject
) -> None:
    stream = b"".join(frame(kind, payload) for kind, payload in sent)
    cutter, found = FrameCutter(), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        found += cutter.feed(stream[:size])
        stream = stream[size:]
    assert found == sent


def test_the_worker_process_does_without_the_numeric_library() -> None:
    code = "import sys, trireme.worker.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Recorder(Engine):
    """Remembers its steps."""

    def __init__(self, residency: ResidencyLog) -> None:
        settings = EngineSettings(num_blocks=64, block_size=4, max_num_seqs=4, max_batch_tokens=8)
        super().__init__(NullModel(vocab_size=VOCABULARY), settings, residency, eos_token_ids=frozenset())
        self.results: list[StepResult] = []

    def step(self) -> StepResult:
        self.results.append(super().step())
        return self.results[-1]


@pytest.fixture
def served() -> ServedEngine:
    residency = ResidencyLog()
    return ServedEngine("v", Recorder(residency), residency)


def admitted(
    name: str, prompt: list[int], *, kind: int = RequestKind.REQUEST_KIND_GENERATE, **sampling: object
) -> AdmittedRequest:
    return AdmittedRequest(
        request_id=name,
        kind=kind,  # type: ignore[arg-type]
        prompt_token_ids=prompt,
        sampling=SamplingParameters(temperature=0.0, **sampling),  # type: ignore[arg-type]
        continuations=[TokenIds(ids=[1, 2]), TokenIds(ids=[3])],
        attempt=1,
    )


def run_out(served: ServedEngine) -> list[StepNews]:
    news = []
    while (step := served.turn()) is not None:
        news.append(unpack(pack(step)))
    return news


def test_the_news_of_all_steps_are_the_answers_and_every_second(served: ServedEngine) -> None:
    served.add(admitted("a", [1, 2, 3], max_tokens=9), [(0, 70)])
    served.add(admitted("b", list(range(20)), max_tokens=5, n=2), [(0, 71), (1, 72)])
    served.add(admitted("c", [9], max_tokens=3, logprobs=1), [(0, 73)])
    served.add(admitted("s", [4, 5], kind=RequestKind.REQUEST_KIND_SCORE), [(0, 74)])
    news = run_out(served)
    answers: dict[int, list[int]] = {70: [], 71: [], 72: [], 73: []}
    logprobs, ends, scores = 0, {}, {}
    for step in news:
        for handle, place, token_id in step.rows():
            assert place == len(answers[handle])
            answers[handle].append(token_id)
        for output in step.outputs:
            if output.token_id is not None:
                assert output.place == len(answers[output.handle])
                answers[output.handle].append(output.token_id)
            logprobs += output.logprob is not None
            if output.finish_reason is not None:
                ends[output.handle] = output.finish_reason
        scores.update({ending.handle: len(ending.scores) for ending in step.endings})
    counts = {70: (3, 9), 71: (19, 5), 72: (19, 5), 73: (9, 3)}
    assert answers == {
        handle: [(last + 1 + n) % VOCABULARY for n in range(count)]
        for handle, (last, count) in counts.items()
    }
    assert logprobs == 3 and scores == {74: 2}
    assert ends == dict.fromkeys(answers, "length")
    told_s = [len(step.tokens) // 3 * step.token_s + sum(work.seconds for work in step.work) for step in news]
    engine = served.engine
    assert isinstance(engine, Recorder)
    assert told_s[:-1] == pytest.approx([result.seconds for result in engine.results])
    assert any(step.tokens for step in news), "most tokens travel as plain rows"
    assert news[-1].seconds == 0 and news[-1].figures.running == 0
    assert news[-1].figures.output_tokens == 9 + 5 + 5 + 3
    assert not served._handles and not served._names


def test_a_refused_request_leaves_nothing_behind(served: ServedEngine) -> None:
    with pytest.raises(InvalidRequest):
        served.add(admitted("a", [1], max_tokens=3, top_p=7.0), [(0, 1)])
    with pytest.raises(TriremeError):
        served.add(admitted("b", [VOCABULARY + 1], max_tokens=3), [(0, 2), (1, 3)])
    assert served.turn() is None
    assert not served._handles and not served._names


def test_a_cancel_is_told_of_without_a_step(served: ServedEngine) -> None:
    served.add(admitted("a", [1, 2], max_tokens=30), [(0, 1)])
    assert served.turn().figures.running == 1  # type: ignore[union-attr]
    served.cancel([1, 5])
    news = served.turn()
    assert news is not None and news.seconds == 0 and news.figures.running == 0
    assert served.turn() is None
    served.cancel([1])


def test_blocks_are_told_of_as_they_are_now() -> None:
    log = ResidencyLog()
    one, two, three = (bytes([n]) * 16 for n in range(3))
    log.on_cached(one)
    log.on_cached(two)
    log.on_evicted(two, bytes)
    log.on_evicted(three, bytes)
    log.on_cached(three)
    assert log.take() == (one + three, two)
    assert log.take() == (b"", b"")
