"""The core of the gateway: a request becomes durable, an answer comes back, a cancel is final."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import Any

from trireme.bus.connection import AWAY, persistently
from trireme.bus.request_records import Admission, RequestRecords, State
from trireme.errors import (
    DeadlineExceeded,
    RequestCancelled,
    RequestConflict,
    RequestFailed,
    RequestNotFound,
    ServiceUnavailable,
    TriremeError,
)
from trireme.gateway.admission import AdmissionControl
from trireme.gateway.answer import Answer
from trireme.gateway.audit import current_call
from trireme.gateway.constraint_checks import ConstraintChecks
from trireme.gateway.limits import Limits
from trireme.gateway.live_request import Choice, LiveRequest
from trireme.gateway.metrics import Metrics
from trireme.gateway.models import ModelCatalog, ServedModel
from trireme.gateway.prefix_blocks import name_blocks
from trireme.gateway.quotas import Quotas
from trireme.gateway.recovery import Recovery, ending_error
from trireme.gateway.request_table import RequestTable
from trireme.gateway.request_traces import CallTrace, RequestTraces
from trireme.gateway.settings import Settings
from trireme.gateway.submission import Submission, fleet_request_id, most_tokens
from trireme.gateway.timelines import Event
from trireme.gateway.truncation import dropped_tokens
from trireme.gateway.worker_links import WorkerLinks
from trireme.wire.bus.v1.facts_pb2 import AdmittedRequest, RequestKind
from trireme.wire.inference.v1.inference_pb2 import TokenIds

log = logging.getLogger(__name__)

LONGEST_FLUSH_S = 0.25
"""However many clients there are, each hears from its answer so often."""
SETTLING_S = 2.0
"""How long a leaving gateway tries to record its last cancels."""


class Generation:
    """Submits requests and looks after them until their clients are served or gone."""

    def __init__(
        self,
        *,
        settings: Settings,
        gateway_id: str,
        fleet_name: str,
        catalog: ModelCatalog,
        records: RequestRecords,
        links: WorkerLinks,
        table: RequestTable,
        recovery: Recovery,
        metrics: Metrics,
        traces: RequestTraces,
        admission: AdmissionControl,
        quotas: Quotas | None = None,
    ) -> None:
        self.traces = traces
        """Its `timelines` tell of the last requests."""
        self.catalog = catalog
        self._limits = settings.limits()
        self.metrics = metrics
        self._settings = settings
        self._gateway_id = gateway_id
        self._fleet_name = fleet_name
        self._records = records
        self._links = links
        self._table = table
        self._recovery = recovery
        self.admission = admission
        self.quotas = quotas
        self._constraints = ConstraintChecks()
        self._answers: set[Answer] = set()
        self._endings: set[asyncio.Task[None]] = set()
        self._leaving = False
        self._abandoning = False

    @property
    def limits(self) -> Limits:
        """What one request may ask for now."""
        if self._limits.trimmed != self.admission.trimmed:
            self._limits = replace(self._limits, trimmed=self.admission.trimmed)
        return self._limits

    async def submit(self, submission: Submission) -> Answer:
        """Make a request durable, or attach to the one of that id, and return its answer.

        Raises:
            InvalidRequest: its constraint cannot be compiled, or the model does not generate.
            Overloaded: too many requests are held here or wait in the fleet, or it would wait too long.
            ServiceUnavailable: Redis is away, this gateway leaves, or nobody serves the model.
            ContextLengthExceeded: no worker's KV memory can hold it.
            RequestConflict: the id belongs to a request with other contents.
            RequestNotFound: the id's request ended and its output is no longer kept.
            RequestCancelled, RequestQuarantined, RequestFailed: it ended so before.
        """
        call = self.traces.begin(submission)
        try:
            return await self._submit(submission, call)
        except TriremeError as error:
            self.traces.refused(call, error)
            raise

    async def _submit(self, submission: Submission, call: CallTrace) -> Answer:
        if submission.kind == RequestKind.REQUEST_KIND_GENERATE:
            submission.model.check_generates()
        if self._leaving:
            raise ServiceUnavailable("this gateway is leaving: ask another one", retry_after_s=0.1)
        known = self._table.get(submission.caller.fleet_id)
        if known is not None:
            _check_same(known.admitted, submission)
            self.metrics.resumes.inc()
            return self._answer(known, submission.resume_from, call, attached=True)
        if len(self._table) >= self._settings.max_inflight:
            raise self.admission.refused_by_gateway(submission, len(self._table))
        await self._constraints.check(
            submission.model, submission.sampling, param=submission.constraint_param
        )
        caller = submission.caller
        audited = current_call()
        if audited is not None:
            audited.note_request(caller.fleet_id, submission.model.name)
        if self.quotas is None:
            return await self._admit(submission, call)
        try:
            async with asyncio.timeout(self._settings.admission_s):
                reservation = await self.quotas.reserve(caller.tenant, most_tokens(submission))
        except (*AWAY, TimeoutError) as error:
            raise ServiceUnavailable("the bus does not answer: try again", retry_after_s=1.0) from error
        if reservation is None:
            return await self._admit(submission, call)
        try:
            answer = await self._admit(submission, call)
        except BaseException:
            self._in_background(self.quotas.settle(reservation, tokens=None))
            raise
        if answer.attached:  # It was charged when it was made.
            self._in_background(self.quotas.settle(reservation, tokens=None))
        else:
            answer.reservation = reservation
        return answer

    async def cancel(self, request_id: str, *, tenant: str) -> bool:
        """Stop a tenant's request, whoever serves it; False where it had ended or was never known."""
        request_id = fleet_request_id(tenant, request_id)
        try:
            was_open, worker_id = await self._records.settle(request_id, State.CANCELLED)
        except AWAY as error:
            raise ServiceUnavailable("the bus does not answer: try again", retry_after_s=1.0) from error
        live = self._table.get(request_id)
        if was_open:
            self.metrics.cancelled.inc()
            self._links.stop(worker_id, request_id, reason="client")
            if live is not None and not worker_id:
                live.fail(RequestCancelled("the request was cancelled"))
        return was_open

    async def leave(self, *, drain_s: float) -> None:
        """Take nothing new; let answers come to their end for `drain_s`, then leave them to others.

        What is left goes on running: its clients resume at another gateway.
        """
        self._leaving = True
        deadline_s = time.monotonic() + drain_s
        while self._answers and time.monotonic() < deadline_s:
            await asyncio.sleep(0.02)
        self._abandoning = True
        for answer in list(self._answers):
            answer.displace()
        if self._endings:
            await asyncio.wait(self._endings, timeout=SETTLING_S)
        await self._constraints.close()

    async def _admit(self, submission: Submission, call: CallTrace) -> Answer:
        started_s = time.monotonic()
        try:
            async with asyncio.timeout(self._settings.admission_s):
                bounds = await self.admission.enter(submission)
        except (*AWAY, TimeoutError) as error:
            raise ServiceUnavailable("the bus does not answer: try again", retry_after_s=1.0) from error
        known = self._table.get(submission.caller.fleet_id)
        if known is not None:  # The same request came twice at once, and its record was looked for.
            _check_same(known.admitted, submission)
            return self._answer(known, submission.resume_from, call, attached=True)
        admitted = self._admitted(submission, call.traceparent)
        live = self._live(admitted, submission.model)
        self._table.add(live)
        try:
            async with asyncio.timeout(self._settings.admission_s):
                result = await self._records.admit(
                    admitted, max_waiting=self._settings.max_waiting, bounds=bounds
                )
            if result.admission is Admission.KNOWN:
                live = await self._attach(live, submission)
            elif result.admission is Admission.ADMITTED:
                self.admission.note_joined(submission, admitted.expected_tokens)
            else:
                raise self.admission.refused_by_queue(submission, result)
        except (*AWAY, TimeoutError) as error:
            failure = ServiceUnavailable("the bus does not answer: try again", retry_after_s=1.0)
            self._give_up(live, failure)
            # It may have taken the request before it fell silent.
            self._in_background(self._settle(live, "refused"))
            raise failure from error
        except TriremeError as error:
            self._give_up(live, error)
            raise
        except asyncio.CancelledError:
            # The client left while the bus was being asked, which may have taken the request.
            self._give_up(live, RequestCancelled("the client went away"))
            self._in_background(self._settle(live, "client"))
            raise
        call.events.append(Event("durable", time.time()))
        self.metrics.admission.observe(time.monotonic() - started_s)
        self.metrics.prompt_tokens.inc(len(admitted.prompt_token_ids))
        self.metrics.truncated_tokens.inc(dropped_tokens(admitted))
        attached = result.admission is Admission.KNOWN
        return self._answer(live, submission.resume_from, call, attached=attached)

    async def _attach(self, live: LiveRequest, submission: Submission) -> LiveRequest:
        """Take over a request that another gateway held, or that ended."""
        request_id = live.request_id
        standing = await self._records.standing(request_id)
        body = await self._records.body(request_id)
        if standing is None:
            raise RequestNotFound(
                f"request {submission.caller.request_id!r} is no longer known", param="request_id"
            )
        if not standing.state.is_open and standing.state is not State.FINISHED:
            raise ending_error(standing)
        self.metrics.resumes.inc()
        if body is not None:
            _check_same(body, submission)
            # Calls that came in the meantime wait for what is not served any more: they ask again.
            again = "this request was just taken over from another gateway: ask again"
            self._give_up(live, ServiceUnavailable(again, retry_after_s=0.1))
            live = self._live(body, submission.model)
            live.preload(body.delivered, time.monotonic())
            self._table.add(live)
        live.enter_attempt(standing.attempt, time.monotonic())
        live.admitted.crashes = standing.crashes
        self._recovery.check_soon(live)
        return live

    def _give_up(self, live: LiveRequest, error: TriremeError) -> None:
        live.fail(error)
        self._table.remove(live)

    def _answer(
        self, live: LiveRequest, resume_from: tuple[int, ...], call: CallTrace, *, attached: bool
    ) -> Answer:
        answer = Answer(
            live,
            resume_from=resume_from,
            attached=attached,
            flush_interval_s=self._flush_interval_s,
            usage_wait_s=self._settings.usage_wait_s,
            metrics=self.metrics,
            on_close=partial(self._closed, call),
        )
        answer.audited = current_call()
        self._answers.add(answer)
        return answer

    def _account(self, answer: Answer) -> None:
        """What the call used: in the audit log, and off its tenant's quota."""
        live = answer.live
        prompt, answered = len(live.admitted.prompt_token_ids), sum(live.received())
        if answer.audited is not None:
            answer.audited.prompt_tokens += prompt
            answer.audited.answer_tokens += answered
        if self.quotas is not None and answer.reservation is not None:
            ours = live.error is not None and not isinstance(live.error, DeadlineExceeded)
            used = answered if ours else prompt + answered
            self._in_background(self.quotas.settle(answer.reservation, tokens=used))

    def _flush_interval_s(self) -> float:
        crowded_s = len(self._answers) / self._settings.max_deliveries_per_s
        return max(self._settings.flush_interval_s, min(crowded_s, LONGEST_FLUSH_S))

    def _closed(self, call: CallTrace, answer: Answer) -> None:
        self.traces.ended(call, answer)
        self._answers.discard(answer)
        live = answer.live
        self._account(answer)
        if live.listeners:
            return  # Another call reads the same request.
        self._table.remove(live)
        if self._abandoning or answer.let_go:
            return
        if answer.delivered:
            self._learn_length(live)
            if live.accounted and live.worker_id:
                self._links.confirm(live.worker_id, live.request_id, live.received())
            return  # Without an account the worker's last update, when it comes, is confirmed.
        if isinstance(live.error, RequestFailed):
            self._links.stop(live.worker_id, live.request_id, reason="failed")
            self._links.confirm(live.worker_id, live.request_id, live.received())
        elif live.error is None or isinstance(live.error, DeadlineExceeded):
            self.metrics.cancelled.inc()
            self.metrics.wasted_tokens.inc(sum(live.received()))
            self._in_background(self._settle(live, "client" if live.error is None else "deadline"))
        elif live.worker_id:
            self._links.confirm(live.worker_id, live.request_id, live.received())

    def _learn_length(self, live: LiveRequest) -> None:
        if live.admitted.kind == RequestKind.REQUEST_KIND_GENERATE:
            self.admission.note_answer(live.admitted.model, sum(live.received()) / len(live.choices))

    async def _settle(self, live: LiveRequest, reason: str) -> None:
        # The worker is told at once, before Redis is asked; a second stop does no harm.
        if live.worker_id:
            self._links.stop(live.worker_id, live.request_id, reason=reason)
        _, worker_id = await persistently(
            lambda: self._records.settle(live.request_id, State.CANCELLED), what="cancel"
        )
        if worker_id != live.worker_id or not worker_id:
            self._links.stop(worker_id, live.request_id, reason=reason)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)

    def _admitted(self, submission: Submission, traceparent: str) -> AdmittedRequest:
        caller = submission.caller
        now_unix_s = time.time()
        latest_s = now_unix_s + self._settings.max_request_s
        admitted = AdmittedRequest(
            request_id=caller.fleet_id,
            tenant=caller.tenant,
            tenant_weight=self.admission.weight_of(caller.tenant),
            model=submission.model.name,
            kind=submission.kind,
            prompt_token_ids=submission.prompt_token_ids,
            sampling=submission.sampling,
            slo_class=caller.slo_class,
            priority=caller.priority,
            session_id=caller.session_id,
            gateway_id=self._gateway_id,
            attempt=1,
            continuations=[TokenIds(ids=ids) for ids in submission.continuations],
            admitted_unix_s=now_unix_s,
            deadline_unix_s=min(caller.deadline_unix_s or latest_s, latest_s),
            traceparent=traceparent,
            expected_tokens=self.admission.expected_tokens(submission),
        )
        name_blocks(admitted, submission.model, submission.cut, fleet=self._fleet_name, tenant=caller.tenant)
        if submission.sampling.HasField("prompt_logprobs"):
            admitted.ClearField("prefix_hashes")  # All of it is computed, wherever it is cached.
        return admitted

    def _live(self, admitted: AdmittedRequest, model: ServedModel) -> LiveRequest:
        sampling = admitted.sampling
        stop_token_ids = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            stop_token_ids |= frozenset(i for i in model.eos_token_ids if not model.vocabulary.is_special(i))
        tail = admitted.prompt_token_ids[-16:]
        choices = [
            Choice(
                model.vocabulary.detokenizer(tail),
                stops=tuple(sampling.stop),
                stop_token_ids=stop_token_ids,
                min_tokens=sampling.min_tokens,
            )
            for _ in range(max(1, sampling.n))
        ]
        return LiveRequest(admitted, choices, now_s=time.monotonic())


def _check_same(admitted: AdmittedRequest, submission: Submission) -> None:
    """Raise RequestConflict unless the request of that id is the one that is asked again."""
    same: list[tuple[str, Callable[[], bool]]] = [
        ("tenant", lambda: admitted.tenant == submission.caller.tenant),
        ("kind", lambda: admitted.kind == submission.kind),
        ("model", lambda: admitted.model == submission.model.name),
        ("prompt", lambda: list(admitted.prompt_token_ids) == submission.prompt_token_ids),
        ("context_overflow", lambda: admitted.HasField("truncation") == (submission.cut is not None)),
        ("n", lambda: max(1, admitted.sampling.n) == submission.sampling.n),
    ]
    for name, holds in same:
        if not holds():
            request_id = submission.caller.request_id
            raise RequestConflict(
                f"a request with the id {request_id!r} exists with another {name}: use a new id",
                param="request_id",
            )
