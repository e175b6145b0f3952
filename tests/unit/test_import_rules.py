"""The house's import rules: downward only, and policies stay pure."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVICES = {path.name for path in (ROOT / "services/trireme").iterdir() if path.is_dir()}
LIBRARIES = {path.stem for path in (ROOT / "libs/trireme").iterdir() if not path.name.startswith("_")}

COMMON = {"errors", "wire", "runtime", "bus"}
ALLOWED = {
    "errors": set(),
    "wire": set(),
    "policies": {"errors"},
    "quant": {"errors"},
    "gguf_import": {"errors", "quant"},
    "bus": {"errors", "wire"},
    "runtime": {"errors", "wire"},
    "devices": COMMON | {"policies"},
    "kernels": COMMON | {"quant"},
    "models": COMMON | {"kernels", "quant"},
    "loading": COMMON | {"models", "kernels", "quant"},
    "kvcache": COMMON | {"policies"},
    "constraints": COMMON,
    "engine": COMMON | {"loading", "models", "kernels", "quant", "policies", "kvcache", "constraints"},
    "client": COMMON,
    "cli": COMMON | {"client", "policies", "devices", "kvcache", "load", "quant", "gguf_import", "simulator"},
    "load": COMMON | {"client"},
    "simulator": COMMON | {"policies"},
    "parallel": COMMON | {"kernels"},
}
IMPURE = {
    "torch",
    "numpy",
    "time",
    "random",
    "asyncio",
    "os",
    "socket",
    "redis",
    "grpc",
    "logging",
}


def modules() -> Iterator[tuple[str, str, Path]]:
    for root in ("libs", "services"):
        for path in sorted((ROOT / root / "trireme").rglob("*.py")):
            top = path.relative_to(ROOT / root / "trireme").parts[0].removesuffix(".py")
            if top != "wire":
                yield root, top, path


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_no_name_stands_in_both_roots() -> None:
    assert not SERVICES & LIBRARIES
    assert not (ROOT / "libs/trireme/__init__.py").exists()
    assert not (ROOT / "services/trireme/__init__.py").exists()


@pytest.mark.parametrize("root, top, path", list(modules()), ids=lambda value: getattr(value, "name", value))
def test_imports_run_downward(root: str, top: str, path: Path) -> None:
    ours = {name.split(".")[1] for name in imported(path) if name.startswith("trireme.")}
    if root == "services":
        assert not (ours & SERVICES) - {top}, "no service imports another"
    else:
        assert top in ALLOWED, f"{top} is a new library: say here what it may import"
        assert ours <= ALLOWED[top] | {top}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "libs/trireme/policies").glob("*.py")), ids=lambda path: path.name
)
def test_policies_are_pure(path: Path) -> None:
    assert not {name.split(".")[0] for name in imported(path)} & IMPURE


def test_every_package_says_what_it_is() -> None:
    for root in ("libs", "services"):
        for package in (ROOT / root / "trireme").iterdir():
            if package.is_dir() and package.name not in ("wire", "__pycache__"):
                text = (package / "__init__.py").read_text(encoding="utf-8")
                assert ast.get_docstring(ast.parse(text)), f"{package.name} has no docstring"
