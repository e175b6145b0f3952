"""An engine is built as its worker group says."""

from __future__ import annotations

from pathlib import Path

import pytest

from trireme.runtime.fleet import load_fleet
from trireme.worker import engine_loading
from trireme.worker.served_engine import ResidencyLog
from trireme.worker.variant_plan import plans_of

CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "trireme-py-1m"


@pytest.mark.parametrize(("line", "expected"), [("", True), (", decode_graphs: false", False)])
def test_decode_graphs_can_be_switched_off(tmp_path: Path, line: str, expected: bool) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text(
        f"models: {{m: {{variants: {{v: {{checkpoint: {CHECKPOINT}}}}}}}}}\nworkers: [{{kv_mib: 16{line}}}]\n"
    )
    fleet = load_fleet(file)
    [plan] = plans_of(fleet, fleet.workers[0])
    engine, _ = engine_loading.build(plan, ResidencyLog())
    assert engine.settings.decode_graphs is expected
