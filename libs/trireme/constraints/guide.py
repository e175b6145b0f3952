"""How far one answer has come in its constraint, and the cache of compiled constraints."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

from llguidance import LLMatcher, LLTokenizer

from trireme.constraints.compiling import compiled, open_tokens
from trireme.constraints.constraint import Constraint
from trireme.errors import InvalidRequest, RequestFailed

CACHED: Final = 256
"""Compiled constraints that are kept."""
PATIENCE_S: Final = 30.0
"""How long a sequence waits for its constraint to be compiled. The gateway has refused what takes longer
than a few seconds."""


class Guide:
    """The matcher of one sequence. Where it fails, the next look at `matcher` raises."""

    __slots__ = ("_compiling", "_failure", "_latest_s", "_matcher", "_token_ids")

    def __init__(self, compiling: Future[LLMatcher], token_ids: Sequence[int]) -> None:
        """`token_ids`: the answer so far."""
        self._compiling = compiling
        self._token_ids = list(token_ids)
        """What the matcher has yet to be told."""
        self._matcher: LLMatcher | None = None
        self._failure: Exception | None = None
        self._latest_s = time.monotonic() + PATIENCE_S

    @property
    def is_ready(self) -> bool:
        """Asking for the matcher does not wait."""
        return self._compiling.done() or time.monotonic() > self._latest_s

    @property
    def matcher(self) -> LLMatcher:
        """The matcher, told of the answer so far.

        Raises:
            InvalidRequest: the constraint does not compile, or became too costly.
            RequestFailed: it took too long to compile, or the answer so far does not meet it.
        """
        if self._failure is not None:
            raise self._failure
        if self._matcher is None:
            try:
                self._matcher = self._compiling.result(timeout=0).deep_copy()
            except TimeoutError:
                self._failure = RequestFailed(f"the constraint was not compiled within {PATIENCE_S:.0f} s")
                raise self._failure from None
            for token_id in self._token_ids:
                self.advance(token_id)
            if self._failure is not None:
                raise self._failure
        return self._matcher

    @property
    def is_over(self) -> bool:
        """The constraint is met and allows nothing more."""
        matcher = self._matcher
        return matcher is not None and self._failure is None and matcher.is_stopped()

    def advance(self, token_id: int) -> None:
        """The answer grew by this token."""
        if self._matcher is None:
            self._token_ids.append(token_id)
        elif not self._matcher.consume_token(token_id) and self._failure is None:
            self._failure = _too_complex(self._matcher.get_error())
            if "satisfy" in self._matcher.get_error():
                self._failure = RequestFailed(f"the answer left its constraint at token {token_id}")

    def check(self) -> None:
        """To be called after a mask was computed.

        Raises:
            InvalidRequest: that cost more than a step may.
        """
        if self._matcher is not None and self._matcher.is_error():
            self._failure = _too_complex(self._matcher.get_error())
            raise self._failure


def _too_complex(told: str) -> InvalidRequest:
    words = " ".join(told.replace("<non-verbose/>", "").split())[:200]
    return InvalidRequest(f"the constraint is too complex: {words}", param="constraint")


class Guides:
    """Compiles the constraints of one model beside its steps, each once.

    Args:
        tokens: gives the model's tokens; called once, when the first constraint comes.
    """

    def __init__(self, tokens: Callable[[], LLTokenizer]) -> None:
        self._open_tokens = tokens
        self._tokens: LLTokenizer | None = None
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="constraints")
        self._compiled: OrderedDict[Constraint, Future[LLMatcher]] = OrderedDict()

    def open(self, constraint: Constraint, token_ids: Sequence[int]) -> Guide:
        """A guide for an answer that has come so far. Never waits."""
        compiling = self._compiled.get(constraint)
        if compiling is None:
            compiling = self._compiled[constraint] = self._threads.submit(self._compile, constraint)
            while len(self._compiled) > CACHED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(constraint)
        return Guide(compiling, token_ids)

    def close(self) -> None:
        """End the thread; what is not compiled yet will not be."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _compile(self, constraint: Constraint) -> LLMatcher:
        if self._tokens is None:
            self._tokens = self._open_tokens()
        return compiled(constraint, self._tokens)


def guides_of(checkpoint: Path, *, vocab_size: int, eos_token_ids: Iterable[int]) -> Guides:
    """For the model of a checkpoint; its tokenizer is read when the first constraint comes."""
    eos = frozenset(eos_token_ids)
    return Guides(lambda: open_tokens(checkpoint, vocab_size=vocab_size, eos_token_ids=eos))
