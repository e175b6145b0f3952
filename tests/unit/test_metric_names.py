"""What the services tell Prometheus: names with units, few labels, and a page that says all of it."""

from __future__ import annotations

import importlib.util
import re
from bisect import bisect_left
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trireme.worker.vllm_aliases import Tally

ROOT = Path(__file__).resolve().parents[2]
_SPEC = importlib.util.spec_from_file_location("metrics_reference", ROOT / ".ci" / "metrics_reference.py")
assert _SPEC is not None and _SPEC.loader is not None
reference = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(reference)

FAMILIES = [(title, family) for title, _, families in reference.services() for family in families]
NATIVE = [family for _, family in FAMILIES if not family.name.startswith("vllm:")]
PREFIXES = ["gateway", "scheduler", "engine", "kv", "power", "energy", "carbon", "placement"]
LABELS = {"api", "code", "outcome", "variant", "tier", "device", "account", "part", "meter", "source"}
LABELS |= {"fallback", "reason", "group", "kind", "model", "slo_class"}
"""A request's id, or what a client wrote, would make a series of each."""
MODEL_SERVER_PROTOCOL = {
    "vllm:num_requests_waiting",
    "vllm:num_requests_running",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
    "vllm:lora_requests_info",
}


@pytest.mark.parametrize("family", NATIVE, ids=lambda family: family.name)
def test_names_have_a_service_and_units_and_labels_are_few(family: object) -> None:
    name: str = family.name  # type: ignore[attr-defined]
    kind: str = family.type  # type: ignore[attr-defined]
    assert re.fullmatch(rf"trireme_({'|'.join(PREFIXES)})_[a-z0-9_]+", name)
    assert not name.endswith(("_ms", "_s", "_kib", "_mib", "_percent", "_perc", "_total"))
    if kind == "histogram":
        assert name.endswith(("_seconds", "_bytes", "_tokens"))
    assert set(family._labelnames) <= LABELS  # type: ignore[attr-defined]
    documentation: str = family.documentation  # type: ignore[attr-defined]
    assert documentation.endswith(".")


def test_no_name_is_served_twice() -> None:
    names = [family.name for _, family in FAMILIES]
    assert len(names) == len(set(names))


def test_pickers_find_what_the_model_server_protocol_promises() -> None:
    assert {family.name for _, family in FAMILIES} >= MODEL_SERVER_PROTOCOL


def test_the_page_tells_of_every_metric() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert page.endswith(reference.reference())
    for _, family in FAMILIES:
        assert f"`{family.name}{'_total' if family.type == 'counter' else ''}`" in page


@given(st.lists(st.tuples(st.floats(min_value=0, max_value=100), st.integers(min_value=1, max_value=5))))
def test_a_tally_counts_as_a_histogram_does(values: list[tuple[float, int]]) -> None:
    bounds = (0.5, 1.0, 10.0)
    tally = Tally(bounds)
    for value, times in values:
        tally.add(value, times)
    each = [value for value, times in values for _ in range(times)]
    for bound, count in tally.buckets():
        assert count == sum(value <= float(bound.replace("+Inf", "inf")) for value in each)
    assert tally.total == pytest.approx(sum(each))
    assert bisect_left(bounds, 1.0) == 1  # a value on a bound is below it, as Prometheus has it
