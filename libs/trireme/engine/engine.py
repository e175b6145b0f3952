"""The step loop: decide, compute, sample, report.

Single-threaded: whoever owns the engine calls all of its methods from one thread. A failure
of one sequence ends that one; the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq

import torch

from trireme.constraints.guide import Guides
from trireme.engine import admission
from trireme.engine.batch import Computed, Drafts, compute
from trireme.engine.decode_graphs import DecodeGraphs
from trireme.engine.device_choice import chooser_of
from trireme.engine.graph_capture import Capturer, capturer_of
from trireme.engine.hidden_states import Progress, take_hidden, tell_prompt_logprobs
from trireme.engine.kv_cache import KvCache
from trireme.engine.kv_copies import CopyFailed, Link
from trireme.engine.kv_cuts import cut
from trireme.engine.kv_preloads import KvPreloads, LayersNeeded
from trireme.engine.outputs import EngineStats, FinishReason, StepResult, TokenOutput, not_a_number
from trireme.engine.request import Mode, SequenceRequest
from trireme.engine.roster import Roster
from trireme.engine.sampling import Sampled
from trireme.engine.sequence import Sequence
from trireme.engine.settings import EngineSettings
from trireme.engine.speculation.proposals import Drafter
from trireme.engine.speculation.rejected_slots import clear_behind, close_up
from trireme.engine.speculation.speculator import speculator_of
from trireme.engine.speculation.token_tree import NO_TOKENS
from trireme.engine.statistics import stats_of
from trireme.engine.stored_blocks import OnSaved, Room, StoredBlock, let_go_of
from trireme.engine.tally import StepReport, Tally
from trireme.engine.tier import KvTier
from trireme.engine.token_choice import Chooser, Choosing
from trireme.errors import InvalidConfiguration, RequestConflict, RequestFailed, TriremeError
from trireme.kernels.static_decodes import spare_blocks
from trireme.models.model import Model

_COPY_WAIT_S = 0.002
"""Longest rest of a step that has nothing to run until a copy is done."""


class Engine:
    """Continuous batching over paged KV.

    Args:
        model: what computes.
        settings: sizes and policy.
        kv_tier: told which blocks become resident and which leave.
        eos_token_ids: tokens that end an answer; None: those of the model's configuration.
        model_key: identifies the weights, for the root of block hashes.
        preload_layers: layers of a stored prefix that must be loaded before its sequence may run, or
            the rule for it; the others are loaded while earlier ones compute.
        link: a modelled link between device and host memory.
        clock: seconds; read at the start and end of a step.
        draft: a smaller model with the same tokens, that drafts where the settings speculate.
        drafters: others that draft.
        guides: compile the constraints of requests; None: those with a constraint are refused.
        chooser: chooses tokens from scores; None: the one for the model's device.
        capturer: captures graphs of decode steps; None: the one for the model's device, where there is one.

    Raises:
        InvalidConfiguration: `max_model_len` exceeds what the model or the blocks can hold, or the draft
            model has other tokens.
    """

    def __init__(
        self,
        model: Model,
        settings: EngineSettings,
        kv_tier: KvTier | None = None,
        *,
        eos_token_ids: frozenset[int] | None = None,
        model_key: str = "",
        preload_layers: int | LayersNeeded = 1,
        link: Link | None = None,
        clock: Callable[[], float] = time.perf_counter,
        draft: Model | None = None,
        drafters: Seq[Drafter] = (),
        guides: Guides | None = None,
        chooser: Chooser | None = None,
        capturer: Capturer | None = None,
    ) -> None:
        possible = min(model.max_positions, settings.num_blocks * settings.block_size)
        if settings.max_model_len is not None and settings.max_model_len > possible:
            held = settings.num_blocks * settings.block_size
            raise InvalidConfiguration(
                f"max_model_len is {settings.max_model_len}, but the model has {model.max_positions} "
                f"positions and the blocks hold {held} tokens"
            )
        self.model = model
        self.settings = settings
        self.model_key = model_key
        self.max_model_len = settings.max_model_len or possible
        self.eos_token_ids = frozenset(model.config.eos_token_ids) if eos_token_ids is None else eos_token_ids
        self._guides = guides
        self._clock = clock
        capturer = capturer or (capturer_of(model) if settings.decode_graphs else None)
        self._cache = KvCache(
            model,
            num_blocks=settings.num_blocks,
            block_size=settings.block_size,
            kv_dtype=settings.kv_dtype,
            host_blocks=settings.host_blocks,
            max_model_len=self.max_model_len,
            shares=settings.prefix_cache,
            tier=kv_tier,
            link=link,
            spare_blocks=spare_blocks(settings.max_num_seqs, settings.block_size) if capturer else 0,
        )
        self._graphs: DecodeGraphs | None = None
        if capturer is not None:
            self._graphs = DecodeGraphs(
                model, self._cache, capturer, max_rows=settings.max_num_seqs, max_tokens=self.max_model_len
            )
        self._chooser = chooser or chooser_of(
            model.device, vocab_size=model.config.vocab_size, most_sequences=settings.max_num_seqs
        )
        self._preloads = KvPreloads(self._cache, preload_layers)
        self._tally = Tally()
        self._roster = Roster(self._cache, self._preloads, settings, self._tally)
        self._speculator = speculator_of(
            self._cache,
            model,
            settings,
            max_model_len=self.max_model_len,
            draft=draft,
            drafters=drafters,
            clock=clock,
        )
        self._requests: dict[str, list[Sequence]] = {}
        """The open sequences of each request; several for SCORE."""
        self._ready: list[TokenOutput] = []
        """Ends that need no step."""
        self._unguided: list[Sequence] = []
        """Their constraints are being compiled; nobody waits behind them."""

    @property
    def kv_layout(self) -> str:
        """Shape, type and version of an exported block's bytes; part of the root of block hashes."""
        return self._cache.memory.layout

    @property
    def has_work(self) -> bool:
        """A step would do something."""
        return bool(self._requests or self._ready)

    def add(
        self, request: SequenceRequest, *, stored: Seq[StoredBlock] = (), awaited_tokens: int = 0
    ) -> None:
        """Let a sequence wait for its turn.

        Args:
            stored: blocks of its prefix that a lower tier holds: see `preload`. They are let go if
                this raises.
            awaited_tokens: leading tokens whose blocks are about to be offered: if there are any, the
                sequence keeps its place but does not run before `preload` is called for it.

        Raises:
            InvalidRequest: a token id or a parameter cannot be served; nothing was added.
            ContextLengthExceeded: the prompt does not fit the context; nothing was added.
            RequestConflict: a sequence of this id is here already.
        """
        try:
            if request.sequence_id in self._requests:
                raise RequestConflict(f"sequence {request.sequence_id} is here already", param="sequence_id")
            admission.check(
                request,
                self.model.config,
                max_model_len=self.max_model_len,
                can_guide=self._guides is not None,
            )
            sequences = admission.sequences_of(
                request,
                self.model,
                eos_token_ids=self.eos_token_ids,
                max_model_len=self.max_model_len,
                block_size=self.settings.block_size,
                guides=self._guides,
            )
        except Exception:
            let_go_of(stored)
            raise
        first = sequences[0]
        if first.mode is Mode.GENERATE and first.num_outputs:
            reason = self._finish_reason(first, request.delivered_token_ids[-1])
            if reason is not None:
                dropped = None if first.window is None else first.window.dropped_at_end()
                self._ready.append(
                    TokenOutput(
                        request.sequence_id, first.num_outputs, None, None, (), reason, None, 0, dropped
                    )
                )
                let_go_of(stored)
                return
        self._requests[request.sequence_id] = sequences
        self._preloads.offer(first, stored)
        for sequence in sequences:
            sequence.awaited_tokens = min(awaited_tokens, sequence.reusable_tokens)
            if sequence.awaits_guide:
                self._unguided.append(sequence)
            else:
                self._roster.add(sequence)

    def preload(self, sequence_id: str, stored: Seq[StoredBlock]) -> bool:
        """Load blocks of a waiting sequence's prefix from a lower tier, beside the steps.

        The leading blocks that are not resident are copied, checked, and brought in layer by layer;
        the sequence may run once `preload_layers` are there. A short or damaged one ends the
        prefix before it: what follows is computed. Loading begins with a step that has room.

        Returns:
            False, and all are let go: the sequence is not here, or does not wait without KV.
        """
        sequences = self._requests.get(sequence_id)
        if sequences is None:
            let_go_of(stored)
            return False
        for sequence in sequences:
            sequence.awaited_tokens = 0
        return self._preloads.offer(sequences[0], stored)

    def upcoming(self) -> Iterator[tuple[str, float]]:
        """Sequences that wait, next first, and the seconds until each is expected to run; lazily.

        To be walked between two calls of other methods. Of those that were added since the last step
        nothing is said yet.
        """
        now_s = self._clock()
        for sequence in self._roster.upcoming():
            yield sequence.request.sequence_id, self._roster.next_use_s(sequence, now_s=now_s)

    def cancel(self, sequence_id: str) -> bool:
        """Drop a sequence before the next step; it gets no further output. False if it is not here."""
        self._ready, before = [o for o in self._ready if o.sequence_id != sequence_id], len(self._ready)
        sequences = self._requests.pop(sequence_id, None)
        if sequences is None:
            return len(self._ready) < before
        for sequence in sequences:
            self._drop(sequence)
        return True

    def missing_prefix(self, request: SequenceRequest) -> tuple[bytes, ...]:
        """Hashes of the request's blocks that could be reused but are not resident, in order."""
        computes_all = request.mode is Mode.EMBED or request.sampling.prompt_logprobs is not None
        if computes_all or not self.settings.prefix_cache:
            return ()
        token_ids = [*request.prompt_token_ids, *request.delivered_token_ids]
        hashes = request.chain.extend((), token_ids[:-1], self.settings.block_size)
        return tuple(block_hash for block_hash in hashes if self._cache.pool.find(block_hash) is None)

    def import_block(self, block_hash: bytes, payload: bytes | memoryview) -> bool:
        """Make a block resident from another tier's bytes, oldest prefix first.

        False, a miss, if the bytes do not have this layout's length or every block is held.
        """
        return self._cache.import_block(block_hash, payload)

    def export_block(self, block_hash: bytes) -> bytes | None:
        """A resident block's bytes in `kv_layout`; None if it is not resident."""
        return self._cache.export_block(block_hash)

    def save(self, block_hashes: Seq[bytes], room_for: Room | None = None, *, on_saved: OnSaved) -> int:
        """Copy resident blocks out for a lower tier, layer by layer, beside the steps.

        Args:
            room_for: where each block's bytes go, on the copy's thread; None: into memory of their own.
            on_saved: called once, usually on the copy's thread, with the blocks that are out, whole. It
                should do little and must not raise.

        Returns:
            How many of the blocks are resident.
        """
        self._cache.copies.poll()
        return self._cache.save(block_hashes, room_for, on_saved)

    def poll(self) -> None:
        """Take note of copies that are over; every step begins with it. Never waits."""
        self._cache.copies.poll()

    def close(self) -> None:
        """End the threads of the copies. What was not copied is lost; the engine takes no step again."""
        if self._speculator is not None:
            self._speculator.close()
        self._cache.copies.close()
        self._cache.copies.poll()
        if self._guides is not None:
            self._guides.close()

    def stats(self) -> EngineStats:
        """Gauges and counters."""
        return stats_of(self._cache, self._roster, self._tally)

    @torch.inference_mode()
    def step(self) -> StepResult:
        """One iteration. Never raises for a sequence's fault: that sequence ends with an error."""
        started_s = self._clock()
        report = StepReport(self._ready)
        num_ready = len(self._ready)
        self._ready = []
        self._cache.copies.poll()
        if self._unguided:
            self._take_guided()
        parts = self._roster.schedule(report, now_s=started_s)
        if parts:
            report.computing(parts)
            drafts = self._speculator.propose(parts) if self._speculator is not None else {}
            report.verifying(drafts)
            computed, faults = compute(self.model, self._cache, parts, drafts, self._graphs)
            if self._graphs is not None:
                self._tally.graph_steps = self._graphs.steps
            for fault in faults:
                if isinstance(fault.error, CopyFailed):
                    self._roster.preempt(fault.sequence)
                else:
                    self._fail(fault.sequence, fault.error, report)
            for batch in computed:
                self._absorb(batch, report)
        elif not report.outputs:
            self._cache.copies.wait(_COPY_WAIT_S)
        ended_s = self._clock()
        if parts and self._speculator is not None:
            self._speculator.end_step(ended_s - started_s, num_tokens=len(report.outputs) - num_ready)
        self._roster.charge(ended_s - started_s, report, now_s=ended_s)
        return report.result(self._tally, ended_s - started_s)

    def _take_guided(self) -> None:
        """Those whose constraints are compiled wait for their turn now."""
        waiting, self._unguided = self._unguided, []
        for sequence in waiting:
            if sequence.awaits_guide:
                self._unguided.append(sequence)
            else:
                self._roster.add(sequence)

    def _absorb(self, batch: Computed, report: StepReport) -> None:
        """Take over what was computed: more KV, tokens, scores, vectors."""
        choosing = self._begin_choosing(batch)  # so that the device has work while the host goes on
        token = 0
        for sequence, count in batch.parts:
            first, token = token, token + count + len(batch.drafts.get(sequence, ()))
            if sequence.row < 0:  # another continuation of its request has failed in this step
                continue
            start = sequence.num_computed
            self._advance(sequence, count)
            if sequence.is_replaying and sequence.num_computed == len(sequence.token_ids):
                self._go_on_replaying(sequence)
            elif sequence.prompt_logprobs is not None or sequence.mode is not Mode.GENERATE:
                self._take_hidden(sequence, batch.hidden[first : first + count], start, report)
        if batch.logits is not None:
            self._choose(batch.sampling, batch.drafts, batch.logits, choosing, report)

    def _advance(self, sequence: Sequence, count: int) -> None:
        """So many more of its tokens are computed."""
        sequence.num_computed += count
        sequence.most_computed = max(sequence.most_computed, sequence.num_computed)
        self._cache.commit(sequence)

    def _begin_choosing(self, batch: Computed) -> Choosing | None:
        """None: there is nothing to choose, or it failed: `_choose` begins again, and finds out for whom."""
        if batch.logits is None:
            return None
        try:
            return self._choosing(batch.sampling, batch.drafts, batch.logits)
        except Exception:
            return None

    def _choosing(self, sequences: list[Sequence], drafts: Drafts, logits: torch.Tensor) -> Choosing:
        states = [sequence.state for sequence in sequences if sequence.state is not None]
        drafted = [drafts.get(sequence, NO_TOKENS) for sequence in sequences] if drafts else []
        return self._chooser.begin(logits, states, drafted if any(drafted) else ())

    def _choose(
        self,
        sequences: list[Sequence],
        drafts: Drafts,
        logits: torch.Tensor,
        choosing: Choosing | None,
        report: StepReport,
    ) -> None:
        """Take over what was chosen; if that raises, sequence by sequence, so that only the culprit ends."""
        try:
            choices = (choosing or self._choosing(sequences, drafts, logits)).wait()
        except Exception as error:
            if len(sequences) == 1:
                self._fail(sequences[0], error, report)
                return
            row = 0
            for sequence in sequences:
                end = row + 1 + len(drafts.get(sequence, NO_TOKENS))
                self._choose([sequence], drafts, logits[row:end], None, report)
                row = end
            return
        row = 0
        for index, sequence in enumerate(sequences):
            draft = drafts.get(sequence) if drafts else None
            if sequence.row < 0:  # What was asked of its prompt has failed in this step.
                row += len(draft) if draft is not None else 0
            elif draft:
                sampled = choices.sampled[row : row + len(draft) + 1]
                self._verify(sequence, sampled, choices.paths[index], report)
                row += len(draft)
            elif choices.sampled[row].token_id < 0:
                self._fail(sequence, not_a_number(), report)
            else:
                self._emit(sequence, choices.sampled[row], report)
            row += 1

    def _verify(self, sequence: Sequence, choices: list[Sampled], path: Seq[int], report: StepReport) -> None:
        """Take the chosen tokens up to the first that no drafted one is, or that ends the answer.

        A choice was drawn as it is after the drafted tokens up to it, so it counts where they were right:
        those of `path`.
        """
        close_up(self._cache, sequence, path)
        for num_right, place in enumerate((-1, *path)):
            if num_right:
                self._advance(sequence, 1)
            choice = choices[place + 1]
            if choice.token_id < 0:
                report.accepted(sequence, num_right)
                self._fail(sequence, not_a_number(), report)
                return
            if not self._emit(sequence, choice, report):
                report.accepted(sequence, num_right)
                return
        report.accepted(sequence, len(path))
        if any(choice.token_id < 0 for choice in choices):
            clear_behind(self._cache, sequence)
        if self._speculator is not None:
            self._speculator.observe(sequence, path)

    def _emit(self, sequence: Sequence, choice: Sampled, report: StepReport) -> bool:
        """The answer grows by a token; True if it goes on."""
        index = sequence.num_outputs
        sequence.choose(choice.token_id)
        sequence.has_answered = True
        if sequence.state is not None:
            sequence.state.observe(choice.token_id)
        finish_reason = self._finish_reason(sequence, choice.token_id)
        window = sequence.window
        if finish_reason is None and window is not None and len(sequence.token_ids) >= window.rule.window:
            self._cut(sequence)
        report.outputs.append(
            TokenOutput(
                sequence.sequence_id,
                index,
                choice.token_id,
                choice.logprob,
                choice.top_logprobs,
                finish_reason,
                None,
                sequence.cached_tokens,
                None if window is None else window.news_of_dropped(),
                tell_prompt_logprobs(sequence),
            )
        )
        sequence.cached_tokens = None
        self._tally.output_tokens += 1
        if finish_reason is not None:
            self._end(sequence)
        return finish_reason is None

    def _finish_reason(self, sequence: Sequence, last_token: int) -> FinishReason | None:
        """Whether the answer, whose last token this is, ends here."""
        params = sequence.request.sampling
        if sequence.num_outputs >= params.min_tokens and last_token in sequence.stop_ids:
            return FinishReason.STOP
        guide = None if sequence.state is None else sequence.state.guide
        if guide is not None and guide.is_over:
            return FinishReason.STOP
        is_full = sequence.window is None and len(sequence.token_ids) >= self.max_model_len
        return FinishReason.LENGTH if is_full or sequence.num_outputs >= params.max_tokens else None

    def _go_on_replaying(self, sequence: Sequence) -> None:
        """The window is as full as it was when its next token was chosen."""
        assert sequence.window is not None
        sequence.token_ids.append(sequence.window.history[len(sequence.token_ids) + sequence.window.dropped])
        self._cut(sequence)

    def _cut(self, sequence: Sequence) -> None:
        if not cut(self._cache, sequence):
            self._roster.preempt(sequence)

    def _take_hidden(self, sequence: Sequence, hidden: torch.Tensor, start: int, report: StepReport) -> None:
        """A chunk of a sequence of whose prompt something is asked: see `take_hidden`."""
        try:
            progress = take_hidden(self.model, sequence, hidden, start, report)
        except Exception as error:
            self._fail(sequence, error, report)
            return
        if progress is Progress.ANSWERED:
            self._end(sequence)
        elif progress is Progress.ENDED:
            self._roster.remove(sequence)

    def _end(self, sequence: Sequence) -> None:
        """The request is answered."""
        self._drop(sequence)
        del self._requests[sequence.request.sequence_id]
        self._tally.finished += 1

    def _fail(self, sequence: Sequence, error: Exception, report: StepReport) -> None:
        """End the request, and all its sequences, with an error; nothing it wrote is kept."""
        request_id = sequence.request.sequence_id
        sequences = self._requests.pop(request_id, None)
        if sequences is None:
            return
        named = error if isinstance(error, TriremeError) else RequestFailed(f"the engine failed: {error!r}")
        report.outputs.append(
            TokenOutput(request_id, sequence.num_outputs, None, None, (), FinishReason.ERROR, named)
        )
        for member in sequences:
            self._cache.scrub(member)
            self._drop(member)
        self._tally.errors += 1

    def _drop(self, sequence: Sequence) -> None:
        """It ends, wherever it stands."""
        if sequence in self._unguided:
            self._unguided.remove(sequence)
        self._roster.remove(sequence)
        if sequence.state is not None:
            self._chooser.forget(sequence.state)
        if self._speculator is not None:
            self._speculator.forget(sequence.sequence_id)
