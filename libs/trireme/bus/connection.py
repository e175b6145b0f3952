"""Connections to Redis, and the names of everything kept there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote, urlencode, urlsplit, urlunsplit

from redis import CredentialProvider
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import (
    BusyLoadingError,
    ConnectionError,
    MasterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TimeoutError,
)

log = logging.getLogger(__name__)

R = TypeVar("R")

ANSWER_S = 5.0
"""A reply that takes longer never comes: the host went away without a word. Blocking reads ask for less."""

AWAY = (ConnectionError, TimeoutError, BusyLoadingError, OSError)
"""What the client raises while Redis is away, replays its log or takes no writes."""

_REFUSALS = (OutOfMemoryError, ReadOnlyError, MasterDownError)
_REFUSAL_WORDS = ("MISCONF", "NOREPLICAS", "-OOM", "-READONLY", "-MASTERDOWN")
"""As they stand in a script's error, or where the client has no class for them."""


@dataclass(frozen=True, slots=True)
class Keys:
    """Redis keys of one fleet; fleets that share a server differ in `prefix`."""

    prefix: str

    @property
    def requests(self) -> str:
        return f"{self.prefix}:requests"

    @property
    def waiting(self) -> str:
        """Hash: what waits in `requests`, by tenant, and by model, urgency and tenant."""
        return f"{self.prefix}:waiting"

    @property
    def served(self) -> str:
        """Hash: what has left `requests` for a worker since ever, by model."""
        return f"{self.prefix}:served"

    @property
    def events(self) -> str:
        return f"{self.prefix}:events"

    @property
    def measurements(self) -> str:
        return f"{self.prefix}:measurements"

    @property
    def directives(self) -> str:
        return f"{self.prefix}:directives"

    @property
    def residency(self) -> str:
        return f"{self.prefix}:residency"

    def assignments(self, worker_id: str) -> str:
        return f"{self.prefix}:assignments:{worker_id}"

    def hints(self, node: str) -> str:
        return f"{self.prefix}:hints:{node}"

    def request(self, request_id: str) -> str:
        """Hash: the record of one request."""
        return f"{self.prefix}:request:{request_id}"

    def decisions(self, request_id: str) -> str:
        """List: the scheduler's decisions for one request."""
        return f"{self.prefix}:decisions:{request_id}"

    def load(self, worker_id: str) -> str:
        """Hash: requests and tokens assigned to a worker and not ended, and requests by tenant."""
        return f"{self.prefix}:load:{worker_id}"

    @property
    def assigned_workers(self) -> str:
        """Set: workers that may hold assignments."""
        return f"{self.prefix}:assigned-workers"

    @property
    def virtual_tokens(self) -> str:
        """Hash: weighted tokens served, by tenant."""
        return f"{self.prefix}:virtual-tokens"

    @property
    def processes(self) -> str:
        """Sorted set: ids of registered processes, scored by the end of their lease."""
        return f"{self.prefix}:processes"

    def process(self, process_id: str) -> str:
        """String with a time to live: the ProcessRecord of a living process."""
        return f"{self.prefix}:process:{process_id}"

    def quota(self, tenant: str) -> str:
        """Hash: what a tenant has left of its requests and tokens a minute."""
        return f"{self.prefix}:quota:{tenant}"

    def lock(self, name: str) -> str:
        return f"{self.prefix}:lock:{name}"

    def ledger(self, name: str) -> str:
        return f"{self.prefix}:ledger:{name}"

    def work(self, kind: str) -> str:
        """Sorted set: open work of a kind, scored by the end of its holder's lease."""
        return f"{self.prefix}:work:{kind}"

    def work_holders(self, kind: str) -> str:
        """Hash: who holds which work."""
        return f"{self.prefix}:work-holders:{kind}"

    def kept(self, kind: str, object_id: str = "") -> str:
        """One stored object (a response, a file, a batch); without an id, what all of them begin with."""
        return f"{self.prefix}:{kind}:{object_id}"

    def shelf(self, kind: str, tenant: str) -> str:
        """Sorted set: a tenant's stored objects of a kind, by age."""
        return f"{self.prefix}:{kind}-of:{tenant}"

    def shelf_of_all(self, kind: str) -> str:
        """Sorted set: all tenants' stored objects of a kind, by when they expire."""
        return f"{self.prefix}:{kind}-of-all"

    def shelf_sizes(self, kind: str, tenant: str) -> str:
        """Hash: their sizes in bytes by id, and under `*` the sum."""
        return f"{self.prefix}:{kind}-bytes-of:{tenant}"


