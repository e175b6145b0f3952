"""A Hugging Face checkpoint directory: its configuration, its tensors, and what identifies it.

Tensors are read one at a time from memory-mapped safetensors files, so a loader holds no more
than it asks for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from safetensors import SafetensorError
from torch import Tensor

from trireme.errors import InvalidCheckpoint
from trireme.models.config import ModelConfig
from trireme.models.config_fields import token_ids
from trireme.models.config_parsing import parse_config
from trireme.quant.weight_files import CONFIG, INDEX, SINGLE, open_weights, read_object

_WHOLE_BYTES: Final = 64 << 20
"""Files up to this size are hashed whole."""
_SAMPLES: Final = 256
_SAMPLE_BYTES: Final = 16 << 10
"""Of larger files, the first and last bytes and evenly spaced samples are hashed."""


class Checkpoint:
    """An open checkpoint; a context manager that closes its files.

    Raises:
        InvalidCheckpoint: `directory` is no readable checkpoint of a supported architecture.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise InvalidCheckpoint(f"{self.directory} is not a directory")
        self.raw_config = read_object(self.directory / CONFIG)
        self.config: ModelConfig = parse_config(self.raw_config, source=str(self.directory / CONFIG))
        self.eos_token_ids = self._read_eos()
        self._files = _locate(self.directory)
        self._open: dict[Path, Any] = {}

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The safetensors files, sorted by name."""
        return tuple(sorted(set(self._files.values())))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Read one tensor on the CPU, in the type it is stored in.

        Raises:
            InvalidCheckpoint: it is missing or has another shape; names the file and the tensor.
        """
        path = self._files.get(name)
        if path is None:
            raise InvalidCheckpoint(f"{self.directory}: tensor {name} is in none of its safetensors files")
        try:
            tensor: Tensor = self._handle(path).get_tensor(name)
        except SafetensorError as error:
            raise InvalidCheckpoint(f"{path}: tensor {name} cannot be read: {error}") from error
        if tuple(tensor.shape) != shape:
            raise InvalidCheckpoint(
                f"{path}: tensor {name} has shape {tuple(tensor.shape)}, but config.json asks for {shape}"
            )
        return tensor

    def fingerprint(self) -> str:
        """32 hex digits that change with the architecture or the weights; the same for a copy.

        Large files are sampled, so this costs milliseconds, not a read of the weights.
        """
        digest = hashlib.blake2b(digest_size=16)
        config = {key: value for key, value in self.raw_config.items() if key != "transformers_version"}
        digest.update(json.dumps(config, sort_keys=True).encode())
        for path in self.weight_files:
            size = path.stat().st_size
            digest.update(f"\0{path.name}:{size}\0".encode())
            with path.open("rb") as file:
                if size <= _WHOLE_BYTES:
                    digest.update(file.read())
                    continue
                for index in range(_SAMPLES):
                    file.seek(index * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()

    def close(self) -> None:
        """Unmap the files; tensors already read stay valid."""
        self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _handle(self, path: Path) -> Any:
        handle = self._open.get(path)
        if handle is None:
            handle = self._open[path] = open_weights(path)
        return handle

    def _read_eos(self) -> frozenset[int]:
        ids = set(self.config.eos_token_ids)
        path = self.directory / "generation_config.json"
        if path.exists():
            ids.update(token_ids(read_object(path).get("eos_token_id"), source=str(path)))
        return frozenset(ids)


def _locate(directory: Path) -> Mapping[str, Path]:
    """Which file holds each tensor."""
    index = directory / INDEX
    single = directory / SINGLE
    if single.exists():
        return dict.fromkeys(open_weights(single).keys(), single)
    if not index.exists():
        raise InvalidCheckpoint(f"{directory} has neither {SINGLE} nor {INDEX}")
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InvalidCheckpoint(f"{index} has no weight_map")
    files = {str(name): directory / str(file) for name, file in weight_map.items()}
    for path in sorted(set(files.values())):
        if path.parent != directory:
            raise InvalidCheckpoint(f"{index} names {path.name} outside of its directory")
        if not path.exists():
            missing = next(name for name, file in files.items() if file == path)
            raise InvalidCheckpoint(f"{path} is missing; {INDEX} says it holds {missing}")
    return files
