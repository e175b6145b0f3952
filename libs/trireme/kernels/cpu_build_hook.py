"""Builds the CPU kernels while the package is installed; hatchling runs it (pyproject.toml).

Without a compiler the package installs all the same, without them.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CpuKernelsHook(BuildHookInterface):  # type: ignore[type-arg, misc, unused-ignore]
    """Adds the library to the wheel, or in an editable install leaves it in the tree."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build before the files are collected."""
        cpu_build = _cpu_build(Path(self.root))
        try:
            library = cpu_build.build()
        except cpu_build.BuildFailed as error:
            self.app.display_warning(f"no CPU kernels, PyTorch will serve: {error}")
            return
        if version != "editable":
            build_data["force_include"][str(library)] = f"trireme/kernels/{library.name}"
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def _cpu_build(root: Path) -> ModuleType:
    """The module, loaded by its path: the package's own dependencies are not installed yet."""
    spec = importlib.util.spec_from_file_location("cpu_build", root / "libs/trireme/kernels/cpu_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
