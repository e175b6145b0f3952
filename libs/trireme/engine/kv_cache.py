"""The engine's KV memory: tensors, the pool of blocks, and the table of who holds which."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from trireme.engine.sequence import Sequence
from trireme.engine.tier import KvTier
from trireme.kvcache.block_identity import extend_hashes
from trireme.kvcache.block_pool import BlockPool
from trireme.models.config import ModelConfig
from trireme.models.model import LayerKv, Model

LAYOUT_VERSION: Final = 1


def block_bytes(config: ModelConfig, *, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block: keys and values of all layers."""
    return 2 * config.num_layers * block_size * config.num_kv_heads * config.head_dim * dtype.itemsize


class KvCache:
    """Blocks of `block_size` tokens for one model.

    Args:
        model: gives shape, type and device.
        num_blocks, block_size: of the pool.
        max_sequences: rows of the block table.
        max_model_len: longest sequence.
        shares: reuse complete blocks; else no block is ever found again.
        tier: told what becomes resident and what leaves.
    """

    def __init__(
        self,
        model: Model,
        *,
        num_blocks: int,
        block_size: int,
        max_sequences: int,
        max_model_len: int,
        shares: bool,
        tier: KvTier | None,
    ) -> None:
        config = model.config
        shape = (block_size, config.num_kv_heads, config.head_dim)
        self.block_size = block_size
        self._shares = shares
        self._tier = tier
        self._device = model.device
        # Zeros, not whatever was there: masked scores times a stale NaN would still be NaN.
        self._memory = torch.zeros(
            (config.num_layers, 2, num_blocks, *shape), dtype=model.dtype, device=model.device
        )
        self.layers: tuple[LayerKv, ...] = tuple((layer[0], layer[1]) for layer in self._memory)
        self._staging = torch.zeros((config.num_layers, 2, *shape), dtype=model.dtype)
        self._staging_bytes: NDArray[np.uint8] = self._staging.view(-1).view(torch.uint8).numpy()
        dtype = str(model.dtype).removeprefix("torch.")
        self.layout = f"kv{LAYOUT_VERSION}:{config.num_layers}x2x{'x'.join(map(str, shape))}:{dtype}"
        """A block's bytes: (layer, keys then values, token, kv head, head dim), row-major, little-endian."""
        self.pool = BlockPool(
            num_blocks,
            on_cached=self._on_cached,
            on_evicted=self._on_evicted,
        )
        self._tables = np.zeros((max_sequences, -(-max_model_len // block_size)), dtype=np.int64)
        self._free_rows = list(range(max_sequences - 1, -1, -1))
        self._pending: dict[bytes, Sequence] = {}
        """Prompt blocks that a running sequence is about to complete."""

    def hashes_of(self, token_ids: Seq[int], salt: bytes) -> tuple[bytes, ...]:
        """Hashes of the full blocks of `token_ids`."""
        return extend_hashes(salt, token_ids, self.block_size)

    def hashes(self, sequence: Sequence, num_tokens: int) -> list[bytes]:
        """Hashes of the full blocks of the sequence's first `num_tokens` tokens."""
        known = sequence.hashes
        wanted = num_tokens // self.block_size
        if len(known) < wanted:
            start = len(known) * self.block_size
            tokens = sequence.token_ids[start : wanted * self.block_size]
            known.extend(extend_hashes(known[-1] if known else sequence.salt, tokens, self.block_size))
        return known if len(known) == wanted else known[:wanted]

    def match(self, sequence: Sequence) -> list[int]:
        """Resident blocks that the sequence could start from."""
        if not self._shares:
            return []
        return self.pool.match(self.hashes(sequence, sequence.reusable_tokens))

    def next_block(self, sequence: Sequence, num_matched: int) -> bytes | None:
        """Hash of the first block that the sequence would compute and others could share."""
        hashes = self.hashes(sequence, sequence.reusable_tokens)
        return hashes[num_matched] if self._shares and num_matched < len(hashes) else None

    def is_pending(self, block_hash: bytes | None) -> bool:
        """A running sequence is computing this block."""
        return block_hash is not None and block_hash in self._pending

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def admit(self, sequence: Sequence) -> bool:
        """Give the sequence a table row, its resident prefix, and blocks for all it must compute.

        Sets `num_computed` to the tokens found. False, and nothing taken, if blocks or rows lack.
        """
        matched = self.match(sequence)
        self.pool.acquire(matched)
        fresh = self.pool.allocate(self.blocks_for(sequence.num_target) - len(matched))
        if fresh is None or not self._free_rows:
            self.pool.release(matched)
            if fresh is not None:
                self.pool.release(fresh)
            return False
        sequence.row = self._free_rows.pop()
        sequence.blocks = matched + fresh
        sequence.num_computed = len(matched) * self.block_size
        sequence.num_committed = len(matched)
        self._tables[sequence.row, : len(sequence.blocks)] = sequence.blocks
        if self._shares:
            for block_hash in self.hashes(sequence, sequence.reusable_tokens)[len(matched) :]:
                self._pending.setdefault(block_hash, sequence)
        return True

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Hold blocks for the sequence's first `num_tokens` tokens; False if the pool is out of them."""
        missing = self.blocks_for(num_tokens) - len(sequence.blocks)
        if missing <= 0:
            return True
        fresh = self.pool.allocate(missing)
        if fresh is None:
            return False
        held = len(sequence.blocks)
        sequence.blocks.extend(fresh)
        self._tables[sequence.row, held : held + missing] = fresh
        return True

    def commit(self, sequence: Sequence) -> None:
        """Let others find the blocks that `num_computed` has completed."""
        complete = sequence.num_computed // self.block_size
        if complete == sequence.num_committed:
            return
        hashes = self.hashes(sequence, complete * self.block_size)
        for index in range(sequence.num_committed, complete):
            if self._shares:
                self.pool.cache(sequence.blocks[index], hashes[index])
                self._settle(hashes[index], sequence)
        sequence.num_committed = complete

    def release(self, sequence: Sequence) -> None:
        """Take everything back from a sequence; complete blocks stay findable."""
        if sequence.row < 0:
            return
        for block_hash in sequence.hashes[sequence.num_committed :]:
            self._settle(block_hash, sequence)
        self.pool.release(sequence.blocks)
        self._free_rows.append(sequence.row)
        sequence.row = -1
        sequence.blocks = []
        sequence.num_computed = 0
        sequence.num_committed = 0

    def scrub(self, sequence: Sequence) -> None:
        """Forget and zero what a failed sequence wrote: it may hold values that are not numbers."""
        own = [block_id for block_id in sequence.blocks if self.pool.refs(block_id) == 1]
        if not own:
            return
        self.pool.forget(own)
        self._memory[:, :, torch.tensor(own, dtype=torch.int64, device=self._device)] = 0

    def tables(self, rows: list[int], width: int) -> NDArray[np.int64]:
        """Block tables (rows, width) of running sequences; a copy."""
        return self._tables[rows, :width]

    def export_block(self, block_hash: bytes) -> bytes | None:
        """A resident block's bytes, in `layout`; None if it is not resident."""
        block_id = self.pool.find(block_hash)
        return None if block_id is None else self._export(block_id)

    def import_block(self, block_hash: bytes, payload: bytes | memoryview) -> bool:
        """Make a block resident from bytes in `layout`.

        False if the bytes have the wrong length or every block is held.
        """
        if self.pool.find(block_hash) is not None:
            return True
        view = memoryview(payload)
        if view.nbytes != self._staging_bytes.nbytes or not self._shares:
            return False
        taken = self.pool.allocate(1)
        if taken is None:
            return False
        self._staging_bytes[:] = np.frombuffer(view, dtype=np.uint8)
        self._memory[:, :, taken[0]] = self._staging.to(self._device)
        self.pool.cache(taken[0], block_hash)
        self.pool.release(taken)
        return True

    def _export(self, block_id: int) -> bytes:
        self._staging.copy_(self._memory[:, :, block_id])
        return self._staging_bytes.tobytes()

    def _settle(self, block_hash: bytes, sequence: Sequence) -> None:
        if self._pending.get(block_hash) is sequence:
            del self._pending[block_hash]

    def _on_cached(self, block_hash: bytes, block_id: int) -> None:
        if self._tier is not None:
            self._tier.on_cached(block_hash)

    def _on_evicted(self, block_hash: bytes, block_id: int) -> None:
        if self._tier is not None:
            self._tier.on_evicted(block_hash, lambda: self._export(block_id))
