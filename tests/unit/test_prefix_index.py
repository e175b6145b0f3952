"""The prefix index: what a holder was said to hold, no more and no less."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trireme.policies.prefix_index import MAX_EXPECTED, PrefixIndex, split_hashes

BLOCKS = [bytes([i]) * 16 for i in range(6)]


def test_a_gap_ends_the_prefix() -> None:
    index = PrefixIndex()
    index.add(("w", "v"), [BLOCKS[0], BLOCKS[2]])
    assert index.leading_blocks(("w", "v"), BLOCKS) == 1
    assert index.leading_blocks(("other", "v"), BLOCKS) == 0


def test_a_worker_that_is_gone_is_forgotten() -> None:
    index = PrefixIndex()
    index.add(("w", "v"), BLOCKS)
    index.keep_only(["x"])
    assert index.leading_blocks(("w", "v"), BLOCKS) == 0


@given(st.lists(st.tuples(st.sampled_from(["add", "remove", "reset"]), st.sets(st.sampled_from(BLOCKS)))))
def test_the_index_equals_a_set(steps: list[tuple[str, set[bytes]]]) -> None:
    index, held = PrefixIndex(), set()
    for action, blocks in steps:
        if action == "add":
            index.add(("w", "v"), blocks)
            held |= blocks
        elif action == "remove":
            index.remove(("w", "v"), blocks)
            held -= blocks
        else:
            index.reset(("w", "v"))
            held = set()
    expected = next((i for i, block in enumerate(BLOCKS) if block not in held), len(BLOCKS))
    assert index.leading_blocks(("w", "v"), BLOCKS) == expected


def test_hashes_survive_concatenation() -> None:
    assert split_hashes(b"".join(BLOCKS)) == BLOCKS
    assert split_hashes(b"") == []


def test_what_is_expected_counts_until_the_worker_says_otherwise() -> None:
    index = PrefixIndex()
    index.expect(("w", "v"), BLOCKS[:3])
    assert index.leading_blocks(("w", "v"), BLOCKS) == 3
    index.add(("w", "v"), BLOCKS[:2])
    index.remove(("w", "v"), [BLOCKS[2]])
    assert index.leading_blocks(("w", "v"), BLOCKS) == 2
    index.expect(("w", "v"), BLOCKS)
    index.reset(("w", "v"))
    assert index.leading_blocks(("w", "v"), BLOCKS) == 0


def test_what_is_expected_and_never_comes_does_not_pile_up() -> None:
    index = PrefixIndex()
    for start in range(0, 3 * MAX_EXPECTED, 1000):
        index.expect(("w", "v"), [n.to_bytes(16, "big") for n in range(start, start + 1000)])
    assert len(index._expected["w", "v"]) <= MAX_EXPECTED
    newest = [n.to_bytes(16, "big") for n in range(start, start + 1000)]
    assert index.leading_blocks(("w", "v"), newest) == 1000
    index.keep_only([])
    assert not index._expected
