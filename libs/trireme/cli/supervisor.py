"""Keeps the fleet's processes running on one machine: starts them, restarts them, stops them in order.

It is the subreaper of all that they start: a worker whose placement was killed becomes its
child, so none is ever out of sight.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trireme.cli.fleet_processes import ProcessSpec
from trireme.cli.readiness import Sighting
from trireme.cli.run_directory import RunDirectory, SupervisedProcess
from trireme.policies.restarts import RestartHistory, after_death
from trireme.runtime import child_processes
from trireme.runtime.child_processes import ProcessIdentity

TICK_S = 0.1
LEASE_GRACE_S = 6.0
"""A process that once had a lease may live so long without one, while Redis answers."""
REDIS_SILENCE_S = 20.0
"""Our Redis may stay silent for so long while its process lives; it answers while it replays its log."""
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(slots=True)
class Child:
    """One supervised process."""

    spec: ProcessSpec
    process: subprocess.Popen[bytes] | None = None
    identity: ProcessIdentity = field(default_factory=lambda: ProcessIdentity(0, 0.0))
    started_s: float = 0.0
    history: RestartHistory = field(default_factory=RestartHistory)
    last_exit: str = ""
    had_lease: bool = False
    silent_since_s: float | None = None
    """Since when it lives without a sign of progress."""

    @property
    def told(self) -> SupervisedProcess:
        """As the state file tells it."""
        return SupervisedProcess(
            name=self.spec.name,
            service=self.spec.service,
            pid=self.identity.pid if self.process is not None else 0,
            started_unix_s=self.identity.started_unix_s if self.process is not None else 0.0,
            restarts=self.history.restarts,
            last_exit=self.last_exit,
            crash_looping=self.history.is_crash_looping,
        )


class Supervisor:
    """Owns the children; one task ticks it."""

    def __init__(
        self, specs: Sequence[ProcessSpec], run_directory: RunDirectory, *, say: Callable[[str], None]
    ) -> None:
        self.children = [Child(spec) for spec in specs]
        self._run_directory = run_directory
        self._say = say
        self._stopping = False
        self._hurried = False
        self.changed = True
        """Set where the state file is out of date."""

    def start(self, child: Child) -> None:
        """Start one child now."""
        now_s = time.monotonic()
        spec = child.spec
        log_path = self._run_directory.log_of(spec.name)
        try:
            process = child_processes.start(spec.command, environ=spec.environ, log_path=log_path)
        except OSError as error:
            child.last_exit = f"could not start: {error}"
            child.history = after_death(child.history, lived_s=0.0, now_s=now_s)
        else:
            child.process = process
            child.identity = child_processes.identify(process.pid) or ProcessIdentity(process.pid, 0.0)
            child.started_s = now_s
            child.had_lease = False
            child.silent_since_s = None
        self.changed = True

    def tick(self) -> None:
        """Reap what ended and start again what is due."""
        now_s = time.monotonic()
        for child in self.children:
            if child.process is not None and child.process.poll() is not None:
                self._note_death(child, child.process.returncode, now_s)
        self._reap_orphans()
        if self._stopping:
            return
        for child in self.children:
            due = child.process is None and child.history.restarts > 0
            if due and now_s >= child.history.not_before_s:
                self.start(child)
                self._say(f"{child.spec.name} started again (pid {child.identity.pid})")

    def see(self, sighting: Sighting, *, redis_loads: bool = False) -> None:
        """Kill what lives without progress; the next tick starts it again."""
        now_s = time.monotonic()
        for child in self.children:
            if child.process is None:
                continue
            if child.spec.service == "redis":
                silent = not sighting.redis_answers and not redis_loads
                grace_s = REDIS_SILENCE_S
            elif not child.spec.registers or not sighting.redis_answers:
                child.silent_since_s = None
                continue
            else:
                has_lease = sighting.of_pid(child.identity.pid) is not None
                child.had_lease = child.had_lease or has_lease
                silent, grace_s = child.had_lease and not has_lease, LEASE_GRACE_S
            if not silent:
                child.silent_since_s = None
            elif child.silent_since_s is None:
                child.silent_since_s = now_s
            elif now_s - child.silent_since_s > grace_s:
                self._say(f"{child.spec.name} lives but makes no progress: killed")
                child.process.kill()
                child.silent_since_s = None

    def _note_death(self, child: Child, returncode: int, now_s: float) -> None:
        child.process = None
        child.last_exit = child_processes.describe_exit(returncode)
        child.history = after_death(child.history, lived_s=now_s - child.started_s, now_s=now_s)
        self.changed = True
        if not self._stopping:
            delay_s = max(0.0, child.history.not_before_s - now_s)
            self._say(f"{child.spec.name} died ({child.last_exit}): next start in {delay_s:.2g} s")

    def _reap_orphans(self) -> None:
        own = {child.process.pid for child in self.children if child.process is not None}
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            # One of ours that ended meanwhile is for the next tick, which tells how it ended.
            if ended is None or ended.si_pid in own:
                return
            os.waitpid(ended.si_pid, os.WNOHANG)

    def hurry(self) -> None:
        """Give nothing any more time to end."""
        self._hurried = True

    async def stop(self) -> None:
        """Stop all in order, then whatever of the fleet is left; returns when nothing lives."""
        self._stopping = True
        self.changed = True
        for rank in sorted({child.spec.stop_rank for child in self.children}):
            last = rank == max(child.spec.stop_rank for child in self.children)
            members = [child for child in self.children if child.spec.stop_rank == rank]
            if last:
                # Workers that no placement stopped must not outlive the bus.
                spared = {child.identity.pid for child in members}
                await self._stop_leftovers(spared)
            await self._stop_children(members)
        await self._stop_leftovers(set())

    async def _stop_children(self, members: Sequence[Child]) -> None:
        for child in members:
            if child.process is not None:
                child.process.terminate()
        begun_s = time.monotonic()
        while any(child.process is not None for child in members):
            self.tick()
            for child in members:
                waited_s = time.monotonic() - begun_s
                overdue = self._hurried or waited_s > child.spec.stop_timeout_s
                if overdue and child.process is not None:
                    self._say(f"{child.spec.name} did not stop in {waited_s:.0f} s: killed")
                    child.process.kill()
            await asyncio.sleep(TICK_S / 2)

    async def _stop_leftovers(self, spared: set[int]) -> None:
        def left() -> list[ProcessIdentity]:
            self.tick()
            return [found for found in self._run_directory.processes() if found.pid not in spared]

        await stop_processes(left, say=self._say, is_hurried=lambda: self._hurried)


async def stop_processes(
    left: Callable[[], list[ProcessIdentity]],
    *,
    say: Callable[[str], None],
    grace_s: float = 10.0,
    is_hurried: Callable[[], bool] = lambda: False,
) -> int:
    """Ask what `left` finds to end, kill what remains after `grace_s`; returns how many there were."""
    asked: set[int] = set()
    begun_s = time.monotonic()
    while found := left():
        overdue = is_hurried() or time.monotonic() - begun_s > grace_s
        for process in found:
            if overdue:
                child_processes.send_signal(process, signal.SIGKILL)
            elif process.pid not in asked:
                asked.add(process.pid)
                child_processes.send_signal(process, signal.SIGTERM)
        if overdue:
            say(f"killed {len(found)} processes that were left")
        await asyncio.sleep(0.1)
    return len(asked)


def become_subreaper() -> None:
    """Orphans among the descendants become children of this process (Linux; elsewhere of init)."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot become the subreaper of the fleet's processes")
