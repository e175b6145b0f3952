"""`python -m trireme.worker.engine_process`: the engines of one worker, in a process of their own.

Only the worker starts it. It ends when the worker does, however that ends: the kernel kills it with its
parent, and the socket between them closes. Signals that ask processes to stop are the worker's business.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import socket
import sys

from trireme.runtime.telemetry import configure_logging

log = logging.getLogger(__name__)

EXIT_ENGINE_BROKEN = 70
"""Exit status after an error that no fault barrier caught: what was in flight counts a crash."""
THREADS_SLEEP = {"OMP_WAIT_POLICY": "passive"}
"""For the environment, before torch is loaded: else its threads go on spinning for milliseconds when they
have nothing to do, on the cores that the kernels' own threads need."""
_PR_SET_PDEATHSIG = 1


def command(*, link: int, threads: int, patience_s: float, log_level: str) -> list[str]:
    """Words that start this process; `link` is a descriptor that it inherits."""
    return [
        sys.executable,
        "-m",
        "trireme.worker.engine_process",
        *("--link", str(link), "--parent", str(os.getpid()), "--threads", str(threads)),
        *("--patience", str(patience_s), "--log-level", log_level),
    ]


def die_with(parent_pid: int) -> None:
    """Be killed when the parent's main thread ends; at once, if it has ended already."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "cannot tie the engine's life to the worker's")
    if os.getppid() != parent_pid:
        sys.exit("the worker is gone")


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--link", "--parent", "--threads"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--patience", type=float, default=0.5)
    parser.add_argument("--log-level", default="info")
    arguments = parser.parse_args()
    die_with(arguments.parent)
    configure_logging("engine", level=arguments.log_level)
    for name, value in THREADS_SLEEP.items():
        os.environ.setdefault(name, value)
    try:
        # Importing torch takes seconds: not before the worker's death would be noticed.
        from trireme.worker.engine_loop import EngineLoop

        link = socket.socket(fileno=arguments.link)
        EngineLoop(link, threads=arguments.threads, patience_s=arguments.patience).run()
    except BaseException:
        log.critical("engine_broken", exc_info=True)
        logging.shutdown()
        os._exit(EXIT_ENGINE_BROKEN)
    # Threads of the numeric library, or a model half loaded, must not hold up the end.
    logging.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main()
