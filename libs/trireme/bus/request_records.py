"""The record of each request, and the atomic steps of its life.

A record's `attempt` fences the past: a step that names an older attempt has no effect.
States: queued -> assigned -> finished | failed | cancelled | quarantined; assigned -> queued
when a worker is lost.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from redis.asyncio import Redis
from redis.exceptions import NoScriptError

from trireme.bus import waiting_work
from trireme.bus.connection import Keys
from trireme.wire.bus.v1.facts_pb2 import AdmittedRequest, Assignment, Decision

SCHEDULERS = "scheduler"
"""Consumer group on `requests`."""
WORKERS = "worker"
"""Consumer group on each worker's assignments."""

MAX_CRASHES = 2
"""A request that was in an engine at so many crashes is quarantined."""
UNBOUNDED = 2**31
"""As a bound: none."""
NO_ATTEMPT = 0
"""No record has this attempt."""
RECORD_S = 6 * 3600
"""A record outlives its last change by so long while the request is open."""
RETENTION_S = 120
"""A record outlives its request's end by so long: a client may still come back."""

_ADMIT = (
    waiting_work.JOIN
    + """
local known = redis.call('HMGET', KEYS[1], 'state', 'worker', 'attempt')
if known[1] then return {0, known[1], known[2] or '', known[3]} end
local waiting = redis.call('XLEN', KEYS[2])
if waiting == 0 then redis.call('DEL', KEYS[3]) end
local held = tonumber(redis.call('HGET', KEYS[3], ARGV[4]) or '0')
local tokens = tonumber(redis.call('HGET', KEYS[3], ARGV[6]) or '0')
if waiting >= tonumber(ARGV[2]) then return {-1, tostring(waiting), '', '0'} end
if waiting >= tonumber(ARGV[8]) and held >= tonumber(ARGV[9]) then
  return {-2, tostring(waiting), '', tostring(held)}
end
if tokens > 0 and tokens > tonumber(ARGV[10]) then return {-3, tostring(waiting), '', tostring(tokens)} end
redis.call('HSET', KEYS[1], 'state', 'queued', 'attempt', 1, 'crashes', 0, 'body', ARGV[1])
redis.call('EXPIRE', KEYS[1], ARGV[3])
redis.call('XADD', KEYS[2], '*', 'f', ARGV[1])
join(KEYS[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7])
return {1, 'queued', '', '1'}
"""
)

_ASSIGN = (
    waiting_work.LEAVE
    + """
local known = redis.call('HMGET', KEYS[1], 'state', 'attempt')
local assigned = 0
if known[1] == 'queued' and known[2] == ARGV[3] then
  redis.call('HSET', KEYS[1], 'state', 'assigned', 'worker', ARGV[4])
  redis.call('EXPIRE', KEYS[1], ARGV[8])
  redis.call('RPUSH', KEYS[5], ARGV[6])
  redis.call('EXPIRE', KEYS[5], ARGV[8])
  redis.call('HINCRBY', KEYS[4], 'requests', 1)
  redis.call('HINCRBY', KEYS[4], 'tokens', ARGV[7])
  redis.call('HINCRBY', KEYS[4], ARGV[9], 1)
  redis.call('SADD', KEYS[6], ARGV[4])
  redis.call('XADD', KEYS[3], '*', 'f', ARGV[5])
  assigned = 1
end
redis.call('XACK', KEYS[2], ARGV[2], ARGV[1])
if redis.call('XDEL', KEYS[2], ARGV[1]) == 1 then
  leave(KEYS[7], ARGV[9], ARGV[10], ARGV[11], ARGV[12])
  if assigned == 1 then note_served(KEYS[8], ARGV[13], ARGV[12]) end
end
return assigned
"""
)

_WITHDRAW = (
    waiting_work.LEAVE
    + """
redis.call('XACK', KEYS[1], ARGV[2], ARGV[1])
if redis.call('XDEL', KEYS[1], ARGV[1]) == 1 then
  leave(KEYS[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6])
end
"""
)

_REQUEUE = (
    waiting_work.JOIN
    + """
local known = redis.call('HMGET', KEYS[1], 'state', 'attempt', 'crashes')
if known[1] ~= 'assigned' or known[2] ~= ARGV[1] then return 0 end
if tonumber(ARGV[3]) >= tonumber(ARGV[4]) then
  redis.call('HSET', KEYS[1], 'state', 'quarantined', 'crashes', ARGV[3])
  redis.call('HDEL', KEYS[1], 'body')
  redis.call('EXPIRE', KEYS[1], ARGV[6])
  return -1
end
redis.call('HSET', KEYS[1], 'state', 'queued', 'attempt', tonumber(ARGV[1]) + 1,
           'crashes', ARGV[3], 'body', ARGV[2], 'worker', '')
redis.call('EXPIRE', KEYS[1], ARGV[5])
redis.call('XADD', KEYS[2], '*', 'f', ARGV[2])
join(KEYS[3], ARGV[7], ARGV[8], ARGV[9], ARGV[10])
return 1
"""
)

