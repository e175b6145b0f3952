"""Layer-wise preloading: a step's layers, each of which waits for its own KV and no more.

Source: CachedAttention (ATC 2024), layer-wise pre-loading.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from trireme.engine.block_moves import Load
from trireme.engine.kv_copies import KvCopies
from trireme.models.model import LayerKv


class GatedLayers(Sequence[LayerKv]):
    """A model walks its layers and this in step: layer i is handed over when i's loads are in.

    Raises CopyFailed from the walk: a load will never be complete.
    """

    def __init__(self, layers: Sequence[LayerKv], loads: Sequence[Load], copies: KvCopies) -> None:
        self._layers = layers
        self._loads = loads
        self._copies = copies

    def __len__(self) -> int:
        return len(self._layers)

    @overload
    def __getitem__(self, index: int) -> LayerKv: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[LayerKv]: ...
    def __getitem__(self, index: int | slice) -> LayerKv | Sequence[LayerKv]:
        if isinstance(index, slice):
            return [self[layer] for layer in range(*index.indices(len(self)))]
        layer = index if index >= 0 else index + len(self._layers)
        kv = self._layers[layer]
        for load in self._loads:
            self._copies.join(load.copy, load.part_of_layer(layer))
        return kv
