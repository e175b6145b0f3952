"""Lengths are the best there are, and speculation that loses ends: over made-up machines and drafters."""

from __future__ import annotations

import itertools
import operator
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trireme.policies.speculation import (
    Choice,
    Mark,
    SpeculationController,
    SpeculationSettings,
    StepTimes,
    best_lengths,
)

chances = st.lists(st.floats(0.0, 1.0), max_size=4)


def along(proposals: Sequence[Sequence[float]]) -> list[list[float]]:
    """From the chance of each token, where those before it are right, to that of all up to it."""
    return [list(itertools.accumulate(chances, operator.mul)) for chances in proposals]


def tokens_per_s(
    proposals: Sequence[Sequence[float]],
    lengths: Sequence[int],
    batch: int,
    times: tuple[float, float, float],
) -> float:
    """By the definition, term by term."""
    plain_s, fixed_s, row_s = times
    tokens = float(batch)
    for proposal, length in zip(proposals, lengths, strict=True):
        for end in range(1, length + 1):
            together = 1.0
            for chance in proposal[:end]:
                together *= chance
            tokens += together
    count = sum(lengths)
    return tokens / (plain_s + (fixed_s if count else 0.0) + row_s * count)


@given(
    st.lists(chances, min_size=1, max_size=3),
    st.integers(0, 2),
    st.floats(0.01, 10.0),
    st.floats(0.0, 5.0),
    st.floats(0.0, 5.0),
    st.integers(0, 12),
)
def test_no_other_lengths_are_better(
    proposals: list[list[float]], others: int, plain_s: float, fixed_s: float, row_s: float, room: int
) -> None:
    batch = len(proposals) + others
    times = plain_s, fixed_s, row_s
    choice = best_lengths(
        along(proposals),
        batch=batch,
        plain_s=plain_s,
        fixed_s=fixed_s,
        row_s=row_s,
        room=room,
        least_gain=1.0,
    )
    assert sum(choice.lengths) <= room
    assert all(0 <= n <= len(p) for n, p in zip(choice.lengths, proposals, strict=True))
    got = tokens_per_s(proposals, choice.lengths, batch, times)
    every = itertools.product(*(range(len(proposal) + 1) for proposal in proposals))
    best = max(tokens_per_s(proposals, lengths, batch, times) for lengths in every if sum(lengths) <= room)
    assert got == pytest.approx(best, rel=1e-9)
    assert choice.gain == pytest.approx(got / (batch / plain_s), rel=1e-9)


