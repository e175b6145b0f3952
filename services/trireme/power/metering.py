"""The window loop: read the meters, take in the workers' facts, keep the ledger, publish the tariff."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trireme.bus.connection import AWAY
from trireme.bus.registry import Registry
from trireme.bus.streams import Entry, Stream
from trireme.devices.meters import EnergyMeter, MeterUnreadable
from trireme.policies.energy_attribution import UJ_PER_J, EngineUse, Rule
from trireme.policies.energy_billing import metered_device
from trireme.power.carbon_signal import CarbonSignal, Intensity
from trireme.power.ledger import Ledger, Reading, engine_use
from trireme.power.ledger_store import SEEN_S, LedgerStore
from trireme.runtime.clock import Clock
from trireme.wire.bus.v1.facts_pb2 import Directive, Measurement, PowerWindow, Tariff

log = logging.getLogger(__name__)

BATCH = 512
MAX_BATCHES = 16
"""Facts beyond this many batches wait for the next window."""
CONSUMER = "ledger"
ABANDONED_S = 3.0
"""A fact held so long without acknowledgement was read by a service that is gone."""


@dataclass(frozen=True, slots=True)
class MeterState:
    """What the last window said of one meter."""

    draw_w: float = 0.0
    read_at_s: float = 0.0
    trouble: str = ""


class WorkerNodes:
    """Which node's meters a worker draws on, from the registry; remembered after its death."""

    def __init__(self, registry: Registry, node: str) -> None:
        self._registry = registry
        self._node = node
        self._nodes: dict[str, str] = {}

    async def learn(self, worker_ids: set[str]) -> None:
        """Look up workers not seen before."""
        if worker_ids <= self._nodes.keys():
            return
        records = await self._registry.living("worker")
        living = {record.id: record.meter_node or record.node for record in records}
        for worker_id in worker_ids - self._nodes.keys():
            # A worker that left before it was looked up is taken for one of this node.
            self._nodes[worker_id] = living.get(worker_id) or self._node
        while len(self._nodes) > 10_000:
            del self._nodes[next(iter(self._nodes))]

    def is_here(self, worker_id: str) -> bool:
        return self._nodes.get(worker_id, self._node) == self._node