_END = """
redis.call('XACK', KEYS[2], ARGV[2], ARGV[1])
if redis.call('XDEL', KEYS[2], ARGV[1]) == 1 and redis.call('EXISTS', KEYS[3]) == 1 then
  redis.call('HINCRBY', KEYS[3], 'requests', -1)
  redis.call('HINCRBY', KEYS[3], 'tokens', -tonumber(ARGV[5]))
  if redis.call('HINCRBY', KEYS[3], ARGV[7], -1) <= 0 then redis.call('HDEL', KEYS[3], ARGV[7]) end
end
local known = redis.call('HMGET', KEYS[1], 'state', 'attempt')
if known[1] == 'assigned' and known[2] == ARGV[3] then
  redis.call('HSET', KEYS[1], 'state', ARGV[4])
  redis.call('HDEL', KEYS[1], 'body')
  redis.call('EXPIRE', KEYS[1], ARGV[6])
  redis.call('EXPIRE', KEYS[4], ARGV[6])
  return 1
end
return 0
"""

_SETTLE = """
local known = redis.call('HMGET', KEYS[1], 'state', 'worker')
if known[1] ~= 'queued' and known[1] ~= 'assigned' then return {0, known[1] or '', ''} end
redis.call('HSET', KEYS[1], 'state', ARGV[1])
redis.call('HDEL', KEYS[1], 'body')
redis.call('EXPIRE', KEYS[1], ARGV[2])
return {1, known[1], known[2] or ''}
"""


class State(enum.StrEnum):
    """Where a request is in its life."""

    QUEUED = "queued"
    ASSIGNED = "assigned"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"
    QUARANTINED = "quarantined"

    @property
    def is_open(self) -> bool:
        return self in (State.QUEUED, State.ASSIGNED)


class Admission(enum.Enum):
    """What `admit` found."""

    ADMITTED = 1
    KNOWN = 0
    FULL = -1
    OVER_SHARE = -2
    """The queue is nearly full and the tenant holds its share of it."""
    TOO_LATE = -3
    """The tenant's backlog at this urgency grew beyond what may wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantBounds:
    """What a request's tenant may have waiting when it joins the queue."""

    shared_from: int = UNBOUNDED
    """From so many waiting requests of everybody on, `requests` holds."""
    requests: int = UNBOUNDED
    """Of the tenant, for any model."""
    backlog_tokens: float = UNBOUNDED
    """For this model at this urgency."""


NO_BOUNDS = TenantBounds()


@dataclass(frozen=True, slots=True)
class AdmissionResult:
    """The outcome of `admit`; `state` and `worker_id` describe a request that was known."""

    admission: Admission
    state: State | None
    worker_id: str
    waiting: int
    """Requests that waited, where the request was refused."""


class Requeue(enum.Enum):
    """What `requeue` did."""

    REQUEUED = 1
    STALE = 0
    QUARANTINED = -1


@dataclass(frozen=True, slots=True)
class Standing:
    """A record at one moment."""

    state: State
    attempt: int
    crashes: int
    worker_id: str


@dataclass(frozen=True, slots=True)
class Handover:
    """A queued request on its way to a worker."""

    entry_id: bytes
    """Its entry in `requests`."""
    assignment: Assignment
    decision: Decision
    tokens: int
    """The work it adds to the worker's load; `end` takes the same off again."""


