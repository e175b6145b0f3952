"""plan_truncation: what stays fits, the head stays, and a conversation that grows repeats its cuts."""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from trireme.errors import ContextLengthExceeded
from trireme.policies.kv_truncation import TruncationPlan, TruncationRule, plan_truncation, rotations


@st.composite
def rules(draw: st.DrawFn) -> TruncationRule:
    block_size = draw(st.sampled_from([1, 4, 16]))
    window = draw(st.integers(4 * block_size, 60 * block_size))
    fields = {
        "window": window,
        "block_size": block_size,
        "pinned_tokens": draw(st.integers(0, window)),
        "sink_tokens": draw(st.integers(0, 8)),
        "ratio": draw(st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9])),
    }
    try:
        return TruncationRule(**fields)  # type: ignore[arg-type]
    except ContextLengthExceeded:
        assume(False)
        raise


@st.composite
def conversations(draw: st.DrawFn) -> tuple[int, ...]:
    """Where each turn begins, and where the last one ends."""
    lengths = draw(st.lists(st.integers(1, 400), min_size=1, max_size=30))
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    return tuple(offsets)


def plan_at(
    rule: TruncationRule, turns: tuple[int, ...], length: int, reserved: int, made: tuple[int, ...] = ()
) -> TruncationPlan:
    """As it is planned when the conversation has `length` tokens: later turns are not known yet."""
    known = turns[: bisect_right(turns, length - 1)]
    return plan_truncation(rule, length, reserved_tokens=reserved, borders=known, made=made)


@given(rules(), conversations(), st.integers(1, 100))
def test_what_stays_and_the_answer_fit_the_window(
    rule: TruncationRule, turns: tuple[int, ...], reserved: int
) -> None:
    length = turns[-1]
    plan = plan_at(rule, turns, length, reserved)
    kept = plan.keep(range(length))
    assert len(kept) == plan.kept == length - plan.dropped
    assert plan.kept + min(reserved, rule.most_reserved) <= rule.window
    assert kept[: rule.head] == list(range(min(rule.head, length)))
    assert kept[-1] == length - 1
    assert (plan.dropped > 0) == (length + min(reserved, rule.most_reserved) > rule.window)


@given(rules(), conversations(), st.integers(1, 100))
def test_what_stays_moves_by_whole_blocks_and_lies_in_a_row(
    rule: TruncationRule, turns: tuple[int, ...], reserved: int
) -> None:
    plan = plan_at(rule, turns, turns[-1], reserved)
    size = rule.block_size
    assert plan.head % size == 0 and all(cut % size == 0 for cut in plan.cuts)
    assert list(plan.cuts) == sorted(set(plan.cuts)) and all(cut > plan.head for cut in plan.cuts)
    kept = plan.keep(range(plan.num_tokens))
    for position, token in enumerate(kept):  # position p holds token p, or p + the one shift
        assert token - position == (0 if position < plan.head else plan.dropped)


@given(rules(), conversations(), st.integers(1, 100), st.data())
def test_a_conversation_that_grows_repeats_its_cuts(
    rule: TruncationRule, turns: tuple[int, ...], reserved: int, data: st.DataObject
) -> None:
    lengths = sorted(data.draw(st.lists(st.integers(1, turns[-1]), min_size=2, max_size=8)))
    plans = [plan_at(rule, turns, length, reserved) for length in lengths]
    for before, after in pairwise(plans):
        assert after.cuts[: len(before.cuts)] == before.cuts
        assert plan_at(rule, turns, after.num_tokens, reserved, made=before.cuts) == after
        held = before.head + after.num_tokens - before.cut + min(reserved, rule.most_reserved)
        if held <= rule.window:  # the window has not overflowed again
            assert after.cuts == before.cuts


@given(rules(), conversations(), st.integers(1, 100), st.integers(1, 100))
def test_a_longer_answer_never_means_an_earlier_cut(
    rule: TruncationRule, turns: tuple[int, ...], one: int, other: int
) -> None:
    short, long = (plan_at(rule, turns, turns[-1], reserved) for reserved in sorted((one, other)))
    assert long.cuts[: len(short.cuts)] == short.cuts


