"""What a request costs: engine seconds times the tariff in force (docs/energy.md)."""

from __future__ import annotations

from trireme.bus.streams import Stream
from trireme.policies.energy_billing import bill_joules, grams_co2e, tariff_for
from trireme.wire.bus.v1.facts_pb2 import Directive, Tariff


class Biller:
    """Holds the node's last tariff; until one came, energy is unknown and billed as zero."""

    def __init__(self, device: str, *, node: str) -> None:
        self._device = device
        self._node = node
        self._joules_per_engine_s = 0.0
        self._grams_co2e_per_kwh = 0.0

    def price(self, engine_s: float) -> tuple[float, float]:
        """(joules, grams_co2e) of so much engine time now."""
        joules = bill_joules(engine_s, self._joules_per_engine_s)
        return joules, grams_co2e(joules, self._grams_co2e_per_kwh)

    def take(self, tariff: Tariff) -> None:
        """Bill by this tariff from now on, unless it is another node's."""
        rate = tariff_for(tariff.joules_per_engine_s, node=self._node, device=self._device)
        if rate is not None:
            self._joules_per_engine_s = rate
            self._grams_co2e_per_kwh = tariff.grams_co2e_per_kwh

    async def follow(self, directives: Stream[Directive]) -> None:
        """Take each tariff as it comes, for ever; there is one every second."""
        async for entry in directives.tail():
            if entry.fact.HasField("tariff"):
                self.take(entry.fact.tariff)
