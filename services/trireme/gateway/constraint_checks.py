"""Constraints are compiled before a request is admitted, in a process that can be killed."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import OrderedDict

from trireme.constraints.constraint import Constraint, constraint_of
from trireme.errors import InvalidRequest, Overloaded, ServiceUnavailable
from trireme.gateway.models import ServedModel
from trireme.wire.inference.v1.inference_pb2 import SamplingParameters

log = logging.getLogger(__name__)

WAIT_S = 20.0
"""Longest time for one constraint by the clock; of the processor's time it gets much less."""
QUEUE_S = 10.0
"""How long a constraint waits for those before it."""
REMEMBERED = 1024
"""Verdicts."""
_MOST_LINE = 1 << 20


class ConstraintChecks:
    """Asks one process, started with the first constraint; remembers what it said."""

    def __init__(self) -> None:
        self._process: Process | None = None
        self._endings: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()
        self._faults: OrderedDict[tuple[str, Constraint], str] = OrderedDict()

    async def check(
        self, model: ServedModel, sampling: SamplingParameters, *, param: str = "constraint"
    ) -> None:
        """Refuse a constraint that no engine could follow; every request passes here.

        Args:
            param: what the API calls it.

        Raises:
            InvalidRequest: it is malformed, not supported, or too costly.
            Overloaded: too many are being checked.
            ServiceUnavailable: it could not be checked.
        """
        try:
            constraint = constraint_of(sampling)
        except InvalidRequest as error:
            raise InvalidRequest(error.message, param=param) from None
        if constraint is None:
            return
        if sampling.ignore_eos:
            raise InvalidRequest(
                "ignore_eos is set, but a constraint says where the answer ends", param="ignore_eos"
            )
        if model.checkpoint is None:
            raise InvalidRequest(f"{model.name} has no tokenizer to compile constraints with")
        key = (model.name, constraint)
        fault = self._faults.get(key)
        if fault is None:
            try:
                async with asyncio.timeout(QUEUE_S):
                    await self._turn.acquire()
            except TimeoutError:
                raise Overloaded("too many constraints are being compiled", retry_after_s=1.0) from None
            try:
                fault = self._faults.get(key)
                if fault is None:
                    fault = await self._compile(model, constraint)
            finally:
                self._turn.release()
            self._faults[key] = fault
            while len(self._faults) > REMEMBERED:
                self._faults.popitem(last=False)
        self._faults.move_to_end(key)
        if fault:
            raise InvalidRequest(fault, param=param)

    async def close(self) -> None:
        """End the process."""
        self._kill()
        if self._endings:
            await asyncio.wait(self._endings)

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            ending = asyncio.create_task(_ended(process))
            self._endings.add(ending)
            ending.add_done_callback(self._endings.discard)

    async def _compile(self, model: ServedModel, constraint: Constraint) -> str:
        asked = {
            "tokens": [str(model.checkpoint), model.vocabulary_size, sorted(model.eos_token_ids)],
            "kind": constraint.kind,
            "text": constraint.text,
        }
        line = b""
        try:
            async with asyncio.timeout(WAIT_S):
                process = await self._running()
                assert process.stdin is not None and process.stdout is not None
                process.stdin.write(json.dumps(asked).encode() + b"\n")
                await process.stdin.drain()
                line = await process.stdout.readline()
                if not line:
                    await process.wait()
        except (TimeoutError, ConnectionError):
            raise _unavailable() from None
        finally:
            if not line:  # also where the client went away: the next one needs an answer of its own
                self._kill()
        if line:
            fault: str = json.loads(line)["fault"]
            return fault
        log.warning("constraint_check_died", extra={"kind": constraint.kind, "status": process.returncode})
        if (
            process.returncode is not None and process.returncode > 0
        ):  # not by a signal: not the client's fault
            raise _unavailable()
        return f"the {constraint.kind} takes too long to compile: make it smaller or less ambiguous"

    async def _running(self) -> Process:
        if self._process is not None and self._process.returncode is not None:
            self._kill()
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "trireme.constraints.check_process"),
                stdin=PIPE,
                stdout=PIPE,
                stderr=DEVNULL,
                limit=_MOST_LINE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        return self._process


def _unavailable() -> ServiceUnavailable:
    return ServiceUnavailable("constraints cannot be compiled now: try again", retry_after_s=1.0)


async def _ended(process: Process) -> None:
    await process.communicate()
