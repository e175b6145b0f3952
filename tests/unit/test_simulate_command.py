"""`trireme simulate`: the report that it leaves, and what it says to wrong words."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from trireme.cli.__main__ import app
from trireme.simulator.report import shown, write_report
from trireme.simulator.result import Counters, Moment, Result

PNG = b"\x89PNG\r\n\x1a\n"
SMALL = ["simulate", "--trace", "alpaca-like", "--requests", "60", "--rate", "30", "--max-sequences", "4"]


def test_the_report_stands_alone_and_holds_every_policy(tmp_path: Path) -> None:
    words = [*SMALL, "--compare", "fcfs,srpt", "--policy", "mlfq", "--out", str(tmp_path / "r")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    figures = json.loads((tmp_path / "r" / "figures.json").read_text())
    assert list(figures["policies"]) == ["fcfs", "srpt", "mlfq"]
    assert figures["policies"]["fcfs"]["first_over_this_jct_s_mean"] == 1.0
    page = (tmp_path / "r" / "report.html").read_text()
    pictures = [base64.b64decode(data) for data in re.findall(r"base64,([^\"]+)", page)]
    for name, embedded in zip(("latency", "queue", "blocks"), pictures, strict=True):
        picture = (tmp_path / "r" / f"{name}.png").read_bytes()
        assert picture == embedded and picture.startswith(PNG)
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    for name in ("fcfs", "srpt", "mlfq"):
        mean = shown(figures["policies"][name]["jct_s_mean"], "s")
        assert re.search(rf"<td>{name}</td>.*{re.escape(mean)}", page)


def test_equal_options_give_equal_figures(tmp_path: Path) -> None:
    texts = []
    for name in "ab":
        done = CliRunner().invoke(app, [*SMALL, "--workers", "2", "--out", str(tmp_path / name)])
        assert done.exit_code == 0
        texts.append((tmp_path / name / "figures.json").read_text())
    assert texts[0] == texts[1]


def test_names_are_not_taken_for_markup(tmp_path: Path) -> None:
    ones = np.ones(1)
    run = Result(
        arrival_s=0 * ones,
        first_token_s=ones,
        finish_s=2 * ones,
        prompt_tokens=ones.astype(np.int64),
        answer_tokens=ones.astype(np.int64),
        cached_tokens=ones.astype(np.int64),
        recomputed_tokens=ones.astype(np.int64),
        preemptions=ones.astype(np.int64),
        timeline=(Moment(at_s=0, waiting=0, running=1, device_blocks=1, host_blocks=0, tiers={"DRAM": 5}),),
        counters=Counters(),
    )
    write_report(tmp_path / "x", {"a": run}, title="<script>", facts={"trace": "<b>"})
    page = (tmp_path / "x" / "report.html").read_text()
    assert "<script>" not in page and "<b>" not in page


@pytest.mark.parametrize(
    "words, says",
    [
        (["--policy", "lottery"], "mlfq"),
        (["--compare", "fcfs,lottery"], "lottery"),
        (["--trace", "nowhere"], "azure-conv"),
        (["--trace", "alpaca-like"], "--rate"),
        (["--profile", "b200-gpt9"], "a100-llama2-7b"),
        (["--rate", "-1"], "positive"),
        (["--token-budget", "4"], "token_budget"),
        (["--kv-blocks", "2", "--requests", "5"], "--kv-blocks"),
        (["--swapping", "never"], "proactive"),
    ],
)
def test_wrong_words_get_one_line_and_status_2(words: list[str], says: str, tmp_path: Path) -> None:
    refused = CliRunner().invoke(app, ["simulate", "--out", str(tmp_path), *words])
    assert refused.exit_code == 2
    assert says in refused.output and "Traceback" not in refused.output


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = CliRunner().invoke(app, [*SMALL, "--out", str(tmp_path / "file")])
    assert refused.exit_code == 2
    assert "file" in refused.output
