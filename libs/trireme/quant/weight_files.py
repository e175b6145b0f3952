"""The files of a checkpoint directory: which safetensors file holds each tensor, and `config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from torch import Tensor

from trireme.errors import InvalidCheckpoint

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
CONFIG: Final = "config.json"


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        InvalidCheckpoint: it is missing or something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidCheckpoint(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidCheckpoint(f"{path} must hold a JSON object")
    return value


def write_object(path: Path, fields: dict[str, Any]) -> None:
    """Write a JSON object, indented."""
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def open_weights(path: Path) -> Any:
    """Map a safetensors file.

    Raises:
        InvalidCheckpoint: it is missing or damaged.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InvalidCheckpoint(f"{path} is not a readable safetensors file: {error}") from error


def read_tensor(handle: Any, name: str, path: Path) -> Tensor:
    """Read one tensor of a mapped file, in the type it is stored in.

    Raises:
        InvalidCheckpoint: it is not there or cannot be read.
    """
    try:
        tensor: Tensor = handle.get_tensor(name)
    except SafetensorError as error:
        raise InvalidCheckpoint(f"{path}: tensor {name} cannot be read: {error}") from error
    return tensor


def tensor_files(directory: Path) -> dict[str, Path]:
    """Which safetensors file of a checkpoint holds each tensor, sorted by file.

    Raises:
        InvalidCheckpoint: there are no such files, or the index names one that is missing, lies elsewhere, is
            damaged, or does not hold exactly the tensors that the index says.
    """
    single, index = directory / SINGLE, directory / INDEX
    if single.exists():
        return dict.fromkeys(open_weights(single).keys(), single)
    if not index.exists():
        raise InvalidCheckpoint(f"{directory} has neither {SINGLE} nor {INDEX}")
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidCheckpoint(f"{index} has no weight_map")
    found: dict[str, Path] = {}
    for file in sorted({str(value) for value in weight_map.values()}):
        if Path(file).name != file:
            raise InvalidCheckpoint(f"{index} names {file!r}, which lies outside of its directory")
        names = set(open_weights(directory / file).keys())
        differing = names ^ {name for name, value in weight_map.items() if value == file}
        if differing:
            raise InvalidCheckpoint(f"{directory / file} and {index} disagree on {min(differing)}")
        found |= dict.fromkeys(sorted(names), directory / file)
    return found
