"""The audit log: who did what, with what outcome. A JSON line per call; never a prompt or an answer.

Lines are written by a thread from a bounded queue, into files of bounded size and number. Where
the disk cannot keep up, lines are dropped, and the next one says how many.
"""

from __future__ import annotations

import json
import logging
import queue
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from logging.handlers import RotatingFileHandler

log = logging.getLogger(__name__)

STANDARD_OUTPUT = "-"
MAX_QUEUED = 8192
MAX_REQUESTS = 64
"""Requests of one call that are named; a call of more says how many."""


@dataclass(slots=True, kw_only=True)
class AuditedCall:
    """What is known of a call so far."""

    call: str
    """`POST /v1/chat/completions`, or an RPC's full name."""
    peer: str = ""
    tenant: str = ""
    """Empty: nobody known."""
    key_id: str = ""
    outcome: str = "cancelled"
    """HTTP status or error code; `ok` for RPCs."""
    model: str = ""
    request_ids: list[str] = field(default_factory=list)
    requests: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    begun_unix_s: float = field(default_factory=time.time)

    def note_request(self, request_id: str, model: str) -> None:
        """The call asked for this."""
        self.model = model
        self.requests += 1
        if len(self.request_ids) < MAX_REQUESTS:
            self.request_ids.append(request_id)

    def line(self, dropped: int) -> str:
        """As it is written."""
        fields: dict[str, object] = {
            "time_unix_s": round(self.begun_unix_s, 3),
            "seconds": round(time.time() - self.begun_unix_s, 3),
            "tenant": self.tenant,
            "key": self.key_id,
            "peer": self.peer,
            "call": self.call,
            "outcome": self.outcome,
        }
        if self.requests:
            fields |= {
                "model": self.model,
                "requests": self.requests,
                "request_ids": self.request_ids,
                "prompt_tokens": self.prompt_tokens,
                "answer_tokens": self.answer_tokens,
            }
        if dropped:
            fields["dropped_before"] = dropped
        return json.dumps(fields)


_CALL: ContextVar[AuditedCall | None] = ContextVar("trireme_audited_call", default=None)


def current_call() -> AuditedCall | None:
    """The call that is being handled; None for work that no call waits for."""
    return _CALL.get()


class AuditLog:
    """Where the lines go."""

    def __init__(self, place: str, *, max_bytes: int, max_files: int) -> None:
        """`place` is a file, `-` for standard output, or empty for nowhere.

        Raises:
            OSError: the file cannot be written.
        """
        self._handler: logging.Handler | None = None
        if place == STANDARD_OUTPUT:
            self._handler = logging.StreamHandler(sys.stdout)
        elif place:
            self._handler = RotatingFileHandler(
                place, maxBytes=max_bytes, backupCount=max(1, max_files - 1), encoding="utf-8"
            )
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_QUEUED)
        self._dropped = 0
        self._thread: threading.Thread | None = None
        if self._handler is not None:
            self._handler.setFormatter(logging.Formatter("%(message)s"))
            self._thread = threading.Thread(target=self._write, name="audit", daemon=True)
            self._thread.start()

    @contextmanager
    def call(self, call: str, *, peer: str) -> Iterator[AuditedCall]:
        """The block handles a call; its line is written at the end."""
        audited = AuditedCall(call=call, peer=peer)
        token = _CALL.set(audited)
        try:
            yield audited
        finally:
            with suppress(ValueError):  # A stream that is torn down may end in another context.
                _CALL.reset(token)
            self.write(audited)

    def write(self, audited: AuditedCall) -> None:
        """Queue a line."""
        if self._handler is None:
            return
        try:
            self._lines.put_nowait(audited.line(self._dropped))
            self._dropped = 0
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Write what is queued, and end."""
        if self._thread is not None and self._handler is not None:
            self._lines.put(None)
            self._thread.join(timeout=5.0)
            self._handler.close()

    def _write(self) -> None:
        assert self._handler is not None
        while (line := self._lines.get()) is not None:
            record = logging.LogRecord("trireme.audit", logging.INFO, "", 0, line, None, None)
            self._handler.handle(record)
