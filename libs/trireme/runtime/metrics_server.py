"""A small HTTP server for Prometheus and for probes that speak HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from trireme.runtime.health import HealthReporter


def metrics_routes(metrics: CollectorRegistry, health: HealthReporter) -> list[web.RouteDef]:
    """`/metrics`, `/livez` (the process answers) and `/readyz` (it makes progress).

    `/health` is `/readyz` under the name that clients of vLLM and llama.cpp ask for.
    """

    async def show_metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(metrics), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def live(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def ready(_: web.Request) -> web.Response:
        found = health.overall()
        return web.Response(text=found.status + "\n", status=200 if found.healthy else 503)

    return [
        web.get("/metrics", show_metrics),
        web.get("/livez", live),
        web.get("/readyz", ready),
        web.get("/health", ready),
    ]


@asynccontextmanager
async def metrics_server(
    listen: str, metrics: CollectorRegistry, health: HealthReporter
) -> AsyncIterator[str]:
    """Serve `metrics_routes` until the block ends; yields the bound host:port."""
    app = web.Application()
    app.add_routes(metrics_routes(metrics, health))
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    host, _, port = listen.rpartition(":")
    site = web.TCPSite(runner, host, int(port))
    await site.start()
    bound = runner.addresses[0]
    try:
        yield f"{bound[0]}:{bound[1]}"
    finally:
        await runner.cleanup()
