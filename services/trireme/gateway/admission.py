"""Admission under load: what waits in the fleet, how fast it is served, and who may join it.

Every gateway looks at the queue by itself and decides with `policies.admission`; the bounds that
must hold whatever the others do meanwhile are held by the script that queues a request.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from redis.asyncio import Redis

from trireme.bus.connection import AWAY, Keys
from trireme.bus.request_records import Admission, AdmissionResult, RequestRecords, TenantBounds
from trireme.bus.waiting_work import URGENCY, WaitingKey, WaitingWork, read_waiting
from trireme.errors import ContextLengthExceeded, Overloaded, ServiceUnavailable, TriremeError
from trireme.gateway.metrics import Metrics
from trireme.gateway.models import ModelCatalog
from trireme.gateway.submission import Submission
from trireme.gateway.worker_links import WorkerLinks
from trireme.policies.admission import (
    Ask,
    Backlog,
    QueueView,
    Refusal,
    Verdict,
    decide,
    pressure,
    share_of_queue,
    shared_from,
)
from trireme.policies.brown_out import RISE_ABOVE, BrownOut, Level, step
from trireme.policies.drain_rate import DrainRate, Look, observe
from trireme.policies.retry_hints import RetryHints
from trireme.policies.routing import UNMEASURED_DECODE_TOKENS_PER_S, UNMEASURED_PREFILL_TOKENS_PER_S
from trireme.runtime.fleet import Slo, SloGoal
from trireme.runtime.tenant_keys import Tenant
from trireme.wire.bus.v1.facts_pb2 import RequestKind, VariantStatus

log = logging.getLogger(__name__)

REFRESH_S = 0.25
UNSEEN_ANSWER_TOKENS = 256
"""Expected of an answer, at most, before any answer of its model was seen."""
URGENCY_NAMES = ("interactive", "standard", "batch")


@dataclass(slots=True)
class _ModelLoad:
    """What this gateway knows of one model's queue."""

    drain: DrainRate = field(default_factory=DrainRate)
    brown_out: BrownOut = field(default_factory=BrownOut)
    backlogs: dict[tuple[int, str], Backlog] = field(default_factory=dict)
    statuses: Sequence[VariantStatus] = ()
    """Of the workers that serve it."""
    free_places: int = 0
    handed_over: int = 0
    """Requests that workers hold beyond what they can run at once."""
    answer_tokens: float = 0.0
    """Mean of the answers seen; 0: none."""


