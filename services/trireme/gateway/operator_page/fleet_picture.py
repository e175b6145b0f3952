"""The fleet as it is now, as plain data for the page: what does not answer is told as such."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
from redis.asyncio import Redis

from trireme.bus.connection import AWAY, Keys
from trireme.bus.registry import Registry
from trireme.wire.bus.v1.facts_pb2 import ProcessRecord, VariantStatus
from trireme.wire.kvstore.v1.kvstore_pb2 import GetStatsRequest, GetStatsResponse, TierStats
from trireme.wire.kvstore.v1.kvstore_pb2_grpc import KvStoreStub
from trireme.wire.power.v1.power_pb2 import (
    GetLedgerRequest,
    GetLedgerResponse,
    GetStatusRequest,
    GetStatusResponse,
)
from trireme.wire.power.v1.power_pb2_grpc import PowerStub
from trireme.wire.scheduler.v1.scheduler_pb2 import GetQueueRequest, GetQueueResponse
from trireme.wire.scheduler.v1.scheduler_pb2_grpc import SchedulerStub

ANSWER_S = 1.0
"""Whoever takes longer to answer is shown as silent."""
MOST_PROCESSES = 512
MOST_TENANTS = 50
"""Of a queue; the longest."""

A = TypeVar("A")


@dataclass(slots=True)
class Channels:
    """Connections to the fleet's services, kept between two looks."""

    open: Callable[[str], grpc.aio.Channel]
    _kept: dict[str, grpc.aio.Channel] = field(default_factory=dict)

    def to(self, address: str) -> grpc.aio.Channel:
        """The channel to an address."""
        channel = self._kept.get(address)
        if channel is None:
            channel = self._kept[address] = self.open(address)
        return channel

    async def keep(self, addresses: set[str]) -> None:
        """Close all others."""
        for address in self._kept.keys() - addresses:
            await self._kept.pop(address).close(None)


async def fleet_picture(redis: Redis, keys: Keys, registry: Registry, channels: Channels) -> dict[str, Any]:
    """One look at everybody; nothing is raised for what is away."""
    try:
        records = (await registry.living())[:MOST_PROCESSES]
        waiting = int(await redis.xlen(keys.requests))
        bus = "answers"
    except AWAY as error:
        records, waiting, bus = [], 0, f"away: {type(error).__name__}"
    await channels.keep({record.grpc_address for record in records if record.grpc_address})
    stores, powers, queues = await asyncio.gather(
        _ask_all(_of(records, "kvstore"), channels, _store),
        _ask_all(_of(records, "power"), channels, _power),
        _ask_all(_of(records, "scheduler"), channels, _queue),
    )
    return {
        "bus": bus,
        "waiting_requests": waiting,
        "processes": [_process(record) for record in records],
        "workers": [_worker(record) for record in _of(records, "worker")],
        "stores": stores,
        "power": powers,
        "queues": queues,
    }


def totals(picture: dict[str, Any]) -> dict[str, float]:
    """What the hour's curves are made of: sums over the fleet.

    decode_tokens is a count since the workers' starts; the others are as of now.
    """
    variants = [variant for worker in picture["workers"] for variant in worker["variants"]]
    meters = [meter for node in picture["power"] for meter in node.get("meters", ())]
    carbon = [node["grams_co2e_per_kwh"] for node in picture["power"] if "grams_co2e_per_kwh" in node]
    tiers = [tier for store in picture["stores"] for tier in store.get("tiers", ())]
    return {
        "decode_tokens": sum(variant["decode_tokens_total"] for variant in variants),
        "waiting": picture["waiting_requests"] + sum(variant["waiting"] for variant in variants),
        "running": sum(variant["running"] for variant in variants),
        "draw_w": sum(meter["draw_w"] for meter in meters),
        "grams_co2e_per_kwh": sum(carbon) / len(carbon) if carbon else 0.0,
        "kv_used_bytes": sum(tier["used_bytes"] for tier in tiers),
    }


def _of(records: Sequence[ProcessRecord], service: str) -> list[ProcessRecord]:
    return sorted((record for record in records if record.service == service), key=lambda record: record.id)