class BusRefuses(ConnectionError):
    """Redis answers but takes no writes: its disk or memory is full, or it is a replica now."""


def _as_away(error: ResponseError) -> ResponseError | BusRefuses:
    """A refusal that passes with time as one of `AWAY`; other errors as they are."""
    if isinstance(error, _REFUSALS) or any(word in str(error) for word in _REFUSAL_WORDS):
        return BusRefuses(str(error))
    return error


class _BusPipeline(Pipeline):
    """A pipeline whose refusals are `AWAY`."""

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        try:
            return await super().execute(raise_on_error)
        except ResponseError as error:
            raise _as_away(error) from error


class _BusRedis(Redis):
    """A client whose refusals are `AWAY`, and whose commands end with their task's cancellation, always.

    Where a reply arrives in the same turn of the loop as a cancellation, the library (on
    Python 3.11) returns the reply and the cancellation is lost: a loop that reads for ever
    would then never end.
    """

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:
        return _BusPipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        task = asyncio.current_task()
        before = task.cancelling() if task is not None else 0
        try:
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        except ResponseError as error:
            raise _as_away(error) from error
        finally:
            # Compared, since a task that cleans up after its cancellation may still talk to Redis.
            if task is not None and task.cancelling() > before:
                raise asyncio.CancelledError


class _PasswordFile(CredentialProvider):
    """User and password of each new connection, the password read from a file that may change."""

    def __init__(self, user: str | None, path: Path) -> None:
        self._user = user
        self._path = path

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        try:
            password = self._path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConnectionError(f"cannot read the password in {self._path}: {error}") from error
        return (self._user, password) if self._user else (password,)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        return self.get_credentials()


def redis_options(url: str) -> tuple[str, dict[str, Any]]:
    """A URL as the client library takes it, and what it has beside.

    A `password_file` in the URL's query names a file with the password, which is read at each new
    connection. All else stands in the URL as the library has it: `rediss://` for TLS, the user, and in
    the query `ssl_ca_certs`, `ssl_certfile` and `ssl_keyfile`.
    """
    parts = urlsplit(url)
    query = parse_qs(parts.query)
    files = query.pop("password_file", None)
    if not files:
        return url, {}
    user = unquote(parts.username) if parts.username else None
    place = parts.netloc.rpartition("@")[2]
    bare = urlunsplit(parts._replace(netloc=place, query=urlencode(query, doseq=True)))
    return bare, {"credential_provider": _PasswordFile(user, Path(files[-1]))}


@asynccontextmanager
async def open_redis(url: str, *, max_connections: int = 64) -> AsyncIterator[Redis]:
    """A client that retries a command for about two seconds while Redis is away.

    More commands at once than `max_connections` wait for their turn. A repeated command may run
    twice; the fleet's scripts are idempotent by attempt number.
    """
    bare, credentials = redis_options(url)
    pool = BlockingConnectionPool.from_url(
        bare,
        **credentials,
        max_connections=max_connections,
        timeout=ANSWER_S,
        socket_connect_timeout=2.0,
        socket_timeout=ANSWER_S,
        socket_keepalive=True,
        health_check_interval=0,
        retry=Retry(ExponentialBackoff(cap=0.5, base=0.02), retries=8),
        retry_on_error=[ConnectionError, TimeoutError, BusyLoadingError],
    )
    client: Redis = _BusRedis.from_pool(pool)
    try:
        yield client
    finally:
        await client.aclose()


async def persistently(action: Callable[[], Awaitable[R]], *, what: str, pause_s: float = 0.25) -> R:
    """Repeat `action` until Redis answers; logs the first failure and the recovery."""
    failures = 0
    while True:
        try:
            result = await action()
        except AWAY as error:
            if failures == 0:
                log.warning("redis_away", extra={"during": what, "error": str(error)})
            failures += 1
            await asyncio.sleep(pause_s)
        else:
            if failures:
                log.info("redis_back", extra={"during": what, "failures": failures})
            return result
