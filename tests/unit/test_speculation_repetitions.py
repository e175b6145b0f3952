"""Drafts from repetitions are what followed the longest run at the end, where it stood last."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from trireme.engine.speculation.proposals import NOTHING, Want
from trireme.engine.speculation.repetitions import RepetitionDrafter, SuffixIndex
from trireme.policies.speculation import Mark

ORDERS = (8, 5, 3, 2)


def by_looking(history: Sequence[int]) -> tuple[int, int] | None:
    """(rank of the order, place), by trying every place."""
    size = len(history)
    for rank, order in enumerate(ORDERS):
        end = list(history[size - order :])
        for place in range(size - 1, order - 1, -1):
            if size > order and list(history[place - order : place]) == end:
                return rank, place
    return None


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.lists(st.integers(1, 9), max_size=20))
def test_the_index_finds_what_looking_everywhere_finds(history: list[int], strides: list[int]) -> None:
    index, size = SuffixIndex(), 0
    for stride in [*strides, len(history)]:
        size = min(len(history), size + stride)
        index.follow(history[:size])
        assert index.find(history[:size]) == by_looking(history[:size])


def test_a_repetition_goes_on_in_circles() -> None:
    drafter = RepetitionDrafter(lambda mark: 0.5)
    want = Want("one", [9, 1, 2, 3, 1, 2, 3, 1, 2], 8, True, 100)
    (proposal,) = drafter.propose([want], batch=1)
    assert proposal.tokens == (3, 1, 2, 3, 1, 2, 3, 1)
    assert len(proposal.marks) == len(proposal.chances) == 8
    (nothing,) = drafter.propose([Want("two", [1, 2, 3, 4], 8, True, 100)], batch=1)
    assert nothing is NOTHING


def test_who_repeated_itself_wrongly_is_marked_as_that() -> None:
    drafter = RepetitionDrafter(lambda mark: 0.5)
    want = Want("one", [1, 2, 3, 1, 2], 2, True, 100)
    (before,) = drafter.propose([want], batch=1)
    for _ in range(20):
        drafter.observe("one", before.marks, 0)
    (after,) = drafter.propose([want], batch=1)
    assert after.tokens == before.tokens and after.marks != before.marks
    drafter.forget("one")
    assert drafter.propose([want], batch=1) == [before]


def test_the_end_of_a_long_prompt_is_enough() -> None:
    drafter = RepetitionDrafter(lambda mark: 0.5)
    history = [*range(10_000), *range(9_000, 9_050)]
    (proposal,) = drafter.propose([Want("one", history, 4, True, 100)], batch=1)
    assert proposal.tokens == (9_050, 9_051, 9_052, 9_053)
    assert all(isinstance(mark, Mark) for mark in proposal.marks)
