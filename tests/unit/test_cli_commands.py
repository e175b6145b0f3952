"""The command line: every command explains itself, wrong words get one line and status 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trireme.cli.__main__ import COMMANDS, app
from trireme.cli.failing import failing_clearly
from trireme.cli.scaling import parse_target
from trireme.errors import InvalidConfiguration, InvalidRequest, Overloaded

ROOTS = ":".join(str(Path(__file__).resolve().parents[2] / root) for root in ("libs", "services"))
BY_NAME = {command.__name__.replace("_", "-"): command for command in COMMANDS}
NAMES = list(BY_NAME)


def test_all_commands_are_there() -> None:
    assert set(NAMES) >= {"up", "down", "status", "generate", "chat", "scale", "models", "bench", "demo"}
    assert set(NAMES) >= {"top", "explain"}


@pytest.mark.parametrize("name", NAMES)
def test_each_command_explains_itself(name: str) -> None:
    shown = CliRunner().invoke(app, [name, "--help"])
    assert shown.exit_code == 0
    assert f"{name} [OPTIONS]" in shown.output
    described = BY_NAME[name].__doc__
    assert described is not None
    assert described.split(".")[0].split()[0] in shown.output


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"bench", "demo"}))
def test_each_command_shows_an_example(name: str) -> None:
    shown = CliRunner().invoke(app, [name, "--help"])
    assert f"trireme {name}" in shown.output


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["up", "--nonsense"],
        ["up", "--timeout", "soon"],
        ["up", "--timeout", "0"],
        ["status", "extra"],
        ["generate"],
        ["generate", "x", "--max-tokens", "0"],
        ["generate", "x", "--temperature", "-1"],
        ["scale"],
        ["explain"],
        ["top", "--period", "0"],
    ],
    ids=" ".join,
)
def test_wrong_words_are_refused_with_status_2(words: list[str]) -> None:
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2
    assert "Traceback" not in refused.output


@pytest.mark.parametrize("text", ["worker", "worker=", "=3", "worker=-1", "worker=many", "worker=1.5"])
def test_a_scale_target_has_the_form_group_equals_replicas(text: str) -> None:
    with pytest.raises(InvalidConfiguration, match="worker=3"):
        parse_target(text)


def test_a_scale_target_is_read() -> None:
    assert parse_target("small-gpu=12") == ("small-gpu", 12)


@pytest.mark.parametrize(
    "words",
    [
        ["status"],
        ["scale", "worker=2"],
        ["explain", "req-1"],
        ["top", "--count", "1"],
    ],
    ids=" ".join,
)
def test_without_a_fleet_a_command_says_how_to_start_one(words: list[str], tmp_path: Path) -> None:
    refused = CliRunner().invoke(app, [*words, "--run-dir", str(tmp_path)])
    assert refused.exit_code == 1
    assert refused.output == f"trireme: no fleet runs in {tmp_path}: start one with `trireme up`\n"


@pytest.mark.parametrize("words", [["generate", "x"], ["chat"], ["models"]], ids=" ".join)
def test_without_a_gateway_a_command_says_so_at_once(words: list[str], tmp_path: Path) -> None:
    refused = CliRunner().invoke(
        app, [*words, "--address", "127.0.0.1:1", "--run-dir", str(tmp_path)], input="hello\n"
    )
    assert refused.exit_code == 1
    assert refused.output.startswith("trireme: nothing listens on 127.0.0.1:1: ")


def test_down_without_a_fleet_does_no_harm(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["down", "--run-dir", str(tmp_path)])
    assert done.exit_code == 0 and "no fleet runs" in done.output


def test_down_sets_a_damaged_state_file_aside(tmp_path: Path) -> None:
    (tmp_path / "fleet.json").write_text("{")
    done = CliRunner().invoke(app, ["down", "--run-dir", str(tmp_path)])
    assert done.exit_code == 0 and "set aside" in done.output
    assert not (tmp_path / "fleet.json").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Input should be a valid dictionary"),
        ("models: {}", "models"),
        ("models: [1", "not valid YAML"),
        ("models: {m: {variants: {v: {checkpoint: x}}}}\ngatewya: {}", "gatewya"),
        ("models: {m: {variants: {v: {checkpoint: x}}}}\nworkers: [{replicas: -1}]", "workers.0.replicas"),
        ("models: {m: {variants: {v: {checkpoint: x}}}}", "models.m.variants.v.checkpoint"),
    ],
    ids=["empty", "no-model", "yaml", "unknown-key", "negative", "no-checkpoint"],
)
def test_a_wrong_fleet_file_is_refused_with_its_key(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "fleet.yaml"
    ports = 'gateway: {http: "127.0.0.1:28461", grpc: "127.0.0.1:28561"}\n'
    path.write_text(text + ("\n" + ports if text.startswith("models: {m") else ""), encoding="utf-8")
    refused = CliRunner().invoke(app, ["up", "-c", str(path), "--run-dir", str(tmp_path / "run")])
    assert refused.exit_code == 2
    assert refused.output.startswith(f"trireme: {path}") and said in refused.output


def test_a_fleet_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    refused = CliRunner().invoke(app, ["up", "-c", str(tmp_path / "gone.yaml")])
    assert refused.exit_code == 2 and "gone.yaml: No such file" in refused.output


def test_help_imports_nothing_heavy() -> None:
    """`trireme --help` must be prompt: neither torch nor gRPC nor Redis is needed for it."""
    code = (
        "import sys, trireme.cli.__main__;"
        "heavy = {'torch', 'grpc', 'redis', 'numpy', 'transformers', 'aiohttp', 'pydantic'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    environ = {"PYTHONPATH": ROOTS}
    words = [sys.executable, "-c", code]
    shown = subprocess.run(words, env=environ, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_errors_become_one_line_and_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    def command(error: Exception) -> None:
        raise error

    cases = [
        (InvalidConfiguration("wrong key"), 2, "wrong key"),
        (InvalidRequest("wrong field"), 1, "wrong field"),
        (Overloaded("full", retry_after_s=2.0), 1, "full"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (FileNotFoundError(2, "No such file", "x.txt"), 1, "[Errno 2] No such file: 'x.txt'"),
    ]
    for error, status, line in cases:
        with pytest.raises(SystemExit) as ended:
            failing_clearly(command)(error)  # type: ignore[arg-type]
        assert ended.value.code == status
        assert capsys.readouterr().err == f"trireme: {line}\n"


def test_a_bug_of_ours_is_not_dressed_up_as_a_failure() -> None:
    def command() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing_clearly(command)()
