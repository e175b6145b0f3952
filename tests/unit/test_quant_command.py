"""`trireme quantize`: the checkpoint and report that it leaves, and what it says to wrong words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trireme.cli.__main__ import app
from trireme.quant.reading import QuantizedCheckpoint

REAL = Path(__file__).resolve().parents[2] / "checkpoints" / "trireme-py-1m"
needs_weights = pytest.mark.skipif(
    not (REAL / "model.safetensors").exists(), reason="the checkpoints are not in this checkout"
)


@needs_weights
@pytest.mark.parametrize(
    "words, name, bits, worst",
    [
        (["--format", "fp6"], "fp6_e2m3", 6, 0.05),
        (["--format", "fp6_e3m2"], "fp6_e3m2", 6, 0.06),
        (["--format", "fp6_e2m3"], "fp6_e2m3", 6, 0.05),
        (["--format", "fp5"], "fp5_e2m2", 5, 0.1),
        (["--format", "int8"], "int8_ch", 8, 0.01),
        (["--format", "int4"], "int4_g64", 4, 0.13),
        (["--format", "int4", "--group-size", "32", "--zero-points"], "int4_g32_zeros", 4, 0.11),
        (["--format", "int4", "--group-size", "128"], "int4_g128", 4, 0.15),
    ],
)
def test_the_report_says_what_the_checkpoint_holds(
    words: list[str], name: str, bits: int, worst: float, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "out"
    done = CliRunner().invoke(app, ["quantize", str(REAL), *words, "--out", str(out)])
    assert done.exit_code == 0, done.output
    report = json.loads((out / "quantization_report.json").read_text())
    assert report["format"] == name
    assert bits < report["bits_per_quantized_weight"] < bits + 1.3
    everything = report["kinds"].pop("all")
    assert set(report["kinds"]) == {f"{kind}_proj" for kind in ("q", "k", "v", "o", "gate", "up", "down")}
    assert everything["matrices"] == len(report["weights"]) == 21
    assert everything["elements"] == sum(kind["elements"] for kind in report["kinds"].values())
    assert 0 < everything["relative_frobenius_error"] < worst
    for kind, figures in report["kinds"].items():
        row = next(line for line in done.output.splitlines() if line.startswith(kind))
        assert f"{figures['relative_frobenius_error']:.3%}" in row
    with QuantizedCheckpoint(out) as checkpoint:
        assert checkpoint.manifest.form.name == name


@needs_weights
def test_fp6_says_which_kind_it_took(tmp_path: Path) -> None:
    words = ["quantize", str(REAL), "--format", "fp6", "--out", str(tmp_path / "out")]
    assert "fp6_e2m3 is nearer to these weights than fp6_e3m2" in CliRunner().invoke(app, words).output


@pytest.mark.parametrize(
    "words, said, status",
    [
        (["--format", "int4", "--group-size", "48"], "--group-size is 48; use one of 32, 64, 128", 2),
        (["--format", "fp6", "--zero-points"], "--zero-points is for int4", 2),
        (["--format", "fp6"], "absent is not a directory", 1),
        (["--format", "fp7"], "fp7", 2),
    ],
)
def test_wrong_words_get_one_line(words: list[str], said: str, status: int, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["quantize", str(tmp_path / "absent"), *words, "--out", str(tmp_path / "out")]
    )
    assert done.exit_code == status
    assert said in done.output
    assert not (tmp_path / "out").exists()
