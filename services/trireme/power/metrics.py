"""Prometheus metrics of the power service, read from its state when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from trireme.policies.energy_attribution import UJ_PER_J
from trireme.power.metering import Metering


def registry_of(metering: Metering) -> CollectorRegistry:
    """A registry that shows this service's metrics."""
    registry = CollectorRegistry()
    registry.register(_LedgerCollector(metering))
    return registry


class _LedgerCollector(Collector):
    def __init__(self, metering: Metering) -> None:
        self._metering = metering

    def collect(self) -> Iterator[Metric]:
        yield from self._energy()
        yield from self._meters()
        yield from self._carbon()
        ledger = self._metering.ledger
        facts = CounterMetricFamily(
            "trireme_power_dropped_facts",
            "Measurement facts not counted: they came twice, or a number was out of range.",
            labels=["reason"],
        )
        facts.add_metric(["duplicate"], ledger.duplicate_facts)
        facts.add_metric(["refused"], ledger.refused_facts)
        yield facts

    def _energy(self) -> Iterator[Metric]:
        energy = CounterMetricFamily(
            "trireme_energy_joules", "Energy by account (docs/energy.md).", labels=["device", "account"]
        )
        rest = GaugeMetricFamily(
            "trireme_energy_unattributed_joules",
            "metered - billed - idle, by part; parts sum to it.",
            labels=["device", "part"],
        )
        grams = CounterMetricFamily(
            "trireme_carbon_grams", "Emissions by account, g CO2e.", labels=["device", "account"]
        )
        for device, book in self._metering.ledger.books.items():
            account, totals = book.account, book.totals
            for name, joules_uj, emitted_g in (
                ("metered", totals.metered_uj, totals.metered_g),
                ("billed", totals.billed_uj, totals.billed_g),
                ("idle", totals.idle_uj, totals.idle_g),
            ):
                energy.add_metric([device, name], joules_uj / UJ_PER_J)
                grams.add_metric([device, name], emitted_g)
            for part, part_uj in (
                ("pending", account.pending_uj),
                ("carry", account.carry_uj),
                ("written_off", account.written_off_uj),
            ):
                rest.add_metric([device, part], part_uj / UJ_PER_J)
        yield energy
        yield rest
        yield grams

    def _meters(self) -> Iterator[Metric]:
        metering = self._metering
        labels = ["device", "meter"]
        draw = GaugeMetricFamily("trireme_power_draw_watts", "Mean draw over the last window.", labels=labels)
        tariff = GaugeMetricFamily(
            "trireme_power_tariff_joules_per_engine_second", "Price of engine time.", labels=labels
        )
        age = GaugeMetricFamily(
            "trireme_power_reading_age_seconds", "Since the last good reading.", labels=labels
        )
        for device, meter in metering.meters.items():
            names = [device, meter.name]
            draw.add_metric(names, metering.states[device].draw_w)
            tariff.add_metric(names, metering.ledger.books[device].account.tariff)
            age.add_metric(names, metering.age_s(device))
        yield draw
        yield tariff
        yield age

    def _carbon(self) -> Iterator[Metric]:
        now = self._metering.intensity
        source = now.source.partition(" ")[0]
        labels = ["source", "fallback"]
        names = [source, str("fallback" in now.source).lower()]
        intensity = GaugeMetricFamily(
            "trireme_carbon_intensity_grams_per_kwh", "Grid carbon intensity.", labels=labels
        )
        intensity.add_metric(names, now.grams_co2e_per_kwh)
        age = GaugeMetricFamily("trireme_carbon_signal_age_seconds", "Age of that value.", labels=labels)
        age.add_metric(names, now.age_s)
        yield intensity
        yield age