class AdmissionControl:
    """The gate between the front ends and the queue."""

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        *,
        records: RequestRecords,
        links: WorkerLinks,
        catalog: ModelCatalog,
        slo: Slo,
        max_waiting: int,
        retry_after_s: float,
        metrics: Metrics,
        tenants: Callable[[], Mapping[str, Tenant]] = dict,
    ) -> None:
        """`tenants`: those whose weights are known now; all others weigh 1."""
        self._redis = redis
        self._keys = keys
        self._records = records
        self._links = links
        self._metrics = metrics
        self._max_waiting = max_waiting
        self._known_tenants = tenants
        self._goals: tuple[SloGoal, ...] = (slo.interactive, slo.standard, slo.batch)
        self._hints = RetryHints(shortest_s=retry_after_s)
        self._canonical = {model.name: model.variant_of or model.name for model in catalog.all()}
        self._loads = {name: _ModelLoad() for name in set(self._canonical.values())}
        self._unserved_since_s: dict[str, float] = {}
        self._waiting = 0
        self._tenant_requests: dict[str, int] = {}
        self._waiting_weight = 0.0
        self.trimmed: frozenset[str] = frozenset()
        """Models and variants whose answers are kept short where nobody asked for a length."""

    @property
    def knows_workers(self) -> bool:
        """Some worker of some model was seen."""
        return any(load.statuses for load in self._loads.values())

    def weight_of(self, tenant: str) -> float:
        """The tenant's part of the fleet over that of a tenant of weight 1."""
        known = self._known_tenants().get(tenant)
        return known.weight if known is not None else 1.0

    def level(self, model: str) -> Level:
        """What is given up for this model now."""
        return self._load(model).brown_out.level

    async def run(self) -> None:
        """Look at the queue, for ever."""
        while True:
            try:
                worker_ids = [record.id for record in self._links.living("worker")]
                work = await read_waiting(self._redis, self._keys, worker_ids)
                self.note(work, now_s=time.monotonic())
            except AWAY:
                pass  # What was known stays; admission itself will say that the bus is away.
            await asyncio.sleep(REFRESH_S)

    def note(self, work: WaitingWork, *, now_s: float) -> None:
        """Take a look at the queue into account."""
        self._waiting = work.entries
        self._tenant_requests = dict(work.tenant_requests)
        self._waiting_weight = sum(map(self.weight_of, self._tenant_requests))
        self._note_workers(work, now_s)
        for name, load in self._loads.items():
            served = [asked for asked, model in self._canonical.items() if model == name]
            load.backlogs = self._backlogs(name, work)
            look = Look(
                at_s=now_s,
                served_tokens=sum(work.served_tokens.get(asked, 0) for asked in served),
                served_requests=sum(work.served_requests.get(asked, 0) for asked in served),
                waiting_requests=sum(backlog.requests for backlog in load.backlogs.values()),
                slots=sum(status.max_sequences for status in load.statuses),
            )
            load.drain = observe(load.drain, look)
            self._note_pressure(name, load, now_s)
        self.trimmed = frozenset(
            asked
            for asked, model in self._canonical.items()
            if self._loads[model].brown_out.level >= Level.TRIMMED
        )

    def note_answer(self, model: str, tokens: float) -> None:
        """An answer of so many tokens came to its end: the next ones are expected to be alike."""
        load = self._loads[self._canonical[model]]
        load.answer_tokens = (
            0.95 * load.answer_tokens + 0.05 * tokens if load.answer_tokens else float(tokens)
        )

    def expected_tokens(self, submission: Submission) -> int:
        """Prompt and answer tokens that a request will probably cost."""
        prompt = len(submission.prompt_token_ids)
        if submission.kind != RequestKind.REQUEST_KIND_GENERATE:
            return prompt + sum(map(len, submission.continuations))
        return prompt + math.ceil(self._answer_tokens(submission) * submission.sampling.n)

    async def enter(self, submission: Submission) -> TenantBounds:
        """Bounds under which the request may join the queue.

        Raises:
            Overloaded: it may not: its error says why, and when to come back.
            ServiceUnavailable: nobody has served its model for longer than its class may wait.
            ContextLengthExceeded: no worker's KV memory can ever hold it.
        """
        self._check_memory(submission)
        verdict = self._decide(submission)
        caller = submission.caller
        if verdict.refusal is not None:
            # A request that was admitted before is no new work: its client comes for the answer.
            if await self._records.standing(caller.fleet_id) is None:
                raise self._refused(submission, verdict.refusal, verdict.reason, verdict.retry_after_s)
            return TenantBounds()
        return TenantBounds(
            shared_from=shared_from(self._max_waiting),
            requests=share_of_queue(
                self._max_waiting,
                weight=self.weight_of(caller.tenant),
                fleet_weight=self._fleet_weight(caller.tenant),
            ),
            backlog_tokens=min(verdict.most_tokens, float(2**31)),
        )

    def note_joined(self, submission: Submission, tokens: int) -> None:
        """Count an admission at once: the next look at the queue shows it to the others too."""
        caller = submission.caller
        load = self._load(submission.model.name)
        key = (URGENCY[caller.slo_class], caller.tenant)
        known = load.backlogs.get(key) or Backlog(
            tenant=caller.tenant,
            urgency=key[0],
            requests=0,
            tokens=0.0,
            weight=self.weight_of(caller.tenant),
        )
        load.backlogs[key] = replace(known, requests=known.requests + 1, tokens=known.tokens + tokens)
        self._waiting += 1
        self._waiting_weight = self._fleet_weight(caller.tenant)
        self._tenant_requests[caller.tenant] = self._tenant_requests.get(caller.tenant, 0) + 1

    def refused_by_queue(self, submission: Submission, result: AdmissionResult) -> TriremeError:
        """The error of a request that others overtook on the way to the queue."""
        one_s = self._one_s(submission)
        waiting = result.waiting
        if result.admission is Admission.FULL:
            reason = f"{waiting} requests wait in the fleet, its limit"
            return self._refused(submission, Refusal.QUEUE_FULL, reason, one_s)
        turn_s = one_s / self._part(submission.caller.tenant)
        if result.admission is Admission.OVER_SHARE:
            reason = f"{waiting} requests wait in the fleet, and this tenant's are its share of them"
            return self._refused(submission, Refusal.TENANT_SHARE, reason, turn_s)
        goal_s = self._goals[URGENCY[submission.caller.slo_class]].ttft_s
        reason = (
            f"{waiting} requests wait in the fleet, so many of them this tenant's that the first token "
            f"would come too late: its class may wait {goal_s:g} s"
        )
        return self._refused(submission, Refusal.FIRST_TOKEN_GOAL, reason, turn_s)

    def refused_by_gateway(self, submission: Submission, held: int) -> TriremeError:
        """The error of a request for which this gateway has no place."""
        self._metrics.refused.labels("gateway_full").inc()
        reason = f"this gateway holds {held} requests, its limit"
        return Overloaded(reason, retry_after_s=self._hint(submission, self._one_s(submission)))

    def _refused(
        self, submission: Submission, refusal: Refusal, reason: str, room_in_s: float
    ) -> TriremeError:
        self._metrics.refused.labels(refusal.value).inc()
        kind = ServiceUnavailable if refusal is Refusal.NO_WORKER else Overloaded
        return kind(reason, retry_after_s=self._hint(submission, room_in_s))

    def _hint(self, submission: Submission, room_in_s: float) -> float:
        tenant = submission.caller.tenant
        rate = self._rate(submission)
        # The same room is promised by every gateway.
        promised = self.expected_tokens(submission) * max(1, len(self._links.living("gateway")))
        return self._hints.next(
            tenant,
            room_in_s=room_in_s,
            takes_s=promised / self._part(tenant) / rate if rate > 0.0 else 0.0,
            now_s=time.monotonic(),
            draw=random.random(),
        )

    def _decide(self, submission: Submission) -> Verdict:
        caller = submission.caller
        load = self._load(submission.model.name)
        urgency = URGENCY[caller.slo_class]
        tokens = self.expected_tokens(submission)
        sampling = submission.sampling
        ask = Ask(
            tenant=caller.tenant,
            urgency=urgency,
            tokens=tokens,
            first_token_s=self._goals[urgency].ttft_s,
            serve_s=self._serve_s(load, submission),
            remaining_s=caller.deadline_unix_s - time.time() if caller.deadline_unix_s else math.inf,
            weight=self.weight_of(caller.tenant),
            extras=sampling.n > 1 or sampling.HasField("logprobs") or sampling.HasField("prompt_logprobs"),
        )
        view = QueueView(
            backlogs=tuple(load.backlogs.values()),
            tokens_per_s=self._rate(submission),
            mean_tokens=load.drain.mean_tokens or tokens,
            free_places=load.free_places,
            handed_over_tokens=load.drain.mean_tokens * load.handed_over,
            outage_s=self._outage_s(submission.model.name),
            fleet_requests=self._waiting,
            fleet_weight=self._fleet_weight(caller.tenant),
            tenant_requests=self._tenant_requests.get(caller.tenant, 0),
            level=load.brown_out.level,
        )
        return decide(ask, view, max_requests=self._max_waiting)

    def _load(self, name: str) -> _ModelLoad:
        return self._loads[self._canonical[name]]

    def _fleet_weight(self, tenant: str) -> float:
        """Of the tenants that wait, this one included."""
        return self._waiting_weight + (0.0 if tenant in self._tenant_requests else self.weight_of(tenant))

    def _part(self, tenant: str) -> float:
        """Of the fleet, while all who wait now go on waiting."""
        return self.weight_of(tenant) / self._fleet_weight(tenant)

    def _outage_s(self, name: str) -> float:
        since_s = self._unserved_since_s.get(name)
        if since_s is None:
            return self._load(name).drain.stalled_s
        # The least that is more than nothing: an outage that has just begun.
        return max(1e-3, time.monotonic() - since_s)

    def _answer_tokens(self, submission: Submission) -> float:
        seen = self._load(submission.model.name).answer_tokens or UNSEEN_ANSWER_TOKENS
        return min(float(submission.sampling.max_tokens), seen)

    def _rate(self, submission: Submission) -> float:
        answer = max(1.0, self._answer_tokens(submission) * submission.sampling.n)
        load = self._load(submission.model.name)
        return _tokens_per_s(load, prompt=float(len(submission.prompt_token_ids)), answer=answer)

    def _one_s(self, submission: Submission) -> float:
        """Between two requests that leave the queue."""
        load = self._load(submission.model.name)
        rate = self._rate(submission)
        return (load.drain.mean_tokens or self.expected_tokens(submission)) / rate if rate > 0.0 else 0.0

    def _serve_s(self, load: _ModelLoad, submission: Submission) -> float:
        """From first to last token on the fastest worker; 0 where none has measured itself."""
        speeds = [status.decode_tokens_per_s for status in load.statuses if status.decode_tokens_per_s > 0.0]
        return self._answer_tokens(submission) / max(speeds) if speeds else 0.0

    def _backlogs(self, name: str, work: WaitingWork) -> dict[tuple[int, str], Backlog]:
        found: dict[tuple[int, str], Backlog] = {}
        for key, requests in work.requests.items():
            if self._canonical.get(key.model) != name:
                continue
            place = (key.urgency, key.tenant)
            tokens = work.tokens.get(WaitingKey(key.model, key.urgency, key.tenant), 0)
            known = found.get(place)
            if known is not None:
                requests, tokens = requests + known.requests, tokens + int(known.tokens)
            found[place] = Backlog(
                tenant=key.tenant,
                urgency=key.urgency,
                requests=requests,
                tokens=float(tokens),
                weight=self.weight_of(key.tenant),
            )
        return found

    def _note_workers(self, work: WaitingWork, now_s: float) -> None:
        if self._links.scanned_s is None:
            return
        ready = [
            (status, work.assigned_requests.get(record.id, 0))
            for record in self._links.living("worker")
            if not record.worker.draining
            for status in record.worker.variants
            if status.ready
        ]
        for name, load in self._loads.items():
            mine = [
                (status, assigned)
                for status, assigned in ready
                if self._canonical.get(status.variant) == name
            ]
            load.statuses = [status for status, _ in mine]
            load.free_places = sum(max(0, status.max_sequences - assigned) for status, assigned in mine)
            load.handed_over = sum(max(0, assigned - status.max_sequences) for status, assigned in mine)
        for asked, model in self._canonical.items():
            if any(asked in (status.variant, model) for status in self._loads[model].statuses):
                self._unserved_since_s.pop(asked, None)
            else:
                self._unserved_since_s.setdefault(asked, now_s)

    def _note_pressure(self, name: str, load: _ModelLoad, now_s: float) -> None:
        view = QueueView(
            backlogs=tuple(load.backlogs.values()),
            tokens_per_s=_tokens_per_s(load, prompt=0.0, answer=1.0),
            mean_tokens=load.drain.mean_tokens,
            free_places=load.free_places,
            handed_over_tokens=load.drain.mean_tokens * load.handed_over,
        )
        waits = [goal.ttft_s for goal in self._goals]
        found = max(pressure(view, first_token_s=waits), _slowness(load.statuses, self._goals))
        before = load.brown_out.level
        load.brown_out = step(load.brown_out, pressure=found, now_s=now_s)
        if load.brown_out.level != before:
            log.warning(
                "brown_out",
                extra={"model": name, "step": load.brown_out.level.name.lower(), "pressure": found},
            )
        self._metrics.brown_out.labels(name).set(load.brown_out.level)
        for urgency, class_name in enumerate(URGENCY_NAMES):
            newcomer = Ask(tenant="", urgency=urgency, tokens=view.mean_tokens, first_token_s=math.inf)
            wait_s = decide(newcomer, view, max_requests=2**31).wait_s
            self._metrics.predicted_wait.labels(name, class_name).set(wait_s)

    def _check_memory(self, submission: Submission) -> None:
        """Raise where no worker's KV memory could ever hold the request."""
        places = [status for status in self._load(submission.model.name).statuses if status.kv_blocks]
        if not places or submission.kind != RequestKind.REQUEST_KIND_GENERATE or submission.cut is not None:
            return
        prompt, sampling = len(submission.prompt_token_ids), submission.sampling
        asked = prompt + (sampling.max_tokens if submission.answer_was_sized else 1)
        most = max(_sequence_tokens(status) for status in places)
        if asked > most:
            self._metrics.refused.labels("kv_capacity").inc()
            raise ContextLengthExceeded(
                f"prompt and answer may have {asked} tokens, and the KV memory of the workers that serve "
                f"{submission.model.name} holds {most} of one sequence: ask for fewer (max_tokens), or have "
                "workers with more (kv_mib)",
                param="max_tokens",
            )
        together = prompt + math.ceil(self._answer_tokens(submission)) * sampling.n
        room = max((status.kv_blocks + status.host_kv_blocks) * status.block_tokens for status in places)
        if sampling.n > 1 and together > room:
            self._metrics.refused.labels("kv_capacity").inc()
            raise ContextLengthExceeded(
                f"{sampling.n} choices will have about {together} tokens together, and the KV memory of a "
                f"worker that serves {submission.model.name} holds {room}, swapped ones too: ask for fewer "
                "(n, max_tokens), or have workers with more (kv_mib, swap_mib)",
                param="n",
            )


