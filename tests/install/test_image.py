"""The image: what runs is no root and has no compiler, and the build steps make what is served."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.install.charts import pods, render
from tests.install.dockerfile import read_stages, with_bases

SERVICES = ("gateway", "scheduler", "worker", "kvstore", "power", "placement")
TARGETS = ("slim", "cuda")
STAGES = read_stages()
IGNORED = (REPOSITORY / "services" / "Dockerfile.dockerignore").read_text().splitlines()


def copied(words: str) -> tuple[list[str], str]:
    """Sources and destination of a COPY."""
    *sources, destination = words.split()
    return sources, destination


def test_the_build_copies_what_is_there_and_what_the_context_holds() -> None:
    kept = [line.removeprefix("!") for line in IGNORED if line.startswith("!")]
    assert "*" in IGNORED
    for words in STAGES["source"].of("COPY"):
        for source in copied(words)[0]:
            assert (REPOSITORY / source).exists(), source
            assert any(Path(source).match(pattern) for pattern in kept), f"{source} is not in the context"


@pytest.mark.parametrize("target", TARGETS)
def test_what_runs_is_no_root_and_gets_nothing_from_the_build_but_its_prefix(target: str) -> None:
    final = with_bases(STAGES, target)
    assert STAGES["source"] not in final, "the stage with the compiler is not what runs"
    steps = [step for stage in final for step in stage.steps]
    users = [words for instruction, words in steps if instruction == "USER"]
    # A name could not be checked by `runAsNonRoot`.
    assert re.fullmatch(r"[1-9]\d*:0", users[-1])
    for instruction, words in steps:
        if instruction == "RUN":
            assert not re.search(r"\b(apt|apt-get|pip|g\+\+|gcc)\b", words), words
        if instruction == "COPY":
            assert words == f"--from=build-{target} /opt/trireme /opt/trireme"
    (entrypoint,) = [words for instruction, words in steps if instruction == "ENTRYPOINT"]
    assert entrypoint == '["serve"]'


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_is_built_by_the_one_script(target: str) -> None:
    build = STAGES[f"build-{target}"]
    assert "SERVICE=all" in build.of("ARG")
    (run,) = build.of("RUN")
    assert shlex.split(run)[-4:] == [".ci/image_build.sh", target, "${SERVICE}", "${PREFIX}"]


def test_the_script_names_every_service() -> None:
    folder = REPOSITORY / "services" / "trireme"
    found = {path.parent.name for path in folder.glob("*/__main__.py")}
    text = (REPOSITORY / ".ci" / "image_build.sh").read_text()
    listed = re.search(r"^services=\((.*)\)$", text, re.MULTILINE)
    assert listed is not None
    assert set(listed[1].split()) == found == set(SERVICES)


@pytest.mark.parametrize(("target", "service"), [("fat", "all"), ("slim", "gatway")])
def test_the_script_refuses_what_it_does_not_know(target: str, service: str, tmp_path: Path) -> None:
    script = [str(REPOSITORY / ".ci" / "image_build.sh"), target, service, str(tmp_path / "prefix")]
    refused = subprocess.run(script, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "image_build: no " in refused.stderr
    assert not (tmp_path / "prefix").exists()


def test_nothing_but_the_workers_engine_imports_torch_and_no_start_the_clusters_client() -> None:
    program = (
        "import importlib, sys\nsys.modules |= {'torch': None, 'kubernetes': None}\n"
        "importlib.import_module(sys.argv[1])\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}/libs:{REPOSITORY}/services"}
    modules = {f"trireme.{service}.__main__" for service in SERVICES} | {"trireme.worker.engine_loop"}
    for module in modules:
        words = [sys.executable, "-c", program, module]
        ended = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert (ended.returncode == 0) == (module != "trireme.worker.engine_loop"), ended.stderr


def test_the_entry_runs_the_service_that_is_named_or_the_images_own(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    entry = str(REPOSITORY / "services" / "serve.sh")
    for words, built_for, runs in (
        (["gateway"], "all", "-m trireme.gateway"),
        ([], "worker", "-m trireme.worker"),
        (["power"], "worker", "-m trireme.power"),
    ):
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "TRIREME_SERVICE": built_for}
        ended = subprocess.run([entry, *words], env=environment, capture_output=True, text=True)
        assert ended.stdout.strip() == runs
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "TRIREME_SERVICE": "all"}
    assert subprocess.run([entry], env=environment, capture_output=True).returncode == 2


@pytest.mark.skipif(os.environ.get("TRIREME_SLOW") != "1", reason="installs everything: TRIREME_SLOW=1")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("service", ["scheduler", "all"])
def test_the_build_steps_make_what_the_chart_runs(service: str, tmp_path: Path) -> None:
    """The steps of the source and build stages, in a clean directory in place of a clean image."""
    root, prefix = tmp_path / "src", tmp_path / "opt"
    root.mkdir()
    for words in STAGES["source"].of("COPY"):
        sources, destination = copied(words)
        for source in sources:
            _copy(source, root / destination / (Path(source).name if destination.endswith("/") else ""))
    variables = {
        "SERVICE": service,
        "PREFIX": str(prefix),
        "TORCH_INDEX_URL": os.environ.get("TORCH_INDEX_URL", ""),
    }
    (run,) = STAGES["build-slim"].of("RUN")
    environment = {**os.environ, **variables, "PYTHON": sys.executable}
    built = subprocess.run(["bash", "-c", run], cwd=root, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-4000:]

    bare = {"PATH": f"{prefix}/bin", "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    programs = {
        container["command"][0] for pod in pods(render("default")) for container in pod.containers
    } | {"serve", "ready"}
    for program in programs:
        assert shutil.which(program, path=bare["PATH"]), program
    packages = prefix / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    libraries = list((packages / "trireme" / "kernels").glob("libtrireme_cpu_*.so"))
    assert len(libraries) == 1
    assert (packages / "torch").exists() == (service == "all")
    assert not (packages / "pip").exists()
    checkpoint = prefix / "share" / "checkpoints" / "trireme-py-6m" / "config.json"
    assert checkpoint.is_file() == (service == "all")
    for name in SERVICES if service == "all" else (service,):
        words = [str(prefix / "bin" / "python"), "-I", "-c", f"import trireme.{name}.__main__"]
        ended = subprocess.run(words, env=bare, cwd=tmp_path, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
    if service == "all":
        program = "from trireme.kernels.cpu_library import cpu_library; assert cpu_library() is not None"
        subprocess.run(["python", "-I", "-c", program], env=bare, cwd=tmp_path, check=True)
        version = subprocess.run(["redis-server", "--version"], env=bare, capture_output=True, text=True)
        assert version.stdout.startswith("Redis server v="), version.stderr


def _copy(source: str, destination: Path) -> None:
    """What the build context holds of `source`: compiled files stay behind."""
    origin = REPOSITORY / source
    if origin.is_dir():
        ignored = shutil.ignore_patterns("__pycache__", "*.so", ".cpu_build_*")
        shutil.copytree(origin, destination, ignore=ignored)
    else:
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(origin, destination)


def test_a_wheel_that_nobody_looked_at_fails_the_build(tmp_path: Path) -> None:
    script = [sys.executable, str(REPOSITORY / ".ci" / "wheel_hashes.py"), "check"]
    name, version, digest = (REPOSITORY / ".ci" / "wheel_hashes.txt").read_text().splitlines()[0].split()

    def check(found: str) -> int:
        item = {
            "metadata": {"name": name.upper(), "version": version},
            "download_info": {"archive_info": {"hashes": {"sha256": found}} if found else {}},
        }
        (tmp_path / "report.json").write_text(json.dumps({"install": [item]}))
        return subprocess.run([*script, str(tmp_path / "report.json")], capture_output=True).returncode

    assert check(digest) == 0
    assert check(digest[::-1]) == 1
    assert check("") == 1


def test_the_recorded_hashes_are_of_the_pinned_versions() -> None:
    pins = dict(
        line.lower().replace("_", "-").split("==")
        for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    recorded = (REPOSITORY / ".ci" / "wheel_hashes.txt").read_text().splitlines()
    versions = {name: version.partition("+")[0] for name, version, _ in map(str.split, recorded)}
    assert versions.keys() & pins.keys()
    assert {name for name in versions.keys() & pins.keys() if pins[name] != versions[name]} == set()
