"""Which graph a decode step takes: the smallest that holds it, captured once for each width."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trireme.errors import InvalidConfiguration
from trireme.policies.decode_graphs import Captured, GraphLimits, buckets_up_to, plan

LIMITS = GraphLimits(buckets=(1, 2, 4, 8), most_width=100)


def test_a_step_takes_the_smallest_graph_that_holds_it() -> None:
    captured = Captured(width=16, buckets=frozenset({1, 2, 4, 8}))
    taken = [plan(captured, LIMITS, rows=rows, width=3).bucket for rows in range(10)]
    assert taken == [None, 1, 2, 4, 4, 8, 8, 8, 8, None]


def test_a_graph_is_captured_when_it_is_first_wanted() -> None:
    first = plan(Captured(), LIMITS, rows=3, width=2)
    assert (first.bucket, first.captures, first.drops) == (4, True, False)
    assert first.after == Captured(width=16, buckets=frozenset({4}))
    again = plan(first.after, LIMITS, rows=4, width=16)
    assert (again.bucket, again.captures, again.after) == (4, False, first.after)
    other = plan(again.after, LIMITS, rows=1, width=1)
    assert (other.captures, other.after.buckets) == (True, {1, 4})


def test_wider_block_tables_drop_all_graphs() -> None:
    captured = Captured(width=16, buckets=frozenset({1, 4}))
    wider = plan(captured, LIMITS, rows=1, width=17)
    assert (wider.drops, wider.captures) == (True, True)
    assert wider.after == Captured(width=32, buckets=frozenset({1}))
    assert "outgrow" in wider.reason
    assert plan(captured, LIMITS, rows=1, width=90).after.width == 100
    assert plan(captured, LIMITS, rows=1, width=101).bucket is None


@given(
    steps=st.lists(st.tuples(st.integers(0, 70), st.integers(1, 130)), max_size=80),
    most=st.integers(1, 64),
    most_width=st.integers(1, 128),
)
def test_graphs_hold_their_steps_and_are_captured_once(
    steps: list[tuple[int, int]], most: int, most_width: int
) -> None:
    limits = GraphLimits(buckets=buckets_up_to(most), most_width=most_width)
    captured, there, widths = Captured(), set[int](), list[int]()
    for rows, width in steps:
        chosen = plan(captured, limits, rows=rows, width=width)
        if chosen.drops:
            there.clear()
        if chosen.bucket is None:
            assert not 1 <= rows <= most or width > most_width
            assert chosen.after == captured and not chosen.captures
        else:
            assert chosen.bucket >= rows and width <= chosen.after.width <= most_width
            assert all(bucket < rows for bucket in limits.buckets if bucket < chosen.bucket)
            assert chosen.captures == (chosen.bucket not in there)
            there.add(chosen.bucket)
            widths.append(chosen.after.width)
        assert chosen.after.buckets == there
        assert chosen.reason
        captured = chosen.after
    assert widths == sorted(widths)
    assert len(set(widths)) <= 4  # 16, 32, 64, 128


@pytest.mark.parametrize("most", [1, 2, 3, 8, 9, 64, 100, 256, 300, 1000])
def test_padding_is_less_than_half_of_a_batch(most: int) -> None:
    buckets = buckets_up_to(most)
    assert buckets[-1] == most and list(buckets) == sorted(set(buckets))
    for rows in range(1, most + 1):
        bucket = next(bucket for bucket in buckets if bucket >= rows)
        assert bucket < 2 * rows


@pytest.mark.parametrize("buckets", [(), (0, 1), (2, 1), (1, 1)])
def test_buckets_that_make_no_sense_are_refused(buckets: tuple[int, ...]) -> None:
    with pytest.raises(InvalidConfiguration, match="buckets are"):
        GraphLimits(buckets=buckets, most_width=4)
    with pytest.raises(InvalidConfiguration, match="most_width is 0"):
        GraphLimits(buckets=(1,), most_width=0)
