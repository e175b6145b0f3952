"""What a request costs: engine seconds times the tariff in force (docs/energy.md)."""

from __future__ import annotations

from trireme.bus.streams import Stream
from trireme.wire.bus.v1.facts_pb2 import Directive, Tariff

JOULES_PER_KWH = 3.6e6


class Biller:
    """Holds the last tariff; until one came, energy is unknown and billed as zero."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._tariff = Tariff()

    @property
    def joules_per_engine_s(self) -> float:
        rates = self._tariff.joules_per_engine_s
        return rates.get(self._device, rates.get("", 0.0))

    def price(self, engine_s: float) -> tuple[float, float]:
        """(joules, grams_co2e) of so much engine time now."""
        joules = engine_s * self.joules_per_engine_s
        return joules, joules / JOULES_PER_KWH * self._tariff.grams_co2e_per_kwh

    async def follow(self, directives: Stream[Directive]) -> None:
        """Take each tariff as it comes, for ever; there is one every second."""
        async for entry in directives.tail():
            if entry.fact.HasField("tariff"):
                self._tariff = entry.fact.tariff