def _tokens_per_s(load: _ModelLoad, *, prompt: float, answer: float) -> float:
    """As measured while somebody waited; before that, what the workers' own speeds promise such requests."""
    if load.drain.is_known:
        return load.drain.tokens_per_s
    total = 0.0
    for status in load.statuses:
        prefill_s = prompt / (status.prefill_tokens_per_s or UNMEASURED_PREFILL_TOKENS_PER_S)
        one_rate = status.decode_tokens_per_s or UNMEASURED_DECODE_TOKENS_PER_S
        total += (prompt + answer) / (prefill_s + answer / (one_rate * max(1, status.max_sequences)))
    return total


def _sequence_tokens(status: VariantStatus) -> int:
    held = status.kv_blocks * (status.block_tokens or 1)
    return min(held, status.context_tokens) if status.context_tokens else held


def _slowness(statuses: Iterable[VariantStatus], goals: Sequence[SloGoal]) -> float:
    """Pressure from answers that are written too slowly: at the goal the first level begins."""
    wanted = [goal.tpot_s for goal in goals[:2] if goal.tpot_s is not None]
    if not wanted:
        return 0.0
    busy = [status for status in statuses if status.running and status.decode_tokens_per_s > 0.0]
    return max((RISE_ABOVE[0] / (s.decode_tokens_per_s * min(wanted)) for s in busy), default=0.0)