@given(rules(), conversations())
def test_a_turn_that_can_stay_whole_is_not_cut_in_the_middle(
    rule: TruncationRule, turns: tuple[int, ...]
) -> None:
    plan = plan_at(rule, turns, turns[-1], 1)
    starts = {turn // rule.block_size * rule.block_size for turn in turns}
    for before, cut in zip((plan.head, *plan.cuts), plan.cuts, strict=False):
        if cut in starts:
            continue
        assert cut == before + rule.least_drop
        within = [turn for turn in turns if before + rule.block_size <= turn <= before + rule.reach]
        assert not within, "a turn began within reach"


@given(rules(), conversations(), st.integers(1, 100))
def test_the_last_turn_stays_whole_or_the_request_is_refused(
    rule: TruncationRule, turns: tuple[int, ...], reserved: int
) -> None:
    length, last = turns[-1], turns[-2]
    room = rule.window - rule.head - min(reserved, rule.most_reserved)
    start = max(last // rule.block_size * rule.block_size, rule.head)
    borders = turns[:-1]
    if length - start > room:
        with pytest.raises(ContextLengthExceeded, match="last turn"):
            plan_truncation(rule, length, reserved_tokens=reserved, borders=borders, protected_from=last)
    else:
        plan = plan_truncation(rule, length, reserved_tokens=reserved, borders=borders, protected_from=last)
        assert last in plan.keep(range(length)) or last < plan.head


@given(rules(), conversations(), st.integers(1, 100))
def test_half_windows_rotate_a_key_at_most_once(
    rule: TruncationRule, turns: tuple[int, ...], reserved: int
) -> None:
    plan = plan_at(rule, turns, turns[-1], reserved)
    most = max((rotations(plan, rule, token) for token in plan.keep(range(turns[-1]))), default=0)
    starts = {turn // rule.block_size * rule.block_size for turn in turns}
    if rule.ratio >= 0.5 and not starts & set(plan.cuts):
        assert most <= 1
    assert most <= len(plan.cuts)


def test_rotations_are_those_of_the_cuts_that_found_the_token_in_the_window() -> None:
    rule = TruncationRule(window=160, block_size=16, ratio=0.1)
    plan = plan_truncation(rule, 400)
    assert (rule.head, rule.least_drop) == (16, 16)
    assert plan.cuts == tuple(range(32, 273, 16))
    # Token 144 was computed before the first cut (the window held 0..160) and outlived eight: 32..144.
    assert rotations(plan, rule, 144) == 8
    assert rotations(plan, rule, 3) == 0
    # Token 399 came after the last cut, which was made when 399 tokens were there.
    assert rotations(plan, rule, 399) <= 1


def test_a_plain_text_drops_half_behind_its_first_block() -> None:
    rule = TruncationRule(window=1040, block_size=16)
    plan = plan_truncation(rule, 1200, reserved_tokens=100)
    assert (plan.head, plan.cuts, plan.kept) == (16, (528,), 688)
    assert plan.reason == "1200 tokens exceed the window of 1040: 16..528 dropped in 1 cuts"
    assert plan_truncation(rule, 940, reserved_tokens=100).cuts == ()
    assert plan_truncation(rule, 941, reserved_tokens=100).cuts == (528,)


def test_the_start_of_a_turn_is_met_within_one_block() -> None:
    rule = TruncationRule(window=1040, block_size=16)
    plan = plan_truncation(rule, 1200, borders=(0, 300, 620, 900))
    assert plan.cuts == (608,)  # 620 lies in the block that begins at 608
    assert plan_truncation(rule, 1200, borders=(0, 300, 900)).cuts == (288,)  # 900 is out of reach


def test_pins_that_leave_no_room_are_refused() -> None:
    with pytest.raises(ContextLengthExceeded, match="pin fewer"):
        TruncationRule(window=64, block_size=16, pinned_tokens=48)
    assert TruncationRule(window=64, block_size=16, pinned_tokens=20).head == 32
