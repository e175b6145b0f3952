"""The tensor that holds the engine's KV blocks, and blocks in and out of it as bytes."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trireme.kernels.kv_forms import kv_form
from trireme.models.config import ModelConfig
from trireme.models.model import LayerKv, Model

LAYOUT_VERSION: Final = 1


def block_bytes(config: ModelConfig, *, block_size: int, dtype: torch.dtype, kv_dtype: str = "auto") -> int:
    """Bytes of one block: keys and values of all layers of a model that computes in `dtype`."""
    form = kv_form(kv_dtype, dtype)
    row_bytes = form.row_elements(config.head_dim) * form.storage.itemsize
    return 2 * config.num_layers * block_size * config.num_kv_heads * row_bytes


def bytes_of(blocks: Tensor) -> NDArray[np.uint8]:
    """The bytes of a contiguous host tensor, flat; the same memory."""
    flat: NDArray[np.uint8] = blocks.view(-1).view(torch.uint8).numpy()
    return flat


class KvMemory:
    """`num_blocks` blocks of `block_size` tokens on the model's device, in a form of `kernels.kv_forms`.

    Args:
        spare_blocks: behind them, that no sequence holds: where padding writes.
    """

    def __init__(
        self,
        model: Model,
        *,
        num_blocks: int,
        block_size: int,
        kv_dtype: str = "auto",
        spare_blocks: int = 0,
    ) -> None:
        config, form = model.config, kv_form(kv_dtype, model.dtype)
        shape = (block_size, config.num_kv_heads, form.row_elements(config.head_dim))
        self.num_layers = config.num_layers
        self.device = model.device
        self.dtype = form.storage
        self.computed_dtype = model.dtype
        """What keys and values are read as."""
        self.block_shape = (config.num_layers, 2, *shape)
        """Of one block outside: (layer, keys then values, token, kv head, row)."""
        self.block_bytes = block_bytes(config, block_size=block_size, dtype=model.dtype, kv_dtype=kv_dtype)
        # Zeros, not whatever was there: masked scores times a stale NaN would still be NaN.
        self.tensor = torch.zeros(
            (config.num_layers, 2, num_blocks + spare_blocks, *shape), dtype=self.dtype, device=model.device
        )
        self.layers: tuple[LayerKv, ...] = tuple((layer[0], layer[1]) for layer in self.tensor)
        dtype = str(model.dtype).removeprefix("torch.")
        name = dtype if form.name == dtype else f"{form.name}.{dtype}"
        self.layout = f"kv{LAYOUT_VERSION}:{config.num_layers}x2x{'x'.join(map(str, shape))}:{name}"
        """A block's bytes: (layer, keys then values, token, kv head, row), row-major, little-endian; the
        form, and what was computed in if that is another."""
        self._staging = torch.zeros(self.block_shape, dtype=self.dtype)
        self._staging_bytes = bytes_of(self._staging)

    def read(self, block_id: int) -> bytes:
        """A block's bytes in `layout`."""
        self._staging.copy_(self.tensor[:, :, block_id])
        return self._staging_bytes.tobytes()

    def write(self, block_id: int, payload: bytes | memoryview) -> None:
        """Fill a block from `block_bytes` bytes in `layout`."""
        self._staging_bytes[:] = np.frombuffer(payload, dtype=np.uint8)
        self.tensor[:, :, block_id] = self._staging.to(self.device)

    def zero(self, block_ids: Seq[int]) -> None:
        """Overwrite blocks with zeros."""
        self.tensor[:, :, torch.tensor(block_ids, dtype=torch.int64, device=self.device)] = 0

    def host_blocks(self, count: int) -> Tensor:
        """Room for so many blocks in host memory, (count, *block_shape)."""
        return self._host((count, *self.block_shape))

    def host_layers(self, count: int) -> Tensor:
        """Room for so many blocks in host memory, layer by layer: (layers, count, *block_shape[1:])."""
        return self._host((self.num_layers, count, *self.block_shape[1:]))

    def _host(self, shape: tuple[int, ...]) -> Tensor:
        # Page-locked where a GPU copies to and from it: else its copies would hold up the host.
        return torch.empty(shape, dtype=self.dtype, pin_memory=self.device.type == "cuda")

    def gather(self, block_ids: Seq[int]) -> Tensor:
        """A copy of blocks, (blocks, *block_shape), contiguous, on the device."""
        index = torch.tensor(block_ids, dtype=torch.int64, device=self.device)
        return self.tensor.index_select(2, index).permute(2, 0, 1, 3, 4, 5).contiguous()

    def gather_layer(self, layer: int, block_ids: Tensor) -> Tensor:
        """A copy of one layer of blocks, (blocks, *block_shape[1:]), on the device."""
        return self.tensor[layer].index_select(1, block_ids).transpose(0, 1)

    def scatter(self, block_ids: Seq[int], blocks: Tensor) -> None:
        """Fill blocks from (blocks, *block_shape) on the device."""
        index = torch.tensor(block_ids, dtype=torch.int64, device=self.device)
        self.tensor.index_copy_(2, index, blocks.permute(1, 2, 0, 3, 4, 5))

    def scatter_layer(self, layer: int, block_ids: Tensor, blocks: Tensor) -> None:
        """Fill one layer of blocks from (blocks, *block_shape[1:]) on the device."""
        self.tensor[layer].index_copy_(1, block_ids, blocks.transpose(0, 1))
