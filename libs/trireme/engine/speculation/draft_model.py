"""Drafts from a smaller model, made before the target's step.

It reads a sequence when it is first asked for it, and what others have given since when it is asked again. It
drafts the likeliest token, at every temperature, as long as another step of it pays.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from trireme.engine.speculation.draft_readers import SOURCE, DraftReaders, Reader, mark_of
from trireme.engine.speculation.proposals import NOTHING, Proposal, Want
from trireme.policies.speculation import Mark, SpeculationController

_READ_AT_ONCE: Final = 512
"""Tokens that the model reads in one step before it drafts."""


@dataclass(slots=True, eq=False)
class Live:
    """A sequence that is drafted for now."""

    want: Want
    reader: Reader
    drafted: list[int] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    together: float = 1.0


class ModelDrafter:
    """Meets `Drafter`.

    Args:
        readers: the draft model's.
        controller: asked whether a step pays, and told what it took.
        clock: seconds.
    """

    def __init__(
        self,
        readers: DraftReaders,
        controller: SpeculationController,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.readers = readers
        self.controller = controller
        self.clock = clock

    def propose(self, wants: Sequence[Want], *, batch: int) -> list[Proposal]:
        controller = self.controller
        live = self.ready_to_draft(wants, batch)
        entries = {entry.want.sequence_id: entry for entry in live}
        while live:
            chances = [e.together * controller.source_chance(SOURCE, e.want.is_greedy) for e in live]
            if not controller.pays_to_draft(chances, batch=batch):
                break
            self._step(live)
            live = [entry for entry in live if self._may_go_on(entry)]
        return [
            NOTHING
            if (entry := entries.get(want.sequence_id)) is None
            else Proposal(tuple(entry.drafted), tuple(entry.marks), tuple(entry.chances))
            for want in wants
        ]

    def ready_to_draft(self, wants: Sequence[Want], batch: int) -> list[Live]:
        """Sequences to draft for that are read but for their last few tokens."""
        wants = self._worth_reading(wants, batch)
        return self._read([entry for want in wants if (entry := self._open(want, batch)) is not None])

    def _worth_reading(self, wants: Sequence[Want], batch: int) -> Sequence[Want]:
        """Those to draft for, before anything is read for it; few, until it is known what that takes."""
        controller = self.controller
        if controller.draft_s(1) is None and controller.settings.fixed_tokens is None:
            wants = wants[:1]
        chances = [controller.source_chance(SOURCE, want.is_greedy) for want in wants]
        return wants if controller.pays_to_draft(chances, batch=batch) else ()

    def observe(self, sequence_id: str, marks: Sequence[Mark], num_right: int) -> None:
        pass  # the controller knows all that is learnt of a model

    def forget(self, sequence_id: str) -> None:
        self.readers.forget(sequence_id)

    def close(self) -> None:
        pass  # nothing runs between two calls

    def _open(self, want: Want, batch: int) -> Live | None:
        """The sequence's reader, set back to where it agrees with the sequence."""
        history = want.history
        if len(history) + want.most > self.readers.most:
            return None
        reader = self.readers.find(want.sequence_id)
        if reader is None:
            if not self.controller.pays_to_read(
                len(history), left_tokens=want.left, batch=batch, is_greedy=want.is_greedy
            ):
                return None
            reader = self.readers.open(want.sequence_id)
        reader.set_back(history, len(history))
        return Live(want, reader)

    def _read(self, live: list[Live]) -> list[Live]:
        """Read all but the last token of each; who is not done with that has to wait for the next time."""
        unread = [(entry, len(entry.want.history) - 1 - len(entry.reader.tokens)) for entry in live]
        room = _READ_AT_ONCE
        kept = {entry.want.sequence_id for entry in live}
        chunks: list[tuple[Reader, Sequence[int]]] = []
        ready: list[Live] = []
        for entry, count in unread:
            reader = entry.reader
            # The last few go with the first drafting step.
            if count < 8:
                ready.append(entry)
                continue
            taken = min(count, room)
            start = len(reader.tokens)
            if not taken or not self.readers.hold(reader, start + taken, keep=kept):
                continue
            chunks.append((reader, entry.want.history[start : start + taken]))
            room -= taken
            if taken == count:
                ready.append(entry)
        if chunks:
            started_s = self.clock()
            self.readers.read(chunks)
            self.controller.observe_read(self.clock() - started_s)
        return ready

    def _step(self, live: list[Live]) -> None:
        """Every live sequence gets one more drafted token, or leaves the drafted as they are."""
        started_s = self.clock()
        kept = {entry.want.sequence_id for entry in live}
        chunks: list[tuple[Reader, Sequence[int]]] = []
        served: list[Live] = []
        for entry in live:
            reader = entry.reader
            tokens = [*entry.want.history[len(reader.tokens) :], *entry.drafted]
            if entry.drafted:
                tokens = entry.drafted[-1:]
            if self.readers.hold(reader, len(reader.tokens) + len(tokens), keep=kept):
                chunks.append((reader, tokens))
                served.append(entry)
            else:
                entry.together = 0.0
        if not served:
            return
        for entry, ((token, share),) in zip(served, self.readers.follow(chunks), strict=True):
            if not 0.0 <= share <= 1.0:  # scores that are not numbers
                entry.together = 0.0
                continue
            mark = mark_of(share, is_greedy=entry.want.is_greedy)
            chance = self.controller.chance(mark)
            entry.drafted.append(token)
            entry.marks.append(mark)
            entry.chances.append(chance)
            entry.together *= chance
        self.controller.observe_draft_step(len(served), self.clock() - started_s)

    @staticmethod
    def _may_go_on(entry: Live) -> bool:
        return entry.together > 0.0 and len(entry.drafted) < entry.want.most
