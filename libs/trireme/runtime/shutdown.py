"""The signal that asks a process to finish, and the end of its tasks."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterable
from typing import Any


async def stop_requested() -> None:
    """Return at the first SIGTERM or SIGINT; a second SIGINT ends the process at once."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def request_stop(number: signal.Signals) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, request_stop, number)
    await stop.wait()


async def end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel the tasks until they have ended; their failures are not looked at.

    Once is not enough: Python 3.11's `asyncio.wait_for`, which the Redis client uses, forgets a
    cancellation that meets the awaited result.
    """
    waiting = {task for task in tasks if not task.done()}
    while waiting:
        for task in waiting:
            task.cancel()
        _, waiting = await asyncio.wait(waiting, timeout=0.2)
