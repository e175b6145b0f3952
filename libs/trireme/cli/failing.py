"""How a command fails: one line that says what to change, and an exit status; no traceback."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

USAGE, FAILURE, INTERRUPTED = 2, 1, 130
"""Exit statuses: wrong flags or configuration; it did not work; Ctrl-C."""


def failing_clearly(command: Callable[P, R]) -> Callable[P, R]:
    """Turn what the fleet can answer, and what the network does, into one line and a status."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        from trireme.errors import InvalidConfiguration, TriremeError

        try:
            return command(*args, **kwargs)
        except InvalidConfiguration as error:
            fail(error.message, status=USAGE)
        except TriremeError as error:
            fail(error.message)
        except KeyboardInterrupt:
            fail("interrupted", status=INTERRUPTED)
        except BrokenPipeError:
            raise SystemExit(FAILURE) from None
        except Exception as error:
            line = _network_failure(error)
            if line is None:
                raise
            fail(line)

    return run


def fail(line: str, *, status: int = FAILURE) -> NoReturn:
    """Say one line on standard error and exit."""
    print(f"trireme: {line}", file=sys.stderr)
    raise SystemExit(status)


def _network_failure(error: Exception) -> str | None:
    """One line where the fleet could not be reached or refused; None for a bug of ours."""
    import grpc
    from redis.exceptions import RedisError

    if isinstance(error, grpc.RpcError):
        code = getattr(error, "code", lambda: grpc.StatusCode.UNKNOWN)()
        details = getattr(error, "details", lambda: str(error))() or "no details"
        if code == grpc.StatusCode.UNAVAILABLE:
            return f"the fleet does not answer ({details}): is it up? see `trireme status`"
        return f"{details} ({code.name})"
    if isinstance(error, RedisError):
        return f"the bus does not answer ({error}): is the fleet up? see `trireme status`"
    if isinstance(error, OSError):
        return str(error)
    return None
