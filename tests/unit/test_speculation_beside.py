"""A draft model on a thread of its own: the tokens are those of plain decoding, whatever it has ready."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.unit.engine_support import (
    greedy,
    outputs_of,
    prompt_of,
    request,
    run,
    settings,
    tokens_of,
)
from tests.unit.speculation_support import speculating
from trireme.engine import Engine, SamplingParams
from trireme.engine.speculation.draft_beside import BesideDrafter
from trireme.models.model import Model

pytestmark = pytest.mark.usefixtures("one_thread")


def beside(model: Model, draft: Model, **changes: Any) -> tuple[Engine, BesideDrafter]:
    engine = speculating(
        model, draft=draft, speculation={"beside": True}, **{"max_batch_tokens": 60, **changes}
    )
    assert engine._speculator is not None
    (drafter,) = engine._speculator._drafters
    assert isinstance(drafter, BesideDrafter)
    return engine, drafter


@pytest.fixture
def closing() -> Iterator[list[Engine]]:
    engines: list[Engine] = []
    yield engines
    for engine in engines:
        engine.close()


def sampling(name: str, seed: int) -> SamplingParams:
    if name == "greedy":
        return greedy(30)
    return SamplingParams(max_tokens=30, temperature=0.8, top_k=20, seed=seed, ignore_eos=True)


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("kind", ["greedy", "drawn"])
@pytest.mark.parametrize("is_good", [True, False])
def test_the_tokens_are_those_of_plain_decoding(
    model: Model, smaller: Model, closing: list[Engine], kind: str, waits: bool, is_good: bool
) -> None:
    engine, drafter = beside(model, model if is_good else smaller)
    closing.append(engine)
    wanted = [request(f"{n}", prompt_of(n, 11 + 45 * n), sampling(kind, n)) for n in range(4)]
    plain = tokens_of(run(_with(Engine(model, settings(max_batch_tokens=60)), wanted)))
    results = []
    _with(engine, wanted)
    while engine.has_work:
        results.append(engine.step())
        if waits:
            drafter.settle()
    assert tokens_of(results) == plain
    if waits:
        # Of wrong guesses only what stands behind a right one is ever verified.
        assert engine.stats().accepted_tokens > (60 if is_good and kind == "greedy" else -1)


def test_after_a_wrong_guess_it_goes_on_from_the_truth(model: Model, closing: list[Engine]) -> None:
    """With itself as the draft model, what it has ready is the greedy continuation of what was drawn."""
    engine, drafter = beside(model, model)
    closing.append(engine)
    engine.add(request("one", prompt_of(3, 20), SamplingParams(max_tokens=25, temperature=0.5, seed=5)))
    known, checked = prompt_of(3, 20), 0
    while engine.has_work:
        known = known + [o.token_id for o in engine.step().outputs if o.token_id is not None]
        drafter.settle()
        guess = drafter._guesses.get("one")
        if guess is None or not engine.has_work:
            continue
        true = Engine(model, settings())
        true.add(request("true", known[: guess.length], greedy(len(guess.tokens))))
        assert list(guess.tokens) == tokens_of(run(true))["true"]
        checked += 1
    stats = engine.stats()
    assert checked > 3 and stats.drafted_tokens > stats.accepted_tokens > 0


def test_who_ends_gives_the_draft_models_blocks_back(model: Model, closing: list[Engine]) -> None:
    engine, drafter = beside(model, model)
    closing.append(engine)
    _with(engine, [request(f"{n}", prompt_of(n, 20), greedy(60)) for n in range(3)])
    for _ in range(4):
        engine.step()
        drafter.settle()
    assert drafter.readers.pool.num_held > 0
    for n in range(3):
        engine.cancel(f"{n}")
    drafter.settle()
    assert drafter.readers.pool.num_held == 0


def test_a_draft_model_that_fails_is_asked_no_more(
    model: Model, closing: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, drafter = beside(model, model)
    closing.append(engine)

    def fail(*_: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(drafter.readers, "follow", fail)
    wanted = [request("one", prompt_of(1, 9), greedy(20))]
    _with(engine, wanted)
    results = []
    while engine.has_work:
        results.append(engine.step())
        drafter.settle()
    assert outputs_of(results) == outputs_of(run(_with(Engine(model, settings()), wanted)))
    assert engine._speculator is not None and engine._speculator._drafters == ()


def test_a_closed_engine_leaves_no_thread(model: Model) -> None:
    engine, drafter = beside(model, model)
    _with(engine, [request("one", prompt_of(1, 9), greedy(20))])
    engine.step()
    engine.close()
    assert not drafter._thread.is_alive()


def _with(engine: Engine, wanted: list[Any]) -> Engine:
    for one in wanted:
        engine.add(one)
    return engine
