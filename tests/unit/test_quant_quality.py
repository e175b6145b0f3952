"""Quality in few bits: how it is measured, and that the figures on file keep within their bars."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from checkpoints.evaluate import DEFAULT, DRAFT, LARGE
from checkpoints.quantized_quality import BARS_PERCENT, ServedModel
from tests.unit.engine_support import prompt_of, reference_model, save
from trireme.loading.whole import load_model
from trireme.quant.formats import FORMATS

ROOT = Path(__file__).resolve().parents[2]
FIGURES = json.loads((ROOT / "checkpoints" / "quantized_quality.json").read_text(encoding="utf-8"))


def test_what_sequences_share_is_not_computed_twice_and_changes_nothing(tmp_path: Path) -> None:
    reference = reference_model("llama3")
    served = ServedModel(load_model(save(reference, tmp_path)))
    shared = prompt_of(1, 40)
    with torch.inference_mode():
        for token_ids in (shared, [*shared, 3, 4], [*shared, 3, 5, 6], shared[:7], [*shared, 3, 4]):
            ids = torch.tensor([token_ids])
            found = served(ids)
            assert found.shape == (1, len(token_ids), 120)
            assert (found - reference(ids).logits).abs().max().item() <= 1e-4


@pytest.mark.parametrize("checkpoint", [DRAFT, DEFAULT, LARGE])
def test_formats_by_short_names_cost_no_more_than_they_may(checkpoint: str) -> None:
    rows = FIGURES[checkpoint]
    for form, bar in BARS_PERCENT.items():
        rise = rows[form]["bits_per_byte_library"] / rows["bf16"]["bits_per_byte_library"] - 1
        assert rows[form]["over_bf16_percent"] == pytest.approx(100 * rise, abs=0.002)
        assert rows[form]["over_bf16_percent"] < bar


def test_figures_are_those_of_the_document() -> None:
    lines = (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8").splitlines()
    for checkpoint in (DRAFT, DEFAULT, LARGE):
        for form in FORMATS:
            row = FIGURES[checkpoint].get(form)
            if row is not None:
                said = f"{row['bits_per_byte_library']:.4f} ({row['over_bf16_percent']:+.2f} %)"
                assert any(line.startswith(f"| `{form}` |") and said in line for line in lines), (form, said)
    evaluated = json.loads((ROOT / "checkpoints" / "evaluation.json").read_text(encoding="utf-8"))
    for checkpoint in (DRAFT, DEFAULT, LARGE):
        for figure in ("bits_per_byte_library", "choice_accuracy"):
            assert FIGURES[checkpoint]["bf16"][figure] == pytest.approx(
                evaluated[checkpoint][figure], abs=6e-5
            )
