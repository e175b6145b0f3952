"""One run of the fleet, from the first process to the last: what `trireme up` does."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import secrets
import signal
import time
from collections.abc import Callable
from pathlib import Path

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError

from trireme.bus.connection import AWAY, Keys, redis_options
from trireme.cli.fleet_processes import FleetPlan, plan_processes
from trireme.cli.placement_client import crash_looping_workers
from trireme.cli.readiness import LOOK_TIMEOUT_S, Sighting, health_of, look
from trireme.cli.redis_server import prepare
from trireme.cli.run_directory import FleetState, Phase, RunDirectory
from trireme.cli.supervisor import TICK_S, Child, Supervisor, become_subreaper
from trireme.cli.tls_directory import speak_as_fleet
from trireme.errors import ServiceUnavailable
from trireme.runtime.child_processes import bound_log, identify, last_lines
from trireme.runtime.fleet import Fleet

LOOK_S = 0.5
"""Between two looks at the registry."""
LOG_CHECK_S = 5.0
HOPELESS_DEATHS = 4
"""So many quick deaths before the fleet was ever ready: the start has failed."""

Say = Callable[[str], None]


async def run_fleet(
    fleet: Fleet,
    path: Path,
    run_directory: RunDirectory,
    *,
    ready_timeout_s: float,
    say: Say,
    on_ready: Callable[[FleetState], None],
) -> None:
    """Run until SIGTERM or SIGINT; then stop everything in order.

    Raises:
        AlreadyRunning: the run directory is in use.
        ServiceUnavailable: the fleet was not ready in time; everything was stopped again.
    """
    run_directory.create()
    with run_directory.held():
        become_subreaper()
        run_id = secrets.token_hex(6)
        server = None
        if fleet.redis.url is None:
            server = prepare(run_directory.redis_data, durability=fleet.redis.durability)
        plan = plan_processes(fleet, path, run_directory, run_id=run_id, redis=server)
        runner = _Runner(plan, path, run_directory, say)
        await runner.run(ready_timeout_s=ready_timeout_s, on_ready=on_ready)


class _Runner:
    def __init__(self, plan: FleetPlan, path: Path, run_directory: RunDirectory, say: Say) -> None:
        self._plan = plan
        self._run_directory = run_directory
        self._say = say
        self._supervisor = Supervisor(plan.specs, run_directory, say=say)
        self._begun_s = time.monotonic()
        own = identify(os.getpid())
        gateways = [spec for spec in plan.specs if spec.service == "gateway"]
        self._state = FleetState(
            phase="starting",
            run_id=plan.run_id,
            fleet=str(path),
            node=plan.fleet.node,
            bus_prefix=plan.bus_prefix,
            redis_url=plan.redis_url,
            http=[spec.environ["TRIREME_GATEWAY_HTTP_LISTEN"] for spec in gateways],
            grpc=[spec.grpc_address for spec in gateways],
            operator=plan.fleet.gateway.operator or "",
            tls=str(plan.fleet.tls.directory) if plan.fleet.tls is not None else "",
            supervisor_pid=os.getpid(),
            supervisor_started_unix_s=own.started_unix_s if own is not None else 0.0,
        )
        speak_as_fleet(self._state.tls, over_environment=True)
        url, credentials = redis_options(plan.redis_url)
        self._redis = Redis.from_url(
            url,
            **credentials,
            socket_connect_timeout=LOOK_TIMEOUT_S,
            socket_timeout=LOOK_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )

    async def run(self, *, ready_timeout_s: float, on_ready: Callable[[FleetState], None]) -> None:
        stop = asyncio.Event()

        def ask_to_stop() -> None:
            if stop.is_set():
                self._say("asked twice: killing what is left")
                self._supervisor.hurry()
            stop.set()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ask_to_stop)
        ticking = asyncio.create_task(self._tick())
        serving = asyncio.create_task(self._serve(ready_timeout_s, on_ready))
        stopping = asyncio.create_task(stop.wait())
        tasks = [ticking, serving, stopping]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        # Whatever went wrong: first everything is stopped, then it is told.
        failures = [error for task in tasks if not task.cancelled() and (error := task.exception())]
        told = "".join(str(error) for error in failures[:1])
        self._change(phase="failed" if failures else "stopping", error=told)
        await self._supervisor.stop()
        await self._redis.aclose()
        self._change(phase="failed" if failures else "stopped")
        if failures:
            raise failures[0]

    async def _serve(self, ready_timeout_s: float, on_ready: Callable[[FleetState], None]) -> None:
        await self._start(ready_timeout_s)
        on_ready(self._state)
        await self._watch()

    async def _tick(self) -> None:
        checked_logs_s = 0.0
        while True:
            self._supervisor.tick()
            if self._supervisor.changed:
                self._supervisor.changed = False
                self._change()
            now_s = time.monotonic()
            if now_s - checked_logs_s > LOG_CHECK_S:
                for log_path in self._run_directory.logs.glob("*.log"):
                    bound_log(log_path)
                checked_logs_s = now_s
            await asyncio.sleep(TICK_S)

    async def _start(self, timeout_s: float) -> None:
        """Start everything; returns when all of it is ready."""
        children = self._supervisor.children
        deadline_s = self._begun_s + timeout_s
        ours = [child for child in children if child.spec.service == "redis"]
        for child in ours:
            self._supervisor.start(child)
        while not await self._redis_answers():
            self._check_hope(ours, deadline_s, "redis")
            await asyncio.sleep(0.02)
        self._done("redis")
        for child in children:
            if child not in ours:
                self._supervisor.start(child)
        done: set[str] = {"redis"}
        while True:
            sighting = await look(self._redis, Keys(self._plan.bus_prefix))
            self._supervisor.see(sighting)
            missing = await self._missing(sighting)
            for name in self._names():
                if name not in missing and name not in done:
                    done.add(name)
                    self._done(name)
            if not missing:
                break
            self._change(waiting_for=", ".join(missing.values()))
            self._check_hope(children, deadline_s, self._state.waiting_for)
            await self._check_workers(sighting)
            await asyncio.sleep(0.1)
        self._done("ready")
        self._change(phase="ready", waiting_for="")

    def _names(self) -> list[str]:
        return [*(spec.name for spec in self._plan.specs), "workers"]

    async def _missing(self, sighting: Sighting) -> dict[str, str]:
        """What is not ready yet: name -> one phrase."""
        missing = {}
        for child in self._supervisor.children:
            spec, record = child.spec, sighting.of_pid(child.identity.pid)
            if not spec.registers:
                continue
            if child.process is None:
                missing[spec.name] = f"{spec.name} ({child.last_exit})"
            elif record is None or not record.healthy:
                missing[spec.name] = spec.name
            elif spec.grpc_address and spec.name not in {p.name for p in self._state.timeline}:
                health = await health_of(spec.grpc_address, is_gateway=True)
                if health != "SERVING":
                    missing[spec.name] = f"{spec.name} ({health})"
        wanted = sum(group.replicas for group in self._plan.fleet.workers)
        ready = sighting.ready_workers
        if ready < wanted:
            missing["workers"] = f"workers ({ready} of {wanted} ready)"
        return missing

    def _check_hope(self, children: list[Child], deadline_s: float, waiting_for: str) -> None:
        for child in children:
            if child.history.quick_deaths >= HOPELESS_DEATHS:
                raise ServiceUnavailable(self._does_not_start(child.spec.name, child.last_exit))
        if time.monotonic() > deadline_s:
            raise ServiceUnavailable(
                f"not ready in time: still waiting for {waiting_for}; "
                f"look into {self._run_directory.logs}, or give it longer with --timeout"
            )

    async def _check_workers(self, sighting: Sighting) -> None:
        for name, last_exit in await crash_looping_workers(sighting.records, deaths=HOPELESS_DEATHS):
            raise ServiceUnavailable(self._does_not_start(name, last_exit))

    def _does_not_start(self, name: str, last_exit: str) -> str:
        log_path = self._run_directory.log_of(name)
        tail = last_lines(log_path, count=1)
        why = f"; its log {log_path} ends with: {tail[-1]}" if tail else ""
        return f"{name} does not start ({last_exit}){why}"

    async def _watch(self) -> None:
        """Look for what lives without progress, for ever."""
        while True:
            sighting = await look(self._redis, Keys(self._plan.bus_prefix))
            loads = not sighting.redis_answers and await self._redis_loads()
            self._supervisor.see(sighting, redis_loads=loads)
            await asyncio.sleep(LOOK_S)

    async def _redis_answers(self) -> bool:
        try:
            async with asyncio.timeout(LOOK_TIMEOUT_S):
                await self._redis.ping()
        except AWAY:
            return False
        return True

    async def _redis_loads(self) -> bool:
        try:
            async with asyncio.timeout(LOOK_TIMEOUT_S):
                await self._redis.ping()
        except BusyLoadingError:
            return True
        except AWAY:
            return False
        return True

    def _done(self, name: str) -> None:
        phase = Phase(name, round(time.monotonic() - self._begun_s, 3))
        self._change(timeline=[*self._state.timeline, phase])

    def _change(self, **fields: object) -> None:
        processes = [child.told for child in self._supervisor.children]
        state = dataclasses.replace(self._state, processes=processes, **fields)  # type: ignore[arg-type]
        if state != self._state:
            self._state = state
            try:
                self._run_directory.write(state)
            except OSError as error:
                self._say(f"cannot write {self._run_directory.state_file}: {error.strerror}")