@given(st.lists(chances, min_size=1, max_size=8), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_what_is_chosen_is_never_expected_to_lose(
    proposals: list[list[float]], fixed_s: float, row_s: float
) -> None:
    choice = best_lengths(
        along(proposals), batch=len(proposals), plain_s=1.0, fixed_s=fixed_s, row_s=row_s, room=64
    )
    assert choice.gain >= 1.0
    if any(choice.lengths):
        assert tokens_per_s(proposals, choice.lengths, len(proposals), (1.0, fixed_s, row_s)) > len(proposals)


def test_a_wrong_token_is_not_worth_a_dear_row() -> None:
    two = along([[0.9, 0.9, 0.9], [0.1, 0.9, 0.9]])
    cheap = best_lengths(two, batch=2, plain_s=1.0, fixed_s=0.0, row_s=0.1, room=64)
    assert cheap.lengths == (3, 0)
    dear = best_lengths(two, batch=2, plain_s=1.0, fixed_s=0.0, row_s=0.6, room=64)
    assert dear == Choice((0, 0), 1.0)
    assert best_lengths(two, batch=2, plain_s=1.0, fixed_s=0.0, row_s=0.1, room=2).lengths == (2, 0)


def test_times_are_fitted_to_what_was_measured() -> None:
    times = StepTimes()
    assert times.plain_s(4) is None and times.wants_plain(4)
    for _ in range(3):
        times.observe(batch=4, drafted=0, seconds=0.010)
    assert times.plain_s(4) == 0.010 and not times.wants_plain(4)
    for drafted in (1, 2, 4, 8, 12):
        times.observe(batch=4, drafted=drafted, seconds=0.010 + 0.001 + 0.0005 * drafted)
    assert times.added_s(4) == pytest.approx((0.001, 0.0005), rel=1e-6)
    times.observe(batch=4, drafted=2, seconds=300.0)  # somebody else had the machine
    assert sum(times.added_s(4)) < 0.05


def test_chances_are_what_was_seen() -> None:
    controller = SpeculationController()
    sure, unsure = Mark("model", 9, True), Mark("model", 1, True)
    for number in range(400):
        controller.observe_draft([sure, unsure], 2 if number % 10 == 0 else 1)
    assert controller.chance(sure) > 0.95
    assert controller.chance(unsure) == pytest.approx(0.1, abs=0.05)
    controller.observe_draft([unsure, sure], 0)  # what stands behind a wrong token shows nothing
    assert controller.chance(sure) > 0.95
    assert controller.source_chance("model", False) == controller.chance(Mark("model", 3, False))


def test_a_token_is_read_only_where_there_is_something_to_gain() -> None:
    controller = SpeculationController()
    for _ in range(3):
        controller.times.observe(batch=1, drafted=0, seconds=0.004)
        controller.observe_draft_step(1, 0.001)
    assert controller.pays_to_read(200, left_tokens=100, batch=1, is_greedy=True)
    assert not controller.pays_to_read(2000, left_tokens=4, batch=1, is_greedy=True)


def test_a_draft_model_that_did_not_pay_is_tried_again() -> None:
    controller = SpeculationController()
    for _ in range(3):
        controller.times.observe(batch=1, drafted=0, seconds=0.001)
        controller.observe_draft_step(1, 0.004)  # slower than the target, as on a busy machine

    def is_read() -> bool:
        return controller.pays_to_read(200, left_tokens=100, batch=1, is_greedy=True)

    refusals = 0
    while not is_read():
        assert not controller.pays_to_read(200, left_tokens=20, batch=1, is_greedy=True)
        controller.pays_to_draft([0.5], batch=1)  # as each step asks
        refusals += 1
        assert refusals < 10_000
    assert refusals > 1000, "that would cost more than it may show"
    for _ in range(5):
        controller.observe_draft_step(1, 0.0001)
    assert is_read(), "it pays now"
    for _ in range(5):
        controller.observe_draft_step(1, 0.004)
    assert not is_read()


Machine = Callable[[int, int], float]


def play(
    controller: SpeculationController,
    *,
    batch: int,
    steps: int,
    right: Callable[[int], float],
    machine: Machine,
    draft_s: float,
    chance: random.Random,
) -> float:
    """Virtual seconds per token of a batch over those of plain steps; drafts are right by `right(step)`.

    Args:
        machine: seconds of a step of so many sequences with so many drafted tokens.
        draft_s: of a step of the draft model.
    """
    total_s, tokens = 0.0, 0
    mark = Mark("model", 5, True)
    for step in range(steps):
        drafting_s, depth = 0.0, 0
        lengths: tuple[int, ...] = (0,) * batch
        if controller.is_on(batch):
            together = 1.0
            while depth < controller.settings.most:
                wanted = [together * controller.source_chance("model", True)] * batch
                if not controller.pays_to_draft(wanted, batch=batch):
                    break
                controller.observe_draft_step(batch, draft_s)
                drafting_s += draft_s
                depth += 1
                together *= controller.chance(mark)
            if depth:
                proposals = along([[controller.chance(mark)] * depth] * batch)
                lengths = controller.choose(proposals, batch=batch, room=512)
        given_tokens = batch
        for length in lengths:
            num_right = 0
            while num_right < length and chance.random() < right(step):
                num_right += 1
            given_tokens += num_right
            if length:
                controller.observe_draft([mark] * length, num_right)
        seconds = machine(batch, sum(lengths)) * chance.uniform(0.95, 1.05) + drafting_s
        controller.observe_step(
            batch=batch,
            drafted=sum(lengths),
            tokens=given_tokens,
            seconds=seconds,
            drafting_s=drafting_s,
        )
        total_s += seconds
        tokens += given_tokens
    return (total_s / tokens) / (machine(batch, 0) / batch)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.sampled_from([1, 2, 8]),
    rightness=st.floats(0.0, 1.0),
    row=st.floats(0.0, 2.0),
    jump=st.floats(0.0, 2.0),
    draft=st.floats(0.0, 2.0),
    seed=st.integers(0, 1000),
)
def test_over_any_machine_and_drafter_nothing_is_lost_for_long(
    batch: int, rightness: float, row: float, jump: float, draft: float, seed: int
) -> None:
    """Times in plain steps; one may jump where anything is drafted, or grow with a curve."""

    def machine(sequences: int, drafted: int) -> float:
        return 1.0 + 0.1 * sequences + (jump + row * drafted + 0.01 * drafted**1.5 if drafted else 0.0)

    slowdown = play(
        SpeculationController(),
        batch=batch,
        steps=3000,
        right=lambda step: rightness,
        machine=machine,
        draft_s=draft,
        chance=random.Random(seed),
    )
    assert slowdown < 1.06


def test_good_drafts_pay_and_come_back_after_a_bad_time() -> None:
    def machine(sequences: int, drafted: int) -> float:
        return 1.0 + 0.05 * drafted

    controller = SpeculationController()
    chance = random.Random(1)

    def part(rightness: float, steps: int) -> float:
        return play(
            controller,
            batch=1,
            steps=steps,
            right=lambda step: rightness,
            machine=machine,
            draft_s=0.05,
            chance=chance,
        )

    assert part(0.9, 500) < 0.4
    assert part(0.0, 2000) < 1.08
    part(0.9, 3000)
    assert part(0.9, 500) < 0.5


def test_a_fixed_length_is_fixed() -> None:
    controller = SpeculationController(SpeculationSettings(fixed_tokens=3))
    assert controller.is_on(7)
    assert controller.choose([[0.0] * 5, [0.0] * 2, [0.0] * 5], batch=7, room=6) == (3, 2, 1)
