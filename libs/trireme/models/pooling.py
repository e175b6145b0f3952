"""How a text's one vector is made of its tokens', as `sentence-transformers` writes it down."""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch.nn.functional as F
from torch import Tensor

from trireme.errors import InvalidCheckpoint
from trireme.quant.weight_files import read_object

_MODULES: Final = "modules.json"


class PoolingKind(enum.Enum):
    """Which of a text's final hidden states count."""

    CLS = "pooling_mode_cls_token"
    MEAN = "pooling_mode_mean_tokens"
    MAX = "pooling_mode_max_tokens"


@dataclass(frozen=True, slots=True)
class Pooling:
    """A rule."""

    kind: PoolingKind = PoolingKind.MEAN
    normalises: bool = True
    """The vector has length 1."""

    def apply(self, hidden: Tensor) -> Tensor:
        """(tokens, hidden) of one text to (hidden,) float32."""
        hidden = hidden.float()
        match self.kind:
            case PoolingKind.CLS:
                vector = hidden[0]
            case PoolingKind.MEAN:
                vector = hidden.mean(0)
            case PoolingKind.MAX:
                vector = hidden.amax(0)
        return F.normalize(vector, dim=0) if self.normalises else vector


def read_pooling(directory: Path) -> Pooling:
    """The rule of a checkpoint; the mean, of length 1, where it names none.

    Raises:
        InvalidCheckpoint: a file is malformed, or asks for a step or a mode that is not served.
    """
    path = directory / _MODULES
    if not path.exists():
        return Pooling()
    kind, normalises = PoolingKind.MEAN, False
    for module in _modules(path):
        name = str(module.get("type", "")).rpartition(".")[2]
        if name == "Pooling":
            kind = _kind(_inside(directory, module, path) / "config.json")
        elif name == "Normalize":
            normalises = True
        elif name != "Transformer" or module.get("path"):
            raise InvalidCheckpoint(
                f"{path}: a module {name!r} at {module.get('path')!r} is not served; Transformer beside the "
                "file, Pooling and Normalize are"
            )
    return Pooling(kind, normalises)


def _modules(path: Path) -> list[dict[str, Any]]:
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"{path} is not readable JSON: {error}") from error
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise InvalidCheckpoint(f"{path} must hold a list of objects")
    return modules


def _inside(directory: Path, module: dict[str, Any], path: Path) -> Path:
    name = module.get("path")
    if not isinstance(name, str) or Path(name).name != name:
        raise InvalidCheckpoint(f"{path} names {name!r}, which lies outside of its directory")
    return directory / name


def _kind(path: Path) -> PoolingKind:
    fields = read_object(path)
    mode = fields.get("pooling_mode")  # newer files name one
    if isinstance(mode, str):
        wanted = {"cls": PoolingKind.CLS, "mean": PoolingKind.MEAN, "max": PoolingKind.MAX}.get(mode)
        if wanted is None:
            raise InvalidCheckpoint(f"{path}: pooling_mode {mode!r} is not served; cls, mean and max are")
        return wanted
    modes = [name for name, value in fields.items() if name.startswith("pooling_mode_") and value is True]
    served = [kind for kind in PoolingKind if kind.value in modes]
    if len(modes) != 1 or not served:
        raise InvalidCheckpoint(f"{path} asks for {modes or 'no mode'}; one of cls, mean and max is served")
    return served[0]
