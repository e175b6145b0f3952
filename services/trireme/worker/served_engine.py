"""One engine that serves, and what of it the worker hears; runs in the engine process."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat

from trireme.engine import EncoderEngine, Engine, SequenceWork, StepResult, StoredBlock, TokenOutput
from trireme.engine.stored_blocks import let_go_of
from trireme.errors import TriremeError
from trireme.wire.bus.v1.facts_pb2 import AdmittedRequest
from trireme.worker.awaited_prefixes import AwaitedPrefixes
from trireme.worker.engine_messages import Awaited
from trireme.worker.preload_rule import PreloadRule
from trireme.worker.sequence_requests import sequences_of
from trireme.worker.step_news import Chain, Ending, EngineFigures, Output, StepNews, Turn, Work

_FIGURES = EngineFigures._fields
TURNS_S = 0.1
"""Least time between two steps whose turns the worker hears of: there may be some at every step."""
MAX_TURNS = 8


class ResidencyLog:
    """Meets the engine's `KvTier`: notes which blocks came or left since it was last asked."""

    def __init__(self) -> None:
        self._is_resident: dict[bytes, bool] = {}
        self._cut: dict[str, Sequence[bytes]] = {}

    def match(self, hashes: Sequence[bytes]) -> int:
        return 0  # the worker asks the store itself, before it adds a sequence

    def on_cached(self, block_hash: bytes) -> None:
        self._is_resident[block_hash] = True

    def on_evicted(self, block_hash: bytes, export: Callable[[], bytes]) -> None:
        self._is_resident[block_hash] = False

    def on_cut(self, sequence_id: str, hashes: Sequence[bytes]) -> None:
        self._cut[sequence_id] = hashes

    def take_cut(self) -> dict[str, Sequence[bytes]]:
        """Hashes of the blocks of cut sequences that have completed some."""
        taken, self._cut = self._cut, {}
        return taken

    def take(self) -> tuple[bytes, bytes]:
        """Hashes, joined, of the blocks that came, and of those that left: as they are now."""
        if not self._is_resident:
            return b"", b""
        notes, self._is_resident = self._is_resident, {}
        came = b"".join([block for block, resident in notes.items() if resident])
        left = b"".join([block for block, resident in notes.items() if not resident])
        return came, left


