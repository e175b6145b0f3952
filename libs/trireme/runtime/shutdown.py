"""The signal that asks a process to finish."""

from __future__ import annotations

import asyncio
import signal


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
