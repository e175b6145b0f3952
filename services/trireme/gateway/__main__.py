"""`python -m trireme.gateway`: settings in, one gateway until SIGTERM, then a drain."""

from __future__ import annotations

import logging
import os

import uvloop

from trireme.gateway.process import running_gateway
from trireme.gateway.settings import Settings
from trireme.runtime.settings import load
from trireme.runtime.shutdown import stop_requested
from trireme.runtime.spans import Spans, spans_to_collector
from trireme.runtime.telemetry import configure_logging

log = logging.getLogger(__name__)


async def serve(settings: Settings, spans: Spans) -> None:
    """Run one gateway until SIGTERM, then let its streams end."""
    async with running_gateway(settings, spans) as gateway:
        log.info(
            "serving",
            extra={
                "gateway_id": gateway.gateway_id,
                "grpc": gateway.grpc_address,
                "http": gateway.http_address,
            },
        )
        await stop_requested()
        log.info("draining", extra={"drain_s": settings.drain_s})
        await gateway.leave(drain_s=settings.drain_s)


def main() -> None:
    settings = load(Settings, os.environ, prefix="TRIREME_GATEWAY_")
    configure_logging("gateway", level=settings.log_level)
    uvloop.run(serve(settings, spans_to_collector("gateway")))


if __name__ == "__main__":
    main()
