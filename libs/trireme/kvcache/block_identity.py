"""The identity of a KV block: a hash of its tokens and of everything before them.

A block is `block_size` consecutive tokens of a sequence that starts at position 0. Its hash
covers the hash before it, so equal hashes mean equal prefixes; the first covers the root,
which tells tenants, models, precisions and layouts apart. Only full blocks have a hash.
Every process of the fleet computes the same bytes.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

HASH_BYTES: Final = 16


def root_salt(*, tenant: str, model_key: str, kv_layout: str) -> bytes:
    """The root of a tenant's hashes for one model.

    Args:
        tenant: whose cache this is; tenants never share blocks.
        model_key: fingerprint of the weights.
        kv_layout: type, shape and version of a block's bytes.
    """
    digest = blake2b(digest_size=HASH_BYTES)
    for part in (tenant, model_key, kv_layout):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(4, "little"))
        digest.update(encoded)
    return digest.digest()


def block_hashes(token_ids: Sequence[int], block_size: int, salt: bytes) -> tuple[bytes, ...]:
    """Hashes of all full blocks of `token_ids`, in order; `salt` is the root."""
    return extend_hashes(salt, token_ids, block_size)


def extend_hashes(parent: bytes, token_ids: Sequence[int], block_size: int) -> tuple[bytes, ...]:
    """Hashes of the full blocks of `token_ids`, which follow the block with hash `parent`."""
    data = memoryview(_little_endian(token_ids))
    width = 4 * block_size
    hashes: list[bytes] = []
    for start in range(0, len(data) - width + 1, width):
        digest = blake2b(parent, digest_size=HASH_BYTES)
        digest.update(data[start : start + width])
        parent = digest.digest()
        hashes.append(parent)
    return tuple(hashes)


def _little_endian(token_ids: Sequence[int]) -> bytes:
    """Four bytes per token."""
    packed = array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()
