"""The loop that makes the living workers equal to the desired ones: look, plan, act, again."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable

from trireme.bus.connection import AWAY
from trireme.bus.registry import Registry
from trireme.bus.streams import Stream
from trireme.placement.desired import DesiredFleet
from trireme.placement.process_table import ProcessTable, WorkerProcess
from trireme.placement.variant_loader import VariantLoader
from trireme.policies.placement import (
    Action,
    DrainWorker,
    KillWorker,
    Limits,
    LoadVariant,
    StartWorker,
    UnloadVariant,
    plan,
)
from trireme.runtime.child_processes import send_signal
from trireme.runtime.clock import Clock
from trireme.runtime.health import Health
from trireme.wire.bus.v1 import facts_pb2 as facts

log = logging.getLogger(__name__)

STALLED_S = 10.0
"""A loop that did not look for so long makes no progress."""
REGISTRY_TIMEOUT_S = 1.0
LOG_CHECK_S = 5.0


class Reconciler:
    """Owns the process table; everything that changes it goes through here."""

    def __init__(
        self,
        *,
        desired: DesiredFleet,
        table: ProcessTable,
        registry: Registry,
        directives: Stream[facts.Directive],
        loader: VariantLoader,
        limits: Limits,
        clock: Clock,
        period_s: float,
        load_retry_s: float,
    ) -> None:
        self.table = table
        self.actions: Counter[str] = Counter()
        self.recent: deque[str] = deque(maxlen=32)
        self._desired = desired
        self._registry = registry
        self._directives = directives
        self._loader = loader
        self._limits = limits
        self._clock = clock
        self._period_s = period_s
        self._load_retry_s = load_retry_s
        self._wake = asyncio.Event()
        self._looked_at_s = clock.monotonic_s()
        self._changes: set[asyncio.Task[None]] = set()

    def health(self) -> Health:
        """Progress: the age of the last look."""
        age_s = self._clock.monotonic_s() - self._looked_at_s
        if age_s > STALLED_S:
            return Health(healthy=False, status=f"looked at the fleet {age_s:.0f} s ago")
        return Health(healthy=True)

    def wake(self) -> None:
        """Look at once: the desired fleet changed."""
        self._wake.set()

    def adopt(self) -> None:
        """Take over the workers that a killed placement left behind."""
        for process in self.table.adopt(now_s=self._clock.monotonic_s()):
            pid = process.identity.pid
            self._note("adopt", f"adopted {process.group}-{process.index} (pid {pid})")

    async def run(self) -> None:
        """Reconcile for ever."""
        checked_logs_s = 0.0
        while True:
            await self.step()
            now_s = self._clock.monotonic_s()
            if now_s - checked_logs_s > LOG_CHECK_S:
                self.table.bound_logs()
                checked_logs_s = now_s
            self._wake.clear()
            try:
                async with asyncio.timeout(self._period_s):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def step(self) -> None:
        """Look, plan and act once."""
        await self._look()
        now_s = self._clock.monotonic_s()
        own = {}
        for process in self.table.living:
            variants = self._desired.own_variants(process.worker_id)
            if variants is not None:
                own[process.worker_id] = variants
        actions = plan(
            self._desired.targets(),
            self.table.snapshots(own, now_s=now_s),
            limits=self._limits,
            waiting=self.table.waiting_s(now_s=now_s),
        )
        for action in actions:
            await self._act(action)
        self._looked_at_s = self._clock.monotonic_s()

    async def _look(self) -> None:
        for process, how in self.table.reap(now_s=self._clock.monotonic_s()):
            self._desired.forget_worker(process.worker_id)
            name = f"{process.group}-{process.index}"
            fields = {"worker": name, "pid": process.identity.pid, "how": how}
            log.log(logging.INFO if process.draining_at_s else logging.WARNING, "worker_ended", extra=fields)
            self.recent.appendleft(f"{_hour()} ended {name}: {how}")
        try:
            async with asyncio.timeout(REGISTRY_TIMEOUT_S):
                records = await self._registry.living("worker")
        except AWAY:
            self.table.registry_was_away(now_s=self._clock.monotonic_s())
        else:
            self.table.see_records(records, now_s=self._clock.monotonic_s())

    async def _act(self, action: Action) -> None:
        now_s = self._clock.monotonic_s()
        match action:
            case StartWorker(group, index, reason):
                try:
                    started = self.table.start(group, index, now_s=now_s)
                except OSError as error:
                    self.table.could_not_start(group, index, str(error), now_s=now_s)
                    self._note("fail", f"cannot start {group}-{index}: {error}")
                else:
                    self._note("start", f"started {group}-{index} (pid {started.identity.pid}): {reason}")
            case DrainWorker(pid, reason):
                await self.drain(self.table.by_pid(pid), reason)
            case KillWorker(pid, reason):
                process = self.table.by_pid(pid)
                self.table.kill(process, reason)
                self._note("kill", f"killed {process.group}-{process.index} (pid {pid}): {reason}")
            case LoadVariant(pid, variant, reason):
                process = self.table.by_pid(pid)
                self._note("load", f"loading {variant} at {process.worker_id}: {reason}")
                self._change(process, lambda: self._loader.load(process.worker_address, variant))
            case UnloadVariant(pid, variant, reason):
                process = self.table.by_pid(pid)
                self._note("unload", f"unloading {variant} at {process.worker_id}: {reason}")
                self._change(process, lambda: self._loader.unload(process.worker_address, variant))

    async def drain(self, process: WorkerProcess, reason: str) -> None:
        """Tell a worker to finish and exit, and the schedulers to send it nothing more."""
        self.table.drain(process, now_s=self._clock.monotonic_s())
        name = process.worker_id or f"{process.group}-{process.index}"
        self._note("drain", f"draining {name} (pid {process.identity.pid}): {reason}")
        if not process.worker_id:
            return
        now_unix_s = self._clock.unix_s()
        directive = facts.Directive(
            id=f"drain-{process.worker_id}",
            at_unix_s=now_unix_s,
            drain=facts.DrainWorker(worker_id=process.worker_id),
        )
        try:
            async with asyncio.timeout(REGISTRY_TIMEOUT_S):
                await self._directives.publish(directive)
        except AWAY:
            # The worker says so itself in its record; the directive is only sooner.
            log.warning("drain_not_announced", extra={"worker_id": process.worker_id})

    def _change(self, process: WorkerProcess, change: Callable[[], Awaitable[None]]) -> None:
        async def carry_out() -> None:
            try:
                await change()
                process.load_error = ""
            except self._loader.failures as error:
                process.load_error = self._loader.explain(error)
                process.load_retry_at_s = self._clock.monotonic_s() + self._load_retry_s
                self._note("fail", f"{process.worker_id}: {process.load_error}")
            finally:
                process.loading = False
                # Its record must show the change before the next plan asks for it again.
                settled_s = self._clock.monotonic_s() + 2.0
                process.load_retry_at_s = max(process.load_retry_at_s, settled_s)

        process.loading = True
        task = asyncio.create_task(carry_out())
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)

    async def stop_workers(self, *, timeout_s: float) -> None:
        """Drain all workers, then kill what is left after `timeout_s`; returns when none lives."""
        for process in list(self.table.living):
            if process.draining_at_s is None:
                await self.drain(process, "placement stops")
            else:
                send_signal(process.identity, signal.SIGTERM)
        deadline_s = self._clock.monotonic_s() + timeout_s
        while self.table.living:
            self._looked_at_s = self._clock.monotonic_s()
            self.table.reap(now_s=self._looked_at_s)
            if self._clock.monotonic_s() > deadline_s:
                for process in self.table.living:
                    if not process.killed_because:
                        self.table.kill(process, f"did not end within {timeout_s:.0f} s of SIGTERM")
            await asyncio.sleep(0.05)

    def _note(self, kind: str, line: str) -> None:
        self.actions[kind] += 1
        self.recent.appendleft(f"{_hour()} {line}")
        log.info("placement_action", extra={"kind": kind, "line": line})


def _hour() -> str:
    return time.strftime("%H:%M:%SZ", time.gmtime())
