"""Settings from the environment: what is wrong is named, what is right comes back the same."""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trireme.errors import InvalidConfiguration
from trireme.runtime.settings import dump, load


@dataclass(frozen=True, kw_only=True)
class Example:
    url: str
    count: int = 3
    rate: float = 0.5
    wanted: bool = False
    where: Path = Path("here")
    names: tuple[str, ...] = ()
    limit: int | None = None


def test_absent_variables_keep_their_defaults_and_others_are_left_alone() -> None:
    settings = load(Example, {"X_URL": "u", "Y_COUNT": "9", "PATH": "/bin"}, prefix="X_")
    assert settings == Example(url="u")


def test_every_type_is_read() -> None:
    environ = {
        "X_URL": "u",
        "X_COUNT": "-4",
        "X_RATE": "1e-3",
        "X_WANTED": "On",
        "X_WHERE": "/a/b",
        "X_NAMES": "a, b,,c",
        "X_LIMIT": "7",
    }
    assert load(Example, environ, prefix="X_") == Example(
        url="u", count=-4, rate=1e-3, wanted=True, where=Path("/a/b"), names=("a", "b", "c"), limit=7
    )
    assert load(Example, environ | {"X_LIMIT": ""}, prefix="X_").limit is None


@pytest.mark.parametrize(
    ("variables", "at_fault"),
    [
        ({}, "X_URL"),
        ({"X_URL": "u", "X_COUNT": "many"}, "X_COUNT"),
        ({"X_URL": "u", "X_COUNT": "1.5"}, "X_COUNT"),
        ({"X_URL": "u", "X_RATE": ""}, "X_RATE"),
        ({"X_URL": "u", "X_WANTED": "perhaps"}, "X_WANTED"),
        ({"X_URL": "u", "X_LIMIT": "x"}, "X_LIMIT"),
        ({"X_URL": "u", "X_CUONT": "4"}, "X_CUONT"),
    ],
)
def test_what_is_wrong_is_named(variables: dict[str, str], at_fault: str) -> None:
    with pytest.raises(InvalidConfiguration) as caught:
        load(Example, variables, prefix="X_")
    assert caught.value.param == at_fault
    assert at_fault in caught.value.message


words = st.text(string.ascii_letters + string.digits + "./:-", min_size=1, max_size=12)


@given(
    st.builds(
        Example,
        url=words,
        count=st.integers(-(10**9), 10**9),
        rate=st.floats(allow_nan=False),
        wanted=st.booleans(),
        where=words.map(Path),
        names=st.lists(words, max_size=3).map(tuple),
        limit=st.none() | st.integers(-9, 9),
    )
)
def test_what_is_dumped_loads_the_same(settings: Example) -> None:
    assert load(Example, dump(settings, prefix="X_"), prefix="X_") == settings
