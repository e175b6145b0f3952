"""Drafts from the sequence itself: what followed its last tokens when they stood in it before.

An index holds every run of a few tokens with the place behind its latest occurrence, so that a token costs a
few dictionary writes once, and a proposal a few look-ups. Where the match ends at the end of the sequence the
draft goes on in circles: the sequence repeats itself with that period.

Source: prompt lookup decoding (Saxena, 2023); the index is our own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from trireme.engine.speculation.proposals import NOTHING, Growth, Proposal, Want
from trireme.policies.speculation import Mark

_ORDERS: Final = (8, 5, 3, 2)
"""Lengths of runs, longest first."""
_DEPTHS: Final = (0, 1, 1, 2)
"""Grade by place in the draft; later ones have the last."""
_MOST_AT_ONCE: Final = 4096
"""Of a longer prompt the end is looked at: all of it would hold up the step for too long."""
_SOURCE: Final = "repetition"
_OTHERS: Final = "repetition, another branch"
_MOST_PLACES: Final = 6
"""Occurrences of one run that are looked at for other continuations."""
_FORGETTING: Final = 0.8


class SuffixIndex:
    """One sequence's runs of tokens, and how often its repetitions have held."""

    __slots__ = ("_earlier", "_keeps_earlier", "_places", "_size", "trust")

    def __init__(self, *, keeps_earlier: bool = False) -> None:
        self._places: list[dict[int, int]] = [{} for _ in _ORDERS]
        """Hashes of runs to the places behind them: two runs of one hash are a bad draft at worst."""
        self._earlier: list[dict[int, int]] = [{} for _ in _ORDERS]
        """From a place to that behind the run's occurrence before."""
        self._keeps_earlier = keeps_earlier
        self._size = 0
        self.trust = 0.5
        """Recent share of right tokens."""

    def follow(self, history: Sequence[int]) -> None:
        """Take in the tokens that have come since, all but what ends with the last: nothing follows that."""
        size = len(history)
        if size <= self._size:
            return
        self._size = max(self._size, size - _MOST_AT_ONCE)
        start = max(0, self._size - _ORDERS[0])
        recent = list(history[start:size])
        for stop in range(max(self._size, 1), size):
            end = stop - start
            for order, places, earlier in zip(_ORDERS, self._places, self._earlier, strict=True):
                if order <= stop:
                    run = hash(tuple(recent[end - order : end]))
                    if self._keeps_earlier and run in places:
                        earlier[stop] = places[run]
                    places[run] = stop
        self._size = size

    def find(self, history: Sequence[int]) -> tuple[int, int] | None:
        """(rank of the order, place behind the latest earlier occurrence of the longest run at the end)."""
        size = len(history)
        for rank, (order, places) in enumerate(zip(_ORDERS, self._places, strict=True)):
            if order < size:
                place = places.get(hash(tuple(history[size - order : size])))
                if place is not None:
                    return rank, place
        return None

    def find_all(self, history: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Of each order the places behind its latest occurrences, as far as they are kept.

        The longest runs come first, of each the latest; so the first of all is that of `find`.
        """
        size = len(history)
        for rank, order in enumerate(_ORDERS):
            if order >= size:
                continue
            place = self._places[rank].get(hash(tuple(history[size - order : size])))
            for _ in range(_MOST_PLACES):
                if place is None:
                    break
                yield rank, place
                place = self._earlier[rank].get(place)


def _continuation(history: Sequence[int], place: int, count: int) -> tuple[int, ...]:
    """So many tokens from a place on, in circles where the history ends before."""
    tokens = tuple(history[place : place + count])
    if len(tokens) < count:
        period = len(history) - place
        tokens = tuple([history[place + number % period] for number in range(count)])
    return tokens


class RepetitionDrafter:
    """Meets `Drafter`.

    Args:
        chance: of a token of a mark to be right.
    """

    def __init__(self, chance: Callable[[Mark], float]) -> None:
        self._chance = chance
        self._indices: dict[str, SuffixIndex] = {}

    def propose(self, wants: Sequence[Want], *, batch: int) -> list[Proposal]:
        return [self._propose(want) for want in wants]

    def _propose(self, want: Want) -> Proposal:
        index = self._indices.get(want.sequence_id)
        if index is None:
            index = self._indices[want.sequence_id] = SuffixIndex(keeps_earlier=want.branches > 1)
        history = want.history
        index.follow(history)
        found = index.find(history)
        if found is None:
            return NOTHING
        rank, place = found
        tokens = _continuation(history, place, want.most)
        grade = (rank * 4 + min(3, int(4.0 * index.trust))) * 3
        grades = [Mark(_SOURCE, grade + depth, want.is_greedy) for depth in range(3)]
        chances = [self._chance(mark) for mark in grades]
        depths = [_DEPTHS[min(place, len(_DEPTHS) - 1)] for place in range(want.most)]
        if want.branches > 1:
            growth = Growth()
            last = -1
            for token, depth in zip(tokens, depths, strict=True):
                last = growth.add(last, token, grades[depth], chances[depth])
            self._branch(want, index, growth)
            return growth.proposal()
        return Proposal(
            tokens, tuple([grades[depth] for depth in depths]), tuple([chances[depth] for depth in depths])
        )

    def _branch(self, want: Want, index: SuffixIndex, growth: Growth) -> None:
        """What else followed, each continuation from where it differs from those before it."""
        trust = min(1, int(2.0 * index.trust))
        seen: set[int] = set()
        for rank, place in index.find_all(want.history):
            if place in seen:  # a longer run stood there too
                continue
            seen.add(place)
            last, behind = -1, 0
            for token in _continuation(want.history, place, want.most):
                siblings = growth.children(last)
                if token in siblings:
                    last = siblings[token]
                    continue
                if not behind and len(siblings) >= want.branches:
                    break
                grade = ((rank * 2 + trust) * 2 + min(1, len(siblings) // 2)) * 3 + min(2, behind)
                mark = Mark(_OTHERS, grade, want.is_greedy)
                last = growth.add(last, token, mark, self._chance(mark))
                behind += 1

    def observe(self, sequence_id: str, marks: Sequence[Mark], num_right: int) -> None:
        index = self._indices.get(sequence_id)
        if index is not None and marks:
            index.trust = _FORGETTING * index.trust + (1.0 - _FORGETTING) * num_right / len(marks)

    def close(self) -> None:
        pass  # nothing runs between two calls

    def forget(self, sequence_id: str) -> None:
        self._indices.pop(sequence_id, None)