class RequestRecords:
    """The records of one fleet."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys
        self._admit = redis.register_script(_ADMIT)
        self._assign = redis.register_script(_ASSIGN)
        self._requeue = redis.register_script(_REQUEUE)
        self._end = redis.register_script(_END)
        self._settle = redis.register_script(_SETTLE)
        self._withdraw = redis.register_script(_WITHDRAW)

    async def admit(
        self, request: AdmittedRequest, *, max_waiting: int, bounds: TenantBounds = NO_BOUNDS
    ) -> AdmissionResult:
        """Make a request durable and queue it, unless it is known or the queue is full."""
        code, state, worker, _ = await self._admit(
            keys=[self._keys.request(request.request_id), self._keys.requests, self._keys.waiting],
            args=[
                request.SerializeToString(),
                max_waiting,
                RECORD_S,
                *waiting_work.words(request),
                bounds.shared_from,
                bounds.requests,
                bounds.backlog_tokens,
            ],
        )
        admission = Admission(code)
        if code < 0:
            return AdmissionResult(admission, None, "", int(state))
        return AdmissionResult(admission, State(state.decode()), worker.decode(), 0)

    async def assign(self, handovers: Sequence[Handover]) -> list[bool]:
        """Hand queued requests to workers and take them off the queue; False where one was stale.

        One round trip for all of them. Repeating it is harmless: what was assigned is stale then.
        """
        if not handovers:
            return []
        try:
            return await self._assign_at_once(handovers)
        except NoScriptError:
            await self._redis.script_load(_ASSIGN)
            return await self._assign_at_once(handovers)

    async def _assign_at_once(self, handovers: Sequence[Handover]) -> list[bool]:
        async with self._redis.pipeline(transaction=False) as pipe:
            for handover in handovers:
                keys, arguments = self._assign_words(handover)
                pipe.evalsha(self._assign.sha, len(keys), *keys, *arguments)
            return [bool(assigned) for assigned in await pipe.execute()]

    def _assign_words(self, handover: Handover) -> tuple[list[str], list[str | bytes | int]]:
        assignment = handover.assignment
        request = assignment.request
        keys = [
            self._keys.request(request.request_id),
            self._keys.requests,
            self._keys.assignments(assignment.worker_id),
            self._keys.load(assignment.worker_id),
            self._keys.decisions(request.request_id),
            self._keys.assigned_workers,
            self._keys.waiting,
            self._keys.served,
        ]
        return keys, [
            handover.entry_id,
            SCHEDULERS,
            request.attempt,
            assignment.worker_id,
            assignment.SerializeToString(),
            handover.decision.SerializeToString(),
            handover.tokens,
            RECORD_S,
            *waiting_work.words(request),
            request.model,
        ]

    async def withdraw(self, entry_id: bytes, request: AdmittedRequest) -> None:
        """Take a request off the queue that no worker is to have; its record stays as it is."""
        await self._withdraw(
            keys=[self._keys.requests, self._keys.waiting],
            args=[entry_id, SCHEDULERS, *waiting_work.words(request)],
        )

    async def requeue(self, request: AdmittedRequest, *, crashed: bool) -> Requeue:
        """Queue an assigned request again, as its next attempt.

        `request` is as it was assigned, with `delivered` and `avoid_worker_ids` brought up to date;
        `crashed` says that a worker died with it in its engine.
        """
        crashes = request.crashes + int(crashed)
        again = AdmittedRequest()
        again.CopyFrom(request)
        again.attempt = request.attempt + 1
        again.crashes = crashes
        return Requeue(
            await self._requeue(
                keys=[self._keys.request(request.request_id), self._keys.requests, self._keys.waiting],
                args=[
                    request.attempt,
                    again.SerializeToString(),
                    crashes,
                    MAX_CRASHES,
                    RECORD_S,
                    RETENTION_S,
                    *waiting_work.words(again),
                ],
            )
        )

    async def end(self, entry_id: bytes, assignment: Assignment, state: State, *, tokens: int) -> bool:
        """Acknowledge an assignment whose output was delivered; False where it was stale."""
        request = assignment.request
        return bool(
            await self._end(
                keys=[
                    self._keys.request(request.request_id),
                    self._keys.assignments(assignment.worker_id),
                    self._keys.load(assignment.worker_id),
                    self._keys.decisions(request.request_id),
                ],
                args=[
                    entry_id,
                    WORKERS,
                    request.attempt,
                    state.value,
                    tokens,
                    RETENTION_S,
                    waiting_work.tenant_field(request.tenant),
                ],
            )
        )

    async def let_go(self, entry_id: bytes, assignment: Assignment, *, tokens: int) -> None:
        """Acknowledge an assignment that is overtaken or handed back; its request's record stays as it is."""
        request = assignment.request
        await self._end(
            keys=[
                self._keys.request(request.request_id),
                self._keys.assignments(assignment.worker_id),
                self._keys.load(assignment.worker_id),
                self._keys.decisions(request.request_id),
            ],
            args=[
                entry_id,
                WORKERS,
                NO_ATTEMPT,
                "",
                tokens,
                RETENTION_S,
                waiting_work.tenant_field(request.tenant),
            ],
        )

    async def settle(self, request_id: str, state: State) -> tuple[bool, str]:
        """End an open request whoever holds it (cancel, deadline); returns (was open, its worker)."""
        done, _, worker = await self._settle(
            keys=[self._keys.request(request_id)], args=[state.value, RETENTION_S]
        )
        return bool(done), worker.decode()

    async def standing(self, request_id: str) -> Standing | None:
        """The record now; None where it never was or its retention ended."""
        fields = ["state", "attempt", "crashes", "worker"]
        row = cast(list[bytes | None], await self._redis.hmget(self._keys.request(request_id), fields))
        state, attempt, crashes, worker = (value or b"" for value in row)
        if not state:
            return None
        return Standing(State(state.decode()), int(attempt), int(crashes), worker.decode())

    async def body(self, request_id: str) -> AdmittedRequest | None:
        """The request as last queued; None once it ended."""
        raw = cast(bytes | None, await self._redis.hget(self._keys.request(request_id), "body"))
        return AdmittedRequest.FromString(raw) if raw else None

    async def decisions(self, request_id: str) -> list[Decision]:
        """All decisions about a request, oldest first."""
        rows = cast(list[bytes], await self._redis.lrange(self._keys.decisions(request_id), 0, -1))
        return [Decision.FromString(row) for row in rows]
