"""Drafts from a smaller model that runs beside the target, on a thread of its own.

It always goes on from the newest tokens that it heard of, through its own guesses of those that the target is
computing. A guess that turns out right is a draft that has cost the target's step nothing; at the first wrong
one the rest is dropped before another step of the draft model is spent on it. Nobody waits for it: a step
takes what is there.

Source: asynchronous and continuous speculation with early cancellation of PipeInfer (arXiv 2407.11798,
sections 4.1 to 4.3), with threads of one process (on GPUs, streams) in place of nodes. The reader of a
sequence is its partition of the draft model's KV.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from trireme.engine.speculation.draft_readers import DraftReaders, Reader, mark_of
from trireme.engine.speculation.proposals import NOTHING, Proposal, Want
from trireme.policies.speculation import Mark, SpeculationController

_READ_AT_ONCE: Final = 128
"""Tokens of a sequence that are read before others have their turn."""
_LEAST_CHANCE: Final = 0.05
"""That a whole guess is right; another token behind a less likely one is not worth a step."""


@dataclass(frozen=True, slots=True)
class _Heard:
    """What is known of a sequence."""

    history: Sequence[int]
    length: int
    """Its tokens that are settled: the sequence grows while this is read."""
    most: int


@dataclass(frozen=True, slots=True)
class _Guess:
    """What may follow the first `length` tokens of a sequence."""

    length: int
    tokens: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()
    """The draft model's probability of each."""
    together: float = 1.0

    def behind(self, history: Sequence[int], length: int) -> _Guess | None:
        """What is left of it for a sequence of `length` tokens; None: it was wrong, or is used up."""
        used = length - self.length
        if not 0 <= used < len(self.tokens):
            return None
        if any(history[self.length + index] != self.tokens[index] for index in range(used)):
            return None
        together = 1.0
        for share in self.shares[used:]:
            together *= share
        return _Guess(length, self.tokens[used:], self.shares[used:], together)


class BesideDrafter:
    """Meets `Drafter`. Whoever calls it shares what the thread reads only as whole, unchanging values.

    Args:
        readers: the draft model's; the thread's alone from now on.
        controller: says how often a token of some probability is right.
    """

    def __init__(self, readers: DraftReaders, controller: SpeculationController) -> None:
        self.readers = readers
        self._controller = controller
        self._least_chance = 0.0 if controller.settings.fixed_tokens is not None else _LEAST_CHANCE
        self._heard: dict[str, _Heard] = {}
        self._guesses: dict[str, _Guess] = {}
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._has_news = False
        self._is_closed = False
        self._is_idle = True
        self._thread = threading.Thread(target=self._run, name="draft", daemon=True)
        self._thread.start()

    def propose(self, wants: Sequence[Want], *, batch: int) -> list[Proposal]:
        if self._error is not None:
            raise self._error
        proposals = []
        for want in wants:
            length = len(want.history)
            guess = self._guesses.get(want.sequence_id)
            left = guess.behind(want.history, length) if guess is not None else None
            proposals.append(NOTHING if left is None else self._proposal(left, want))
            if length + want.most <= self.readers.most:
                self._heard[want.sequence_id] = _Heard(want.history, length, want.most)
        self._tell()
        return proposals

    def observe(self, sequence_id: str, marks: Sequence[Mark], num_right: int) -> None:
        pass  # the controller knows all that is learnt of a model

    def forget(self, sequence_id: str) -> None:
        if self._heard.pop(sequence_id, None) is not None:
            self._tell()

    def close(self) -> None:
        """End the thread; what it drafts is dropped."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def settle(self) -> None:
        """Wait until there is nothing more to draft of what was heard: for tests."""
        with self._changed:
            self._changed.wait_for(lambda: (self._is_idle and not self._has_news) or self._error is not None)

    def _proposal(self, guess: _Guess, want: Want) -> Proposal:
        marks = tuple(mark_of(share, is_greedy=want.is_greedy) for share in guess.shares[: want.most])
        chances = tuple(map(self._controller.chance, marks))
        return Proposal(guess.tokens[: want.most], marks, chances)

    def _tell(self) -> None:
        with self._changed:
            self._has_news = True
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            with torch.inference_mode(), self.readers.stream():
                while self._awaits_news():
                    while self._draft() and not self._is_closed:
                        pass
        except Exception as error:
            self._error = error
            with self._changed:
                self._changed.notify_all()

    def _awaits_news(self) -> bool:
        """False: it is over."""
        with self._changed:
            self._is_idle = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._has_news or self._is_closed)
            self._has_news, self._is_idle = False, False
            return not self._is_closed

    def _draft(self) -> bool:
        """One step of the draft model for all who can use one; False if there is nobody."""
        heard = dict(self._heard)
        for name in self._guesses.keys() - heard.keys():
            del self._guesses[name]
            self.readers.forget(name)
        unread: list[tuple[Reader, Sequence[int]]] = []
        chunks: list[tuple[Reader, Sequence[int]]] = []
        followed: list[tuple[str, _Guess]] = []
        for name, known in heard.items():
            reader = self.readers.find(name) or self.readers.open(name)
            guess = self._guesses.get(name)
            guess = guess.behind(known.history, known.length) if guess is not None else None
            guess = self._guesses[name] = guess or _Guess(known.length)
            # As many as are verified now, the one behind them, and as many again.
            if len(guess.tokens) > 2 * known.most or guess.together < self._least_chance:
                continue
            reader.set_back(known.history, known.length, guess.tokens)
            start, stop = len(reader.tokens), known.length + len(guess.tokens)
            is_long = stop - start > _READ_AT_ONCE
            if not self.readers.hold(reader, start + _READ_AT_ONCE if is_long else stop, keep=heard.keys()):
                continue
            if is_long:
                unread.append((reader, [known.history[at] for at in range(start, start + _READ_AT_ONCE)]))
                continue
            settled = [known.history[at] for at in range(start, known.length)]
            chunks.append((reader, [*settled, *guess.tokens[max(0, start - known.length) :]]))
            followed.append((name, guess))
        if unread:
            self.readers.read(unread)
        if chunks:
            for (name, guess), ((token, share),) in zip(followed, self.readers.follow(chunks), strict=True):
                # Scores that are no numbers say that nothing can be guessed here.
                share = share if 0.0 <= share <= 1.0 else 0.0
                tokens, shares = (*guess.tokens, token), (*guess.shares, share)
                self._guesses[name] = _Guess(guess.length, tokens, shares, guess.together * share)
        return bool(unread or chunks)
