"""The HTTP server's own log, without what clients can fill it with."""

from __future__ import annotations

import logging

from aiohttp.http import HttpProcessingError


class _OfOurs(logging.Filter):
    """Drops what is said of bytes that are no HTTP: their sender is told, with a status."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, HttpProcessingError)


def server_logger() -> logging.Logger:
    """A logger for the server."""
    logger = logging.getLogger("trireme.gateway.http")
    if not any(isinstance(one, _OfOurs) for one in logger.filters):
        logger.addFilter(_OfOurs())
    return logger