class Metering:
    """Owns the node's ledger while the service lives."""

    def __init__(
        self,
        *,
        node: str,
        meters: Sequence[EnergyMeter],
        carbon: CarbonSignal,
        store: LedgerStore,
        measurements: Stream[Measurement],
        directives: Stream[Directive],
        workers: WorkerNodes,
        clock: Clock,
        process_id: str,
        window_s: float,
        rule: Rule | None = None,
    ) -> None:
        self.node = node
        self.meters: Mapping[str, EnergyMeter] = {meter.device: meter for meter in meters}
        self.states: dict[str, MeterState] = {device: MeterState() for device in self.meters}
        self.ledger = Ledger()
        self.intensity: Intensity = carbon.now()
        self.last_turn_s = 0.0
        """When the last window ended, monotonic."""
        self.last_window_unix_s = 0.0
        self._carbon = carbon
        self._store = store
        self._measurements = measurements
        self._directives = directives
        self._workers = workers
        self._clock = clock
        self._process_id = process_id
        self._window_s = window_s
        self._rule = rule or Rule()
        self._group = f"power:{node}"
        self._seen: dict[str, float] = {}
        self._unsaved: list[str] = []
        self._unacknowledged: list[bytes] = []
        self._slices: set[str] = set()
        self._turns = 0
        self._offset_s = 0.0
        self._away = False
        self._last_claim_s = clock.monotonic_s()

    async def open(self) -> None:
        """Take over the node's ledger and what its last keeper read without finishing."""
        await self._measurements.create_group(self._group)
        self.ledger = await self._store.take_over()
        self._seen = await self._store.seen()
        lasts = [book.last.at_s for book in self.ledger.books.values() if book.last is not None]
        # Ledger time runs with the monotonic clock, so that no window is negative when the wall
        # clock is set back, here or between two lives of the service.
        self._offset_s = max(self._clock.unix_s(), *lasts, 0.0) - self._clock.monotonic_s()
        for device, meter in self.meters.items():
            self.ledger.open_book(device, meter.name, now_s=self._now_s())
        for device in list(self.ledger.books):
            if device not in self.meters:
                log.info("meter_gone", extra={"device": device})
        # This is the node's only keeper now, so whatever is still held was abandoned.
        await self.turn(await self._claim(idle_s=0.0))

    async def run(self) -> None:
        """End a window every `window_s`, for ever."""
        due_s = self._clock.monotonic_s()
        while True:
            due_s = max(due_s + self._window_s, self._clock.monotonic_s())
            await asyncio.sleep(due_s - self._clock.monotonic_s())
            await self.turn([*await self._abandoned(), *await self._read()])

    async def turn(self, entries: Sequence[Entry[Measurement]]) -> None:
        """End one window with the facts in `entries`."""
        readings = {device: await self._reading(meter) for device, meter in self.meters.items()}
        now_s = self._now_s()
        self.intensity = self._carbon.now()
        uses = await self._uses(entries, now_s)
        for device, meter in self.meters.items():
            book = self.ledger.books[device]
            book.turn(
                now_s=now_s,
                reading=readings[device],
                uses=uses.get(device, ()),
                grams_co2e_per_kwh=self.intensity.grams_co2e_per_kwh,
                limits=meter.limits,
                rule=self._rule,
            )
            if readings[device] is not None and book.account.windows:
                newest = book.account.windows[-1]
                draw_w = newest.energy_uj / UJ_PER_J / newest.length_s
                self.states[device] = MeterState(draw_w=draw_w, read_at_s=now_s)
        self._unacknowledged.extend(entry.entry_id for entry in entries)
        self.last_window_unix_s = now_s
        self.last_turn_s = self._clock.monotonic_s()
        self._turns += 1
        await self._save_and_publish(now_s)

    def joules_per_engine_s(self) -> dict[str, float]:
        """The tariff by device: as `node/device`, as workers name their slices, and "" for any other."""
        own = {device: self.ledger.books[device].account.tariff for device in self.meters}
        rates = {f"{self.node}/{device}": rate for device, rate in own.items()}
        rates.update(own)
        for name in self._slices:
            if metered_device(name) in own:
                rates[name] = own[metered_device(name)]
        if own:
            rates[""] = own.get("cpu", next(iter(own.values())))
        return rates

    def age_s(self, device: str) -> float:
        """Seconds since the device's last good reading."""
        return max(0.0, self._now_s() - self.states[device].read_at_s)

    def now_s(self) -> float:
        """Ledger time: seconds since 1970."""
        return self._now_s()

    def trouble(self) -> str:
        """One line on meters that do not answer; empty where all do."""
        return "; ".join(f"{d}: {s.trouble}" for d, s in self.states.items() if s.trouble)

    async def _claim(self, *, idle_s: float) -> list[Entry[Measurement]]:
        """What was read and not acknowledged, except by this object: it will acknowledge what it holds."""
        held = set(self._unacknowledged)
        found = await self._measurements.claim(
            self._group, CONSUMER, idle_ms=int(idle_s * 1000), count=BATCH * MAX_BATCHES
        )
        return [entry for entry in found if entry.entry_id not in held]

    async def _abandoned(self) -> list[Entry[Measurement]]:
        """What a predecessor read after this service had taken over, looked for every few seconds."""
        now_s = self._clock.monotonic_s()
        if now_s - self._last_claim_s < ABANDONED_S:
            return []
        self._last_claim_s = now_s
        try:
            return await self._claim(idle_s=ABANDONED_S)
        except AWAY:
            return []

    async def _read(self) -> list[Entry[Measurement]]:
        entries: list[Entry[Measurement]] = []
        for _ in range(MAX_BATCHES):
            batch = await self._measurements.read_group(self._group, CONSUMER, count=BATCH, block_ms=None)
            entries.extend(batch)
            if len(batch) < BATCH:
                break
        return entries

    async def _reading(self, meter: EnergyMeter) -> Reading | None:
        def read() -> tuple[float, float]:
            # Stamped beside the reading: on a busy machine this thread's news comes late.
            return meter.read_joules(), self._now_s()

        try:
            joules, at_s = await asyncio.to_thread(read)
        except MeterUnreadable as error:
            state = self.states[meter.device]
            if not state.trouble:
                log.warning("meter_unreadable", extra={"device": meter.device, "reason": error.message})
            self.states[meter.device] = MeterState(read_at_s=state.read_at_s, trouble=error.message)
            return None
        return Reading(energy_uj=round(joules * UJ_PER_J), at_s=at_s, epoch=meter.epoch)

    async def _uses(self, entries: Sequence[Entry[Measurement]], now_s: float) -> dict[str, list[EngineUse]]:
        """The engine use per metered device among new facts of this node's workers."""
        facts = [entry.fact for entry in entries if entry.fact.HasField("engine")]
        try:
            await self._workers.learn({fact.engine.worker_id for fact in facts})
        except AWAY:
            log.info("worker_nodes_unknown", extra={"assumed": self.node})
        uses: dict[str, list[EngineUse]] = {}
        for fact in facts:
            if not self._workers.is_here(fact.engine.worker_id):
                continue
            if fact.id in self._seen:
                self.ledger.duplicate_facts += 1
                continue
            use = engine_use(fact)
            if use is None:
                self.ledger.refused_facts += 1
                log.warning("fact_refused", extra={"worker_id": fact.engine.worker_id, "fact_id": fact.id})
                continue
            self._seen[fact.id] = now_s
            self._unsaved.append(fact.id)
            self._slices.add(fact.engine.device)
            uses.setdefault(metered_device(fact.engine.device), []).append(use)
        while self._seen and next(iter(self._seen.values())) < now_s - SEEN_S:
            del self._seen[next(iter(self._seen))]
        return uses

    async def _save_and_publish(self, now_s: float) -> None:
        try:
            await self._store.save(self.ledger, self._unsaved, now_s=now_s)
            self._unsaved = []
            await self._measurements.acknowledge(self._group, self._unacknowledged)
            self._unacknowledged = []
            await self._publish(now_s)
        except AWAY as error:
            if not self._away:
                log.warning("ledger_not_saved", extra={"reason": str(error)})
            self._away = True
            return
        if self._away:
            log.info("ledger_saved_again")
        self._away = False

    async def _publish(self, now_s: float) -> None:
        fact_id = f"{self._process_id}-{self._turns}"
        await self._directives.publish(
            Directive(
                id=f"tariff-{fact_id}",
                at_unix_s=now_s,
                tariff=Tariff(
                    joules_per_engine_s=self.joules_per_engine_s(),
                    grams_co2e_per_kwh=self.intensity.grams_co2e_per_kwh,
                    meter=",".join(sorted({meter.name for meter in self.meters.values()})),
                    carbon_source=self.intensity.source,
                ),
            )
        )
        for device, meter in self.meters.items():
            windows = self.ledger.books[device].account.windows
            if not windows:
                continue
            await self._measurements.publish(
                Measurement(
                    id=f"power-{device}-{fact_id}",
                    at_unix_s=windows[-1].end_s,
                    window_s=windows[-1].length_s,
                    power=PowerWindow(
                        meter=meter.name,
                        device=device,
                        joules=windows[-1].energy_uj / UJ_PER_J,
                        grams_co2e_per_kwh=windows[-1].grams_co2e_per_kwh,
                    ),
                )
            )

    def _now_s(self) -> float:
        return self._clock.monotonic_s() + self._offset_s
