"""How many tokens to draft, for whom, and when not to: speculation that never loses.

A step verifies b sequences and some drafted tokens; it gives every sequence one token, and one more for every
drafted token up to its first wrong one. With P(j) the chance that a sequence's first j drafted tokens are all
right, the tokens of a step are b + sum of P(j) over what is drafted, and its time is

    plain(b) + fixed + row * drafted

with plain(b) measured in steps that draft nothing, and the other two fitted to steps that do. The lengths
chosen are those with the most tokens per second (`best_lengths`); none, if that is no more than b / plain(b).

Models err, so what was gained is measured too, by batch size: who has lost over some steps pauses, and tries
again after pauses that double (`SpeculationController`).

Source: PipeInfer (arXiv 2407.11798) for a cutoff by the draft's own confidence; tokens per pass after
Leviathan et al., ICML 2023, and of trees after Chen et al., Sequoia (arXiv 2402.12374, section 3.1), whose
dynamic programme the likeliest tokens are a solution of where each one's chance is known; the choice by
measured marginal time is our own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from trireme.errors import InvalidConfiguration
from trireme.policies.least_squares import non_negative_solution

_PLAIN_SAMPLES = 5
_LEAST_PLAIN = 2
_LEAST_DRAFTED = 4
_LEAST_DRAFT_STEPS = 3
_DRAFTED_SAMPLES = 48
_STALE_STEPS = 96
"""After so many steps of a batch size that draft, one that does not shows what it would take."""
_UNMEASURED_SHARE = 0.06
"""Of a plain step, that a drafted token adds while nothing was measured."""
_FIRST_DRAFTED = 4
_SPIKE = 1.5
"""A step counts as at most so many times what was expected: the machine may have done something else."""
_FORGETTING = 0.99
_PRIOR_WEIGHT = 2.0
_TRIAL_STEPS = 8
_FIRST_PAUSE_STEPS = 32
_LONGEST_PAUSE_STEPS = 2048
_LEAST_TRIAL_GAIN = 0.99
_READ_SHARE = 0.25
"""Of a draft step, that a token costs which is read among many."""
_MARGIN = 1.02
"""Expected gain below which nothing is drafted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationSettings:
    """Knobs. Raises InvalidConfiguration: a value is out of range."""

    fixed_tokens: int | None = None
    """Draft so many tokens for everybody, whatever it costs; None: as many as pay."""
    max_tokens: int = 12
    """Most that are drafted for a sequence and step."""
    matches: bool = True
    """Draft what followed the sequence's last tokens when they stood in it before."""
    beside: bool = False
    """The draft model runs beside the target, not before it: for machines that have a core to spare."""
    branches: int = 1
    """Likely continuations of one token that may be drafted beside each other, as a tree; 1: chains."""
    max_tree_tokens: int = 24
    """Most that are drafted for a sequence and step where they branch."""

    def __post_init__(self) -> None:
        if self.fixed_tokens is not None and not 1 <= self.fixed_tokens <= 64:
            raise InvalidConfiguration(f"fixed_tokens is {self.fixed_tokens}; it must be from 1 to 64")
        if not 1 <= self.max_tokens <= 64:
            raise InvalidConfiguration(f"max_tokens is {self.max_tokens}; it must be from 1 to 64")
        if not 1 <= self.branches <= 8:
            raise InvalidConfiguration(f"branches is {self.branches}; it must be from 1 to 8")
        if not 1 <= self.max_tree_tokens <= 63:
            raise InvalidConfiguration(
                f"max_tree_tokens is {self.max_tree_tokens}; it must be from 1 to 63, which fit a mask"
            )

    @property
    def most(self) -> int:
        """Tokens that may be drafted for a sequence and step, one behind the other."""
        return self.fixed_tokens or self.max_tokens

    @property
    def most_in_all(self) -> int:
        """Tokens of all branches that may be drafted for a sequence and step."""
        return min(self.fixed_tokens, 63) if self.fixed_tokens is not None else self.max_tree_tokens


class Mark(NamedTuple):
    """What a drafter knows of a token that it proposes. Tokens of one mark are right equally often."""

    source: str
    grade: int
    """Of the drafter's own confidence."""
    is_greedy: bool
    """The target takes the likeliest token, else it draws."""


class Choice(NamedTuple):
    """How much is verified."""

    lengths: tuple[int, ...]
    """By proposal."""
    gain: float
    """Expected tokens per second over those of a plain step; 1 if nothing is drafted."""


