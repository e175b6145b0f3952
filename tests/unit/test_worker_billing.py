"""A worker bills by its own node's tariff, and by none before one came."""

from __future__ import annotations

import pytest

from trireme.wire.bus.v1.facts_pb2 import Tariff
from trireme.worker.billing import Biller


def test_engine_time_is_priced_by_the_nodes_own_tariff() -> None:
    biller = Biller("cpu", node="here")
    assert biller.price(2.0) == (0.0, 0.0)
    biller.take(
        Tariff(joules_per_engine_s={"here/cpu": 50.0, "cpu": 50.0, "": 50.0}, grams_co2e_per_kwh=360.0)
    )
    assert biller.price(2.0) == pytest.approx((100.0, 0.01))  # 100 J at 360 g per 3.6 MJ


def test_another_nodes_tariff_changes_nothing() -> None:
    biller = Biller("cpu", node="here")
    biller.take(Tariff(joules_per_engine_s={"here/cpu": 50.0, "": 50.0}, grams_co2e_per_kwh=360.0))
    biller.take(
        Tariff(joules_per_engine_s={"there/cpu": 999.0, "cpu": 999.0, "": 999.0}, grams_co2e_per_kwh=1.0)
    )
    assert biller.price(2.0) == pytest.approx((100.0, 0.01))
