"""Embeds and classifies with an encoder: texts in batches, first come first served, nothing cached.

Takes the requests that `Engine` takes, so far as an encoder can answer them, and tells of its steps alike.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq

import torch

from trireme.engine.outputs import (
    EmbeddingOutput,
    EngineStats,
    FinishReason,
    ScoreOutput,
    SequenceWork,
    StepResult,
    TokenOutput,
)
from trireme.engine.request import Mode, SequenceRequest
from trireme.engine.stored_blocks import OnSaved, Room, StoredBlock, let_go_of
from trireme.errors import ContextLengthExceeded, InvalidRequest, RequestConflict, RequestFailed
from trireme.models.encoder import Encoder
from trireme.models.pooling import Pooling

log = logging.getLogger(__name__)

UNBOUNDED_BLOCKS = 1 << 16
"""What is told of room for KV: nothing is kept, so no text is too long for it."""


class EncoderEngine:
    """Batches of whole texts.

    EMBED gives one vector by `pooling`. SCORE gives log-probabilities of classes: a continuation is the one
    number of a class. GENERATE is refused.

    Args:
        model: what computes.
        pooling: how a text's vector is made.
        max_batch_tokens: of one step, unless one text alone has more.
        max_num_seqs: texts of one step.
        model_key: identifies the weights.
        clock: seconds; read at the start and end of a step.
    """

    def __init__(
        self,
        model: Encoder,
        pooling: Pooling,
        *,
        max_batch_tokens: int,
        max_num_seqs: int,
        model_key: str = "",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model = model
        self.model_key = model_key
        self.max_model_len = model.config.max_positions
        self._pooling = pooling
        self._max_batch_tokens = max_batch_tokens
        self._max_num_seqs = max_num_seqs
        self._clock = clock
        self._waiting: deque[SequenceRequest] = deque()
        self._tokens = self._finished = self._errors = self._steps = 0
        self._busy_s = 0.0

    @property
    def has_work(self) -> bool:
        """A step would do something."""
        return bool(self._waiting)

    def add(
        self, request: SequenceRequest, *, stored: Seq[StoredBlock] = (), awaited_tokens: int = 0
    ) -> None:
        """Let a text wait for its turn; there is no KV that stored blocks could bring.

        Raises:
            InvalidRequest: it is to be continued, a token id is none of the vocabulary, or a class is none of
                the checkpoint's.
            ContextLengthExceeded: it has more tokens than there are positions.
            RequestConflict: a text of this id is here already.
        """
        let_go_of(stored)
        if any(waiting.sequence_id == request.sequence_id for waiting in self._waiting):
            raise RequestConflict(f"sequence {request.sequence_id} is here already", param="sequence_id")
        self._check(request)
        self._waiting.append(request)

    def cancel(self, sequence_id: str) -> bool:
        """Drop a text before the next step; False if it is not here."""
        before = len(self._waiting)
        self._waiting = deque(each for each in self._waiting if each.sequence_id != sequence_id)
        return len(self._waiting) < before

    def preload(self, sequence_id: str, stored: Seq[StoredBlock]) -> bool:
        """Let all go: nothing is cached."""
        let_go_of(stored)
        return False

    def upcoming(self) -> Iterator[tuple[str, float]]:
        """Texts that wait, next first; how long is not known."""
        return iter([(waiting.sequence_id, 0.0) for waiting in self._waiting])

    def save(self, block_hashes: Seq[bytes], room_for: Room | None = None, *, on_saved: OnSaved) -> int:
        """There are no blocks."""
        on_saved(())
        return 0

    def poll(self) -> None:
        """There are no copies."""

    @torch.inference_mode()
    def step(self) -> StepResult:
        """Answer the texts at the head of the queue."""
        started_s = self._clock()
        batch = self._take()
        scores: list[ScoreOutput] = []
        embeddings: list[EmbeddingOutput] = []
        failed: list[TokenOutput] = []
        try:
            hidden = self.model.forward([request.prompt_token_ids for request in batch])
            for request, states in zip(batch, hidden, strict=True):
                numbers = self._answer(request, states)
                if not all(map(math.isfinite, numbers)):
                    failed.append(_failure(request, "the model gave values that are not finite"))
                elif request.mode is Mode.SCORE:
                    scores.append(ScoreOutput(request.sequence_id, numbers, 0))
                else:
                    embeddings.append(EmbeddingOutput(request.sequence_id, numbers, 0))
        except (RuntimeError, MemoryError):
            log.exception("encoder_step_failed", extra={"texts": len(batch)})
            scores, embeddings = [], []
            failed = [_failure(request, "the step of this text failed") for request in batch]
        seconds = self._clock() - started_s
        tokens = sum(len(request.prompt_token_ids) for request in batch)
        self._tokens += tokens
        self._finished += len(batch) - len(failed)
        self._errors += len(failed)
        self._steps += 1
        self._busy_s += seconds
        share_s = seconds / max(1, tokens)
        return StepResult(
            outputs=tuple(failed),
            scores=tuple(scores),
            embeddings=tuple(embeddings),
            work=tuple(
                [
                    SequenceWork(
                        request.sequence_id,
                        len(request.prompt_token_ids),
                        0,
                        share_s * len(request.prompt_token_ids),
                    )
                    for request in batch
                ]
            ),
            admitted=tuple([request.sequence_id for request in batch]),
            seconds=seconds,
            reason=f"{len(batch)} texts of {tokens} tokens",
        )

    def stats(self) -> EngineStats:
        """Gauges now, and counters since the engine was built."""
        return EngineStats(
            waiting=len(self._waiting),
            running=0,
            kv_blocks_used=0,
            kv_blocks_total=UNBOUNDED_BLOCKS,
            kv_blocks_cached=0,
            prefix_query_tokens=0,
            prefix_hit_tokens=0,
            prefill_tokens=self._tokens,
            decode_tokens=0,
            output_tokens=0,
            finished=self._finished,
            errors=self._errors,
            preemptions=0,
            recomputed_tokens=0,
            steps=self._steps,
            busy_s=self._busy_s,
        )

    def _check(self, request: SequenceRequest) -> None:
        config = self.model.config
        length = len(request.prompt_token_ids)
        if request.mode is Mode.GENERATE:
            raise InvalidRequest(
                f"a {config.model_type} embeds and classifies; it does not generate text", param="model"
            )
        if not length:
            raise InvalidRequest("the prompt has no tokens", param="prompt_token_ids")
        if min(request.prompt_token_ids) < 0 or max(request.prompt_token_ids) >= config.vocab_size:
            raise InvalidRequest(
                f"prompt_token_ids must be from 0 to {config.vocab_size - 1}", param="prompt_token_ids"
            )
        if length > self.max_model_len:
            raise ContextLengthExceeded(
                f"the text has {length} tokens, but the context holds {self.max_model_len}; shorten it",
                param="prompt_token_ids",
            )
        if request.mode is Mode.SCORE:
            self._check_classes(request.score_continuations)

    def _check_classes(self, continuations: Seq[Seq[int]]) -> None:
        encoder = self.model.config.encoder
        count = 0 if encoder is None else len(encoder.labels)
        if not count:
            raise InvalidRequest(
                "this checkpoint has no head that classifies: ask for vectors", param="labels"
            )
        if not continuations or not all(len(each) == 1 and 0 <= each[0] < count for each in continuations):
            raise InvalidRequest(
                f"each continuation must be one class from 0 to {count - 1}", param="score_continuations"
            )

    def _take(self) -> list[SequenceRequest]:
        batch: list[SequenceRequest] = []
        tokens = 0
        while self._waiting and len(batch) < self._max_num_seqs:
            tokens += len(self._waiting[0].prompt_token_ids)
            if batch and tokens > self._max_batch_tokens:
                break
            batch.append(self._waiting.popleft())
        return batch

    def _answer(self, request: SequenceRequest, states: torch.Tensor) -> tuple[float, ...]:
        if request.mode is Mode.EMBED:
            return tuple(self._pooling.apply(states).tolist())
        head = self.model.head
        assert head is not None, "classes were checked"
        logprobs = head.logprobs(states[:1])[0].tolist()
        return tuple([logprobs[classes[0]] for classes in request.score_continuations])


def _failure(request: SequenceRequest, message: str) -> TokenOutput:
    error = RequestFailed(message)
    return TokenOutput(request.sequence_id, 0, None, finish_reason=FinishReason.ERROR, error=error)