def best_lengths(
    proposals: Sequence[Sequence[float]],
    *,
    batch: int,
    plain_s: float,
    fixed_s: float,
    row_s: float,
    room: int,
    least_gain: float = _MARGIN,
) -> Choice:
    """The lengths with the most tokens per second.

    Exact for these times: the times depend on the number of tokens only, so of every number the likeliest
    are the best, and chances fall along a proposal. That holds of trees as of chains: the likeliest tokens of
    a tree are a tree, since no token is likelier than the one before it.

    Args:
        proposals: per sequence, the chance of each token that it and all before it are right, falling.
        batch: sequences in the step, at least as many as proposals.
        plain_s: of a step that drafts nothing; positive.
        fixed_s, row_s: what drafting at all and each drafted token add; not negative.
        room: tokens that may be drafted in all.
        least_gain: a smaller gain is none.
    """
    ranked: list[tuple[float, int]] = []
    for index, reaches in enumerate(proposals):
        ranked += [(together, index) for together in reaches]
    ranked.sort(key=lambda pair: (-pair[0], pair[1]))
    best_gain, best_count = 1.0, 0
    tokens = float(batch)
    for count, (together, _) in enumerate(ranked[:room], start=1):
        tokens += together
        seconds = plain_s + fixed_s + count * row_s
        gain = (tokens / seconds) / (batch / plain_s)
        if gain > best_gain:
            best_gain, best_count = gain, count
    lengths = [0] * len(proposals)
    if best_gain < least_gain:
        return Choice(tuple(lengths), 1.0)
    for _, index in ranked[:best_count]:
        lengths[index] += 1
    return Choice(tuple(lengths), best_gain)


