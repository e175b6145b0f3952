"""SortedKeys: equal to a sorted list, whatever is added and removed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trireme.policies import sorted_keys
from trireme.policies.sorted_keys import SortedKeys

KEYS = st.tuples(st.integers(0, 40), st.integers(0, 3))


@settings(max_examples=200, deadline=None)
@given(start=st.sets(KEYS), steps=st.lists(st.tuples(st.booleans(), KEYS), max_size=120))
def test_it_holds_what_a_sorted_list_would(
    start: set[tuple[int, int]], steps: list[tuple[bool, tuple[int, int]]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sorted_keys, "_RUN", 4)  # so that runs split and vanish
        keys, model = SortedKeys(start), set(start)
        for is_added, key in steps:
            assert (key in keys) == (key in model)
            if not is_added:
                assert keys.discard(key) == (key in model)
                model.discard(key)
            elif key not in model:
                keys.add(key)
                model.add(key)
            ordered = sorted(model)
            assert list(keys) == ordered
            assert list(reversed(keys)) == ordered[::-1]
            assert len(keys) == len(model)
            assert [keys[rank] for rank in range(len(model))] == ordered


@pytest.mark.parametrize("rank", [-1, 2])
def test_there_is_no_key_beyond_the_ends(rank: int) -> None:
    with pytest.raises(IndexError):
        SortedKeys([(1,), (2,)])[rank]