class ServedEngine:
    """An engine whose sequences the worker knows by handles.

    Args:
        rule: told what its steps take.
        patience_s: how long a sequence whose turn is near waits for stored blocks that were announced.
    """

    def __init__(
        self,
        variant: str,
        engine: Engine | EncoderEngine,
        residency: ResidencyLog,
        rule: PreloadRule | None = None,
        *,
        patience_s: float = 0.5,
    ) -> None:
        self.variant = variant
        self.engine = engine
        self._residency = residency
        self._rule = rule
        self._awaited = AwaitedPrefixes(patience_s=patience_s)
        self.is_stuck = False
        """It has work, but its last step had nothing that could run."""
        self._handles: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._is_busy = False
        """It had work at its last turn."""
        self._told_turns_s = -TURNS_S

    @property
    def wants_a_turn(self) -> bool:
        """It has work, or has just lost the last of it."""
        return self._is_busy or self.engine.has_work

    def add(
        self,
        request: AdmittedRequest,
        sequences: Sequence[tuple[int, int]],
        *,
        awaited_tokens: int = 0,
        initial_queue: int = 1,
    ) -> None:
        """Let (choice, handle) of a request wait for their turn, and for stored blocks of so many tokens.

        Raises:
            TriremeError: the engine refuses one of them; none was added.
        """
        added: list[int] = []
        try:
            waited_s = max(0.0, time.time() - request.admitted_unix_s) if request.admitted_unix_s else 0.0
            wanted = sequences_of(
                request,
                [choice for choice, _ in sequences],
                initial_queue=initial_queue,
                arrival_s=time.perf_counter() - waited_s,
            )
            for (_, handle), sequence in zip(sequences, wanted, strict=True):
                self.engine.add(sequence, awaited_tokens=awaited_tokens)
                if awaited_tokens:
                    self._awaited.add(sequence.sequence_id)
                self._handles[sequence.sequence_id] = handle
                self._names[handle] = sequence.sequence_id
                added.append(handle)
        except TriremeError:
            self.cancel(added)
            raise

    def cancel(self, handles: Iterable[int]) -> None:
        """Drop sequences; those that ended meanwhile are no matter."""
        for handle in handles:
            name = self._names.pop(handle, None)
            if name is not None:
                del self._handles[name]
                self._awaited.discard(name)
                self.engine.cancel(name)

    def offer(self, handles: Sequence[int], stored: Sequence[StoredBlock]) -> None:
        """The blocks that sequences of one prompt await: the first loads them, the others share them."""
        names = [self._names[handle] for handle in handles if handle in self._names]
        if not names:
            let_go_of(stored)
        for name, blocks in zip(names, [stored, *repeat((), len(names) - 1)], strict=False):
            self._awaited.discard(name)
            self.engine.preload(name, blocks)

    def awaited(self, *, now_s: float) -> Awaited | None:
        """Who awaits stored blocks, in the order of their turns, where that is news."""
        if not self._awaited:
            return None
        for name in self._awaited.overdue(now_s=now_s):
            self.engine.preload(name, ())
        order = self._awaited.look(self.engine.upcoming(), now_s=now_s)
        if order is None:
            return None
        return Awaited(self.variant, tuple([(self._handles[name], use_s) for name, use_s in order]))

    def turn(self) -> StepNews | None:
        """One step; None where there was nothing to do and nothing changed.

        A cancel takes the last sequence without a step: what is told of load must follow.
        """
        if self.engine.has_work:
            self._is_busy = True
            result = self.engine.step()
            was_stuck, self.is_stuck = self.is_stuck, not (result.work or result.outputs)
            return self._news(result) if not (was_stuck and self.is_stuck) else None
        self.is_stuck = False
        if self._is_busy:
            self._is_busy = False
            return self.standing()
        return None

    def standing(self) -> StepNews:
        """What the engine is now, without a step."""
        came, left = self._residency.take()
        return StepNews(variant=self.variant, figures=self._figures(), came=came, left=left)

    def _news(self, result: StepResult) -> StepNews:
        handles = self._handles
        tokens = array("q")
        outputs: list[Output] = []
        plain: set[str] = set()
        token_s = next((work.seconds for work in result.work if _is_one_token(work)), 0.0)
        costs = {work.sequence_id for work in result.work if _is_one_token(work) and work.seconds == token_s}
        for output in result.outputs:
            name = output.sequence_id
            handle = handles.get(name)
            if handle is None:
                continue
            if _is_plain(output) and name in costs:
                tokens.extend((handle, output.index, output.token_id))  # type: ignore[arg-type]
                plain.add(name)
            else:
                outputs.append(_rare(handle, output))
        prefill_tokens, prefill_s = 0, 0.0
        work: list[Work] = []
        for cost in result.work:
            if cost.prefill_tokens:
                prefill_tokens += cost.prefill_tokens
                prefill_s += cost.seconds
            if cost.sequence_id not in plain and cost.sequence_id in handles:
                work.append(Work(handles[cost.sequence_id], cost.seconds))
        turns = self._turns(result) if result.events else ()
        chains = tuple(
            [
                Chain(handles[name], b"".join(hashes))
                for name, hashes in self._residency.take_cut().items()
                if name in handles
            ]
        )
        if self._rule is not None:
            self._rule.note(prefill_tokens, prefill_s)
        endings = self._endings(result)
        for end in outputs:
            if end.finish_reason is not None:
                self._forget(end.handle)
        came, left = self._residency.take()
        return StepNews(
            variant=self.variant,
            figures=self._figures(),
            seconds=result.seconds,
            prefill_tokens=prefill_tokens,
            prefill_s=prefill_s,
            tokens=tokens,
            token_s=token_s,
            outputs=tuple(outputs),
            work=tuple(work),
            endings=endings,
            turns=turns,
            chains=chains,
            came=came,
            left=left,
        )

    def _turns(self, result: StepResult) -> tuple[Turn, ...]:
        now_s = time.monotonic()
        if now_s - self._told_turns_s < TURNS_S:
            return ()
        self._told_turns_s = now_s
        known = [event for event in result.events if event.sequence_id in self._handles]
        return tuple(
            [
                Turn(self._handles[event.sequence_id], event.kind.value, event.reason)
                for event in known[:MAX_TURNS]
            ]
        )

    def _endings(self, result: StepResult) -> tuple[Ending, ...]:
        found = [
            (score.sequence_id, Ending(0, scores=score.logprobs, cached_tokens=score.cached_tokens))
            for score in result.scores
        ]
        found += [(vector.sequence_id, Ending(0, embedding=vector.vector)) for vector in result.embeddings]
        endings = []
        for name, ending in found:
            handle = self._handles.get(name)
            if handle is not None:
                endings.append(ending._replace(handle=handle))
                self._forget(handle)
        return tuple(endings)

    def _forget(self, handle: int) -> None:
        name = self._names.pop(handle, None)
        if name is not None:
            del self._handles[name]
            self._awaited.discard(name)

    def _figures(self) -> EngineFigures:
        stats = self.engine.stats()
        return EngineFigures._make([getattr(stats, name) for name in _FIGURES])


def _is_one_token(work: SequenceWork) -> bool:
    return work.prefill_tokens == 0 and work.decode_tokens == 1


def _is_plain(output: TokenOutput) -> bool:
    return (
        output.token_id is not None
        and output.finish_reason is None
        and output.logprob is None
        and output.cached_tokens is None
        and output.dropped_tokens is None
        and output.prompt_logprobs is None
    )


def _rare(handle: int, output: TokenOutput) -> Output:
    error = output.error
    return Output(
        handle=handle,
        place=output.index,
        token_id=output.token_id,
        logprob=output.logprob,
        top_logprobs=output.top_logprobs,
        finish_reason=None if output.finish_reason is None else output.finish_reason.value,
        error_code="" if error is None else error.code,
        error_message="" if error is None else error.message,
        cached_tokens=output.cached_tokens,
        dropped_tokens=output.dropped_tokens,
        prompt_logprobs=output.prompt_logprobs,
    )
