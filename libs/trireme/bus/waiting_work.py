"""What waits in `requests`, counted by the scripts that put requests there and take them away.

One entry of the stream is counted once: when it is added, and when it is deleted. An admission that finds
the stream empty forgets all counts, so that what a lost or foreign entry left behind does not last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from redis.asyncio import Redis

from trireme.bus.connection import Keys
from trireme.wire.bus.v1.facts_pb2 import AdmittedRequest
from trireme.wire.inference.v1.inference_pb2 import SloClass

URGENCY: Mapping[SloClass.ValueType, int] = {
    SloClass.SLO_CLASS_INTERACTIVE: 0,
    SloClass.SLO_CLASS_UNSPECIFIED: 1,
    SloClass.SLO_CLASS_STANDARD: 1,
    SloClass.SLO_CLASS_BATCH: 2,
}
"""0 goes first."""

JOIN = """
local function join(waiting, tenant, requests, backlog, tokens)
  redis.call('HINCRBY', waiting, tenant, 1)
  redis.call('HINCRBY', waiting, requests, 1)
  redis.call('HINCRBY', waiting, backlog, tokens)
end
"""
"""Counts a request; the other words are those of `words`."""
LEAVE = """
local function take(waiting, field, amount)
  if redis.call('HINCRBY', waiting, field, -tonumber(amount)) <= 0 then
    redis.call('HDEL', waiting, field)
  end
end
local function leave(waiting, tenant, requests, backlog, tokens)
  take(waiting, tenant, 1)
  take(waiting, requests, 1)
  take(waiting, backlog, tokens)
end
local function note_served(served, model, tokens)
  redis.call('HINCRBY', served, 'r|' .. model, 1)
  redis.call('HINCRBY', served, 't|' .. model, tokens)
end
"""


@dataclass(frozen=True, slots=True)
class WaitingKey:
    """Whose requests: one tenant's, for one model or variant, at one urgency."""

    model: str
    urgency: int
    tenant: str


@dataclass(frozen=True, slots=True)
class WaitingWork:
    """What waits, and what has left the queue for workers since ever."""

    entries: int
    """Requests in the stream."""
    tenant_requests: Mapping[str, int]
    requests: Mapping[WaitingKey, int]
    tokens: Mapping[WaitingKey, int]
    """Expected tokens."""
    served_requests: Mapping[str, int]
    """By model or variant, as it was asked for."""
    served_tokens: Mapping[str, int]
    assigned_requests: Mapping[str, int]
    """By worker: assigned and not ended."""


def work_tokens(request: AdmittedRequest) -> int:
    """Prompt and answer tokens that a request may cost, an upper estimate."""
    choices = max(1, request.sampling.n)
    return len(request.prompt_token_ids) + choices * request.sampling.max_tokens


def expected_tokens(request: AdmittedRequest) -> int:
    """Prompt and answer tokens that a request will probably cost, as its gateway thought; at least 1."""
    return max(1, request.expected_tokens or work_tokens(request))


def tenant_field(tenant: str) -> str:
    """Where a hash counts a tenant's requests."""
    return f"n|{tenant}"


def requests_by_tenant(loads: Iterable[Mapping[bytes, bytes]]) -> dict[str, int]:
    """The sum of what workers' load hashes count."""
    found: dict[str, int] = {}
    for load in loads:
        for field, count in load.items():
            if field.startswith(b"n|"):
                tenant = field[2:].decode()
                found[tenant] = found.get(tenant, 0) + int(count)
    return found


def words(request: AdmittedRequest) -> list[str | int]:
    """What the scripts need to count a request: tenant's field, requests' field, backlog's field, tokens."""
    where = f"{request.model}|{URGENCY.get(request.slo_class, 1)}|{request.tenant}"
    return [tenant_field(request.tenant), f"r|{where}", f"t|{where}", expected_tokens(request)]


async def read_waiting(redis: Redis, keys: Keys, worker_ids: Sequence[str]) -> WaitingWork:
    """One look at the queue, and at what these workers have of it."""
    async with redis.pipeline(transaction=True) as pipe:
        pipe.xlen(keys.requests)
        pipe.hgetall(keys.waiting)
        pipe.hgetall(keys.served)
        for worker_id in worker_ids:
            pipe.hget(keys.load(worker_id), "requests")
        entries, waiting, served, *assigned = await pipe.execute()
    tenants: dict[str, int] = {}
    counted: dict[str, dict[WaitingKey, int]] = {"r": {}, "t": {}}
    for field, value in cast(dict[bytes, bytes], waiting).items() if entries else ():
        kind, _, rest = field.decode().partition("|")
        if kind == "n":
            tenants[rest] = int(value)
        elif kind in counted:
            model, urgency, tenant = rest.split("|", 2)
            counted[kind][WaitingKey(model, int(urgency), tenant)] = int(value)
    left: dict[str, dict[str, int]] = {"r": {}, "t": {}}
    for field, value in cast(dict[bytes, bytes], served).items():
        kind, _, model = field.decode().partition("|")
        left[kind][model] = int(value)
    return WaitingWork(
        entries=int(entries),
        tenant_requests=tenants,
        requests=counted["r"],
        tokens=counted["t"],
        served_requests=left["r"],
        served_tokens=left["t"],
        assigned_requests={name: int(value or 0) for name, value in zip(worker_ids, assigned, strict=True)},
    )