async def _ask_all(
    records: Sequence[ProcessRecord],
    channels: Channels,
    ask: Callable[[grpc.aio.Channel], Awaitable[dict[str, Any]]],
) -> list[dict[str, Any]]:
    async def one(record: ProcessRecord) -> dict[str, Any]:
        if not record.grpc_address:
            return {"node": record.node, "id": record.id, "silent": "it tells no address"}
        try:
            return {"node": record.node, "id": record.id, **await ask(channels.to(record.grpc_address))}
        except grpc.aio.AioRpcError as error:
            return {"node": record.node, "id": record.id, "silent": error.code().name}

    return list(await asyncio.gather(*map(one, records)))


def _process(record: ProcessRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "service": record.service,
        "node": record.node,
        "pid": record.pid,
        "started_unix_s": record.started_unix_s,
        "healthy": record.healthy,
        "status": record.status,
    }


def _worker(record: ProcessRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "node": record.node,
        "device": record.worker.device,
        "draining": record.worker.draining,
        "variants": [_variant(variant) for variant in record.worker.variants],
    }


def _variant(status: VariantStatus) -> dict[str, Any]:
    return {
        "variant": status.variant,
        "model": status.model,
        "ready": status.ready,
        "waiting": status.waiting,
        "running": status.running,
        "max_sequences": status.max_sequences,
        "kv_blocks_used": status.kv_blocks_used,
        "kv_blocks": status.kv_blocks,
        "prefill_tokens_per_s": status.prefill_tokens_per_s,
        "decode_tokens_per_s": status.decode_tokens_per_s,
        "decode_tokens_total": status.decode_tokens_total,
        "cached_tokens_total": status.cached_tokens_total,
    }


async def _store(channel: grpc.aio.Channel) -> dict[str, Any]:
    stats: GetStatsResponse = await KvStoreStub(channel).GetStats(GetStatsRequest(), timeout=ANSWER_S)
    return {
        "tiers": [_tier("DRAM", stats.dram), _tier("SSD", stats.ssd)],
        "sessions": stats.sessions,
        "hits": stats.hits,
        "misses": stats.misses,
    }


def _tier(name: str, tier: TierStats) -> dict[str, Any]:
    return {
        "tier": name,
        "used_bytes": tier.used_bytes,
        "capacity_bytes": tier.capacity_bytes,
        "blocks": tier.blocks,
        "hits": tier.hits,
        "evictions": tier.evictions,
        "state": "serving" if tier.serving else tier.status,
    }


async def _power(channel: grpc.aio.Channel) -> dict[str, Any]:
    stub = PowerStub(channel)
    status: GetStatusResponse
    ledger: GetLedgerResponse
    status, ledger = await asyncio.gather(
        stub.GetStatus(GetStatusRequest(), timeout=ANSWER_S),
        stub.GetLedger(GetLedgerRequest(), timeout=ANSWER_S),
    )
    hours = [device.last_hour for device in ledger.devices]
    return {
        "meters": [
            {
                "meter": meter.meter,
                "device": meter.device,
                "draw_w": meter.draw_w,
                "description": meter.description,
            }
            for meter in status.meters
        ],
        "grams_co2e_per_kwh": status.carbon.grams_co2e_per_kwh,
        "carbon_source": status.carbon.source,
        "last_hour": {
            "metered_joules": sum(hour.metered_joules for hour in hours),
            "billed_joules": sum(hour.billed_joules for hour in hours),
            "idle_joules": sum(hour.idle_joules for hour in hours),
            "metered_grams_co2e": sum(hour.metered_grams_co2e for hour in hours),
        },
    }


async def _queue(channel: grpc.aio.Channel) -> dict[str, Any]:
    queue: GetQueueResponse = await SchedulerStub(channel).GetQueue(GetQueueRequest(), timeout=ANSWER_S)
    tenants = sorted(queue.tenants, key=lambda tenant: -tenant.waiting)[:MOST_TENANTS]
    return {
        "waiting": queue.waiting,
        "unread": queue.unread,
        "oldest_s": queue.oldest_s,
        "tenants": [{"tenant": tenant.tenant, "waiting": tenant.waiting} for tenant in tenants],
    }