class StepTimes:
    """What steps of decoding sequences take, without drafted tokens and with them.

    Both are told by what lies in the middle of what was measured: a step in which the machine did something
    else says nothing, with drafts or without.
    """

    def __init__(self) -> None:
        self._plain: dict[int, deque[float]] = {}
        self._since_plain: dict[int, int] = {}
        self._drafted: deque[tuple[int, float]] = deque(maxlen=_DRAFTED_SAMPLES)
        """(drafted tokens, seconds beyond a plain step)."""
        self._fit: tuple[float, float] | None = None
        self._most_drafted = 0

    def observe(self, *, batch: int, drafted: int, seconds: float) -> None:
        """A step of so many decoding sequences and nothing else, without the time of drafting."""
        if not drafted:
            self._plain.setdefault(batch, deque(maxlen=_PLAIN_SAMPLES)).append(seconds)
            self._since_plain[batch] = 0
            return
        self._since_plain[batch] = self._since_plain.get(batch, 0) + 1
        self._most_drafted = max(self._most_drafted, drafted)
        plain_s = self.plain_s(batch)
        if plain_s is not None:
            self._drafted.append((drafted, seconds - plain_s))
            self._fit = None

    def plain_s(self, batch: int) -> float | None:
        """Of a step that drafts nothing; None: a step of this size has to be measured first."""
        samples = self._plain.get(batch, ())
        if len(samples) >= _LEAST_PLAIN:
            return _median(samples)
        below = max((size for size in self._known() if size < batch), default=0)
        above = min((size for size in self._known() if size > batch), default=0)
        if not below or not above or above > 2 * below:
            return None
        low, high = _median(self._plain[below]), _median(self._plain[above])
        return low + (high - low) * (batch - below) / (above - below)

    def wants_plain(self, batch: int) -> bool:
        """What a plain step of this size takes is not known, or not any more."""
        return self.plain_s(batch) is None or self._since_plain.get(batch, 0) >= _STALE_STEPS

    def is_fresh(self, batch: int) -> bool:
        """A plain step of this size was measured lately."""
        return batch in self._plain and self._since_plain.get(batch, 0) <= 3 * _TRIAL_STEPS

    def forget_plain(self, batch: int) -> None:
        """Plain steps of this size are to be measured anew."""
        self._plain.pop(batch, None)
        self._since_plain[batch] = _STALE_STEPS

    @property
    def room(self) -> int:
        """Tokens that may be drafted without going far beyond what was measured."""
        return max(_FIRST_DRAFTED, 2 * self._most_drafted)

    def added_s(self, batch: int) -> tuple[float, float]:
        """(fixed, per drafted token) beyond a plain step."""
        if len(self._drafted) < _LEAST_DRAFTED:
            return 0.0, _UNMEASURED_SHARE * (self.plain_s(1) or self.plain_s(batch) or 0.0)
        if self._fit is None:
            samples = list(self._drafted)
            for _ in range(2):  # the second time without what lies far from the first
                fixed_s, row_s = non_negative_solution(
                    [(1.0, float(drafted)) for drafted, _ in samples], [seconds for _, seconds in samples]
                )
                samples.sort(key=lambda sample: sample[1] - fixed_s - row_s * sample[0])
                samples = samples[len(samples) // 4 : len(samples) - len(samples) // 4]
            self._fit = fixed_s, row_s
        return self._fit

    def _known(self) -> Iterator[int]:
        return (size for size, samples in self._plain.items() if len(samples) >= _LEAST_PLAIN)


def _median(samples: Iterable[float]) -> float:
    ordered = sorted(samples)
    return ordered[len(ordered) // 2]


class _Trial:
    """What speculation has gained at one batch size, and whether it pauses."""

    __slots__ = ("gained", "pause", "paused_steps", "spent", "steps")

    def __init__(self) -> None:
        self.gained = 0.0
        """Time that plain steps would have taken for the same tokens; forgets."""
        self.spent = 0.0
        self.steps = 0
        self.pause = _FIRST_PAUSE_STEPS
        self.paused_steps = 0


class SpeculationController:
    """Learns what drafts are worth and what they cost, and chooses. One per engine.

    Per step: `is_on`; the drafters' `chance`, `pays_to_draft`; `choose`; then `observe_draft` per sequence
    and `observe_step`. All times come from outside.
    """

    def __init__(self, settings: SpeculationSettings | None = None) -> None:
        self.settings = settings or SpeculationSettings()
        self.times = StepTimes()
        self._right: dict[Mark, tuple[float, float]] = {}
        """(right, tried), both forgetting."""
        self._source: dict[tuple[str, bool], tuple[float, float]] = {}
        self._trials: dict[int, _Trial] = {}
        self._draft_s: dict[int, deque[float]] = {}
        """Of one draft step, by the bits of the number of its sequences."""
        self._since_draft = 0
        self._expected_draft_s = 0.0
        """Of the draft steps since the last step."""
        self._read_s = 0.0
        """That the draft model has read for since the last step."""

    def is_on(self, batch: int) -> bool:
        """Tokens may be drafted in a step of so many decoding sequences.

        False: it is paused after a loss, or a plain step is to be measured.
        """
        if self.settings.fixed_tokens is not None:
            return True
        trial = self._trials.get(batch.bit_length())
        if trial is not None and trial.paused_steps > 0:
            trial.paused_steps -= 1
            return False
        return not self.times.wants_plain(batch)

    def chance(self, mark: Mark) -> float:
        """That a token of this mark is right, where those before it are."""
        right, tried = self._right.get(mark, (0.0, 0.0))
        return (right + _PRIOR_WEIGHT * self.source_chance(mark.source, mark.is_greedy)) / (
            tried + _PRIOR_WEIGHT
        )

    def source_chance(self, source: str, is_greedy: bool) -> float:
        """The same for any token of a source."""
        right, tried = self._source.get((source, is_greedy), (0.0, 0.0))
        return (right + 0.6 * _PRIOR_WEIGHT) / (tried + _PRIOR_WEIGHT)

    def pays_to_read(self, unread_tokens: int, *, left_tokens: int, batch: int, is_greedy: bool) -> bool:
        """It is worth the draft model's time to read so much of a sequence that has so many to go at most."""
        plain_s, draft_s = self.times.plain_s(batch), self.draft_s(1)
        if self.settings.fixed_tokens is not None or plain_s is None or draft_s is None:
            return True
        chance = self.source_chance("model", is_greedy)
        gain_s = chance * plain_s / batch - draft_s - self.times.added_s(batch)[1]
        if self._since_draft >= _LONGEST_PAUSE_STEPS and unread_tokens <= 2 * left_tokens:
            return True  # what did not pay may pay now, and nothing else would show it
        # Half of what is left: an answer may end sooner, and steps that take drafts are fewer.
        return unread_tokens * _READ_SHARE * draft_s < 0.5 * left_tokens * gain_s

    def pays_to_draft(self, chances: Sequence[float], *, batch: int) -> bool:
        """One more step of the draft model is worth its time.

        Args:
            chances: per sequence that it would run for, that the token it would give is right and used.
            batch: sequences in the target's step.
        """
        if self.settings.fixed_tokens is not None:
            return True
        plain_s = self.times.plain_s(batch)
        if plain_s is None:
            return False
        draft_s = self.draft_s(len(chances)) or 0.0  # not known: it may be worth finding out
        self._since_draft += 1
        if self._since_draft >= _STALE_STEPS:  # a drafter that did not pay may pay now
            return True
        _, row_s = self.times.added_s(batch)
        return sum(chances) * plain_s / batch > draft_s + row_s * len(chances)

    def worth_drafting(self, chances: Sequence[float], *, batch: int) -> int:
        """How many branches the draft model reads next, in one step: as many as gain most; 0: none pays.

        Args:
            chances: of each branch, that the token it would give is right and used, falling.
            batch: sequences in the target's step.
        """
        if self.settings.fixed_tokens is not None:
            return len(chances)
        plain_s = self.times.plain_s(batch)
        if plain_s is None:
            return 0
        _, row_s = self.times.added_s(batch)
        best_count, most_s, together = 0, 0.0, 0.0
        for count, chance in enumerate(chances, start=1):
            together += chance
            draft_s = self.draft_s(count) or 0.0  # not known: it may be worth finding out
            gain_s = together * plain_s / batch - draft_s - row_s * count
            if gain_s > most_s:
                best_count, most_s = count, gain_s
        return best_count

    def draft_s(self, count: int) -> float | None:
        """Of one step of the draft model for so many sequences; None: not known."""
        samples = self._draft_s.get(count.bit_length())
        return None if samples is None or len(samples) < _LEAST_DRAFT_STEPS else _median(samples)

    def choose(self, proposals: Sequence[Sequence[float]], *, batch: int, room: int) -> tuple[int, ...]:
        """How many tokens of each proposal are verified: see `best_lengths`."""
        fixed = self.settings.fixed_tokens
        plain_s = self.times.plain_s(batch)
        if fixed is not None:
            lengths = []
            for reaches in proposals:
                lengths.append(min(fixed, len(reaches), room))
                room -= lengths[-1]
            return tuple(lengths)
        if plain_s is None:
            return (0,) * len(proposals)
        fixed_s, row_s = self.times.added_s(batch)
        return best_lengths(
            proposals,
            batch=batch,
            plain_s=plain_s,
            fixed_s=fixed_s,
            row_s=row_s,
            room=min(room, self.times.room),
        ).lengths

    def observe_draft_step(self, count: int, seconds: float) -> None:
        """A step of the draft model for so many sequences, one token each."""
        samples = self._draft_s.setdefault(count.bit_length(), deque(maxlen=_PLAIN_SAMPLES))
        samples.append(seconds)
        self._expected_draft_s += _median(samples)
        self._since_draft = 0

    def observe_read(self, seconds: float) -> None:
        """The draft model has read what it will need for longer than the next step."""
        self._read_s += seconds

    def observe_draft(self, marks: Sequence[Mark], num_right: int) -> None:
        """Of a sequence's drafted tokens so many were right; the one behind them, if any, was wrong."""
        for mark in marks[: num_right + 1]:
            self.observe_token(mark, is_right=num_right > 0)
            num_right -= 1

    def observe_token(self, mark: Mark, *, is_right: bool) -> None:
        """A token whose predecessors were right was right itself, or wrong."""
        right, tried = self._right.get(mark, (0.0, 0.0))
        self._right[mark] = _FORGETTING * right + is_right, _FORGETTING * tried + 1.0
        source = mark.source, mark.is_greedy
        right, tried = self._source.get(source, (0.0, 0.0))
        self._source[source] = _FORGETTING * right + is_right, _FORGETTING * tried + 1.0

    def observe_step(
        self, *, batch: int, drafted: int, tokens: int, seconds: float, drafting_s: float
    ) -> None:
        """A step of `batch` decoding sequences and nothing else.

        Args:
            drafted: tokens that were verified beside those that a plain step computes.
            tokens: what the step gave.
            seconds: of the step, with `drafting_s` in it.
        """
        self.times.observe(batch=batch, drafted=drafted, seconds=seconds - drafting_s)
        expected_draft_s, self._expected_draft_s = self._expected_draft_s, 0.0
        seconds, drafting_s, self._read_s = seconds - self._read_s, drafting_s - self._read_s, 0.0
        plain_s = self.times.plain_s(batch)
        if plain_s is None or (not drafted and drafting_s < 0.02 * plain_s):
            return
        fixed_s, row_s = self.times.added_s(batch) if drafted else (0.0, 0.0)
        expected_s = plain_s + fixed_s + row_s * drafted + expected_draft_s
        trial = self._trials.setdefault(batch.bit_length(), _Trial())
        keep = 1.0 - 1.0 / (2 * _TRIAL_STEPS)
        trial.gained = keep * trial.gained + plain_s * tokens / batch
        trial.spent = keep * trial.spent + min(seconds, _SPIKE * expected_s)
        trial.steps += 1
        if trial.steps < _TRIAL_STEPS:
            return
        if trial.gained < _LEAST_TRIAL_GAIN * trial.spent:
            trial.gained = trial.spent = 0.0
            trial.steps = 0
            if not self.times.is_fresh(batch):  # it may be that everything is slower now
                self.times.forget_plain(batch)
                return
            trial.paused_steps = trial.pause
            trial.pause = min(2 * trial.pause, _LONGEST_PAUSE_STEPS)
        elif trial.steps >= 8 * _TRIAL_STEPS:
            trial.pause = _FIRST_PAUSE_STEPS
