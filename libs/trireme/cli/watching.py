"""The live view: the fleet's report, the KV store's tiers and the power service's meters."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import grpc
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from trireme.cli.fleet_report import FleetReport, living_processes, report
from trireme.cli.run_directory import RunDirectory
from trireme.cli.showing import heading, services_table, table, wide_console, workers_table
from trireme.cli.tls_directory import speak_as_fleet
from trireme.runtime.tls import open_channel
from trireme.wire.bus.v1.facts_pb2 import ProcessRecord
from trireme.wire.kvstore.v1 import kvstore_pb2
from trireme.wire.kvstore.v1.kvstore_pb2_grpc import KvStoreStub
from trireme.wire.power.v1 import power_pb2
from trireme.wire.power.v1.power_pb2_grpc import PowerStub

CALL_TIMEOUT_S = 1.0


def watch_fleet(run_dir: Path, *, period_s: float, count: int) -> None:
    """Show the fleet every `period_s`, `count` times or for ever.

    Raises:
        ServiceUnavailable: no fleet runs, or it was stopped.
    """
    try:
        asyncio.run(_watch(RunDirectory.at(run_dir), period_s=period_s, count=count))
    except KeyboardInterrupt:
        return  # the usual way to leave


async def _watch(run_directory: RunDirectory, *, period_s: float, count: int) -> None:
    console = wide_console()
    speak_as_fleet(run_directory.running().tls)
    looks, before_tokens, before_s = 0, 0, 0.0
    with Live(console=console, screen=console.is_terminal and count == 0, auto_refresh=False) as live:
        while True:
            state = run_directory.running()
            seen = await report(state, run_directory)
            records = await living_processes(state)
            kv, power = await asyncio.gather(_kv_tiers(records), _meters(records))
            now_s, tokens = time.monotonic(), _tokens(seen)
            rate = max(0, tokens - before_tokens) / (now_s - before_s) if looks else 0.0
            before_tokens, before_s = tokens, now_s
            parts: list[RenderableType] = [heading(seen), Text(f"{rate:.0f} tokens/s over the fleet\n")]
            parts += [workers_table(seen.workers), "", services_table(seen.services), "", kv, "", power]
            parts += [Text("\n".join(["", *seen.recent[:5]]))]
            live.update(Group(*parts), refresh=True)
            looks += 1
            if looks == count:
                return
            await asyncio.sleep(period_s)


def _tokens(seen: FleetReport) -> int:
    return sum(variant.decode_tokens_total for worker in seen.workers for variant in worker.variants)


async def _kv_tiers(records: list[ProcessRecord]) -> RenderableType:
    shown = table("KV tier", "node", "used MiB", "of", "blocks", "hits", "evictions", "state")
    for record in records:
        if record.service != "kvstore":
            continue
        try:
            async with open_channel(record.grpc_address) as channel:
                stats: kvstore_pb2.GetStatsResponse = await KvStoreStub(channel).GetStats(
                    kvstore_pb2.GetStatsRequest(), timeout=CALL_TIMEOUT_S
                )
        except grpc.aio.AioRpcError as error:
            return Text(f"the KV store of {record.node} does not answer: {error.code().name}")
        for name, tier in (("DRAM", stats.dram), ("SSD", stats.ssd)):
            used, capacity = tier.used_bytes / 2**20, tier.capacity_bytes / 2**20
            numbers = (tier.blocks, tier.hits, tier.evictions)
            own = (name, stats.node, f"{used:.0f}", f"{capacity:.0f}")
            state = "serving" if tier.serving else tier.status
            shown.add_row(*own, *(str(number) for number in numbers), state)
    return shown


async def _meters(records: list[ProcessRecord]) -> RenderableType:
    shown = table("meter", "device", "draw W", "J per engine s", "gCO2e/kWh", "carbon source")
    for record in records:
        if record.service != "power":
            continue
        try:
            async with open_channel(record.grpc_address) as channel:
                status: power_pb2.GetStatusResponse = await PowerStub(channel).GetStatus(
                    power_pb2.GetStatusRequest(), timeout=CALL_TIMEOUT_S
                )
        except grpc.aio.AioRpcError as error:
            return Text(f"the power service of {record.node} does not answer: {error.code().name}")
        carbon = (f"{status.carbon.grams_co2e_per_kwh:.0f}", status.carbon.source)
        for meter in status.meters:
            draw, price = f"{meter.draw_w:.1f}", f"{meter.joules_per_engine_s:.2f}"
            shown.add_row(meter.meter, meter.device, draw, price, *carbon)
    return shown
