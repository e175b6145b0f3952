"""The kernels' library: named after its sources, built whole or not at all, absent without harm."""

from __future__ import annotations

import ctypes
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from trireme.errors import InvalidConfiguration
from trireme.kernels import cpu_build
from trireme.kernels.cpu_library import Level, NativeCall, NativeWeight, cpu_library
from trireme.kernels.low_bit_cpu import pack_bf16, takes
from trireme.quant.formats import FORMATS


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources, in a directory of its own."""
    shutil.copytree(cpu_build.SOURCES, tmp_path / "cpu")
    monkeypatch.setattr(cpu_build, "SOURCES", tmp_path / "cpu")
    monkeypatch.setattr(cpu_build, "DIRECTORY", tmp_path)
    return tmp_path


@pytest.fixture
def unloaded() -> Iterator[None]:
    cpu_library.cache_clear()
    yield
    cpu_library.cache_clear()


def test_the_name_changes_with_every_source(tree: Path) -> None:
    names = {cpu_build.library_path().name}
    sources = cpu_build.source_files()
    assert len(sources) >= 10
    for source in sources:
        source.write_text(source.read_text(encoding="utf-8") + "\n", encoding="utf-8")
        names.add(cpu_build.library_path().name)
    assert len(names) == 1 + len(sources)


def test_what_is_there_is_not_built_again(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    cpu_build.library_path().touch()
    assert cpu_build.build() == cpu_build.library_path()


def test_without_a_compiler_it_says_so(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(cpu_build.BuildFailed, match="no-such-compiler"):
        cpu_build.build()
    assert [path.name for path in tree.iterdir()] == ["cpu"]


def test_a_source_that_does_not_compile_leaves_nothing(tree: Path) -> None:
    if not any(shutil.which(name) for name in cpu_build.COMPILERS):
        pytest.skip("there is no C++ compiler")
    for name in ("avx2.cpp", "avx512.cpp", "amx.cpp", "library.cpp", "thread_pool.cpp"):
        (tree / "cpu" / name).write_text("this is no C++", encoding="utf-8")
    with pytest.raises(cpu_build.BuildFailed, match="failed"):
        cpu_build.build()
    assert [path.name for path in tree.iterdir()] == ["cpu"]


def test_a_build_replaces_those_of_other_sources(tree: Path) -> None:
    if not any(shutil.which(name) for name in cpu_build.COMPILERS):
        pytest.skip("there is no C++ compiler")
    for name in ("avx2.cpp", "avx512.cpp", "amx.cpp", "thread_pool.cpp"):
        (tree / "cpu" / name).write_text("", encoding="utf-8")
    (tree / "cpu" / "library.cpp").write_text('extern "C" int answer() { return 42; }', encoding="utf-8")
    stale = tree / "libtrireme_cpu_0123456789abcdef.so"
    stale.touch()
    built = cpu_build.build()
    assert sorted(path.name for path in tree.iterdir()) == ["cpu", built.name]


def test_a_missing_library_is_logged_once_and_nothing_is_taken(
    tree: Path, unloaded: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert not any(takes(form, torch.float32) for form in FORMATS.values())
    assert [record.getMessage() for record in caplog.records] == ["cpu_kernels_absent"]
    with pytest.raises(InvalidConfiguration, match="cpu_build"):
        pack_bf16(torch.ones(1, 1))


def test_a_lower_level_may_be_named(unloaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for named, most in (("amx", Level.AMX), ("avx2", Level.AVX2)):
        cpu_library.cache_clear()
        monkeypatch.setenv("TRIREME_CPU_KERNELS", named)
        library = cpu_library()
        if library is None:
            pytest.skip("the library is not built, or this CPU has no AVX2")
        assert Level.AVX2 <= library.level <= most
    cpu_library.cache_clear()
    monkeypatch.setenv("TRIREME_CPU_KERNELS", "none")
    assert cpu_library() is None
    cpu_library.cache_clear()
    monkeypatch.setenv("TRIREME_CPU_KERNELS", "avx3")
    with pytest.raises(InvalidConfiguration, match="none, avx2, avx512, amx"):
        cpu_library()


def test_python_and_the_library_agree_on_sizes() -> None:
    assert ctypes.sizeof(NativeWeight) == 96
    assert ctypes.sizeof(NativeCall) == 64
    text = (cpu_build.SOURCES / "linear.h").read_text(encoding="utf-8")
    assert "static_assert(sizeof(Weight) == 96 && sizeof(Call) == 64" in text
