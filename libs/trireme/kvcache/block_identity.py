"""The identity of a KV block: a hash of its tokens and of everything before them.

A block is `block_size` consecutive tokens of a sequence that starts at position 0. Its hash
covers the hash before it, so equal hashes mean equal prefixes; the first covers the root,
which tells tenants, models, precisions and layouts apart. Only full blocks have a hash.
Every process of the fleet computes the same bytes.

Where a chain does not simply go on it has a joint, a parent other than the hash before:

    public | private    blocks inside a text that is declared public hang on a root that all tenants
                        share; the first one behind it hangs on (last public hash, tenant's root)
    head | rest         after a cut (`truncated_prefix`) the rest hangs on (hash before the cut, cut)
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from typing import Final

HASH_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class HashChain:
    """How the hashes of one sequence hang together."""

    salt: bytes
    """The root: the tenant's."""
    joints: tuple[tuple[int, bytes], ...] = ()
    """(block index, its parent), ascending: instead of the root or of the hash before it."""

    def extend(self, known: Sequence[bytes], token_ids: Sequence[int], block_size: int) -> list[bytes]:
        """Hashes of the full blocks of `token_ids`, which follow the blocks with hashes `known`."""
        first = len(known)
        stop = first + len(token_ids) // block_size
        starts = [first, *[index for index, _ in self.joints if first < index < stop], stop]
        joints = dict(self.joints)
        parent = known[-1] if known else self.salt
        hashes: list[bytes] = []
        for start, end in pairwise(starts):
            parent = joints.get(start, parent)
            part = token_ids[(start - first) * block_size : (end - first) * block_size]
            hashes += extend_hashes(parent, part, block_size)
            parent = hashes[-1] if hashes else parent
        return hashes


@dataclass(frozen=True, slots=True)
class Supply:
    """Blocks of a sequence before a cut that hold the keys and values of blocks behind it."""

    hashes: tuple[bytes, ...]
    """Of the first blocks behind the cut, as they were called before."""
    shift_tokens: int
    """By how much their positions fall."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TruncatedPrefix:
    """What a sequence is after a cut, and what it was before.

    The keys and values behind the cut were computed while the dropped tokens were seen. They are
    not those of the shorter text, so they have names of their own: a later turn that is cut alike
    finds them, and nobody takes them for a plain prefix. Where no supply is resident the blocks
    are computed from what stays, under the same names.
    """

    chain: HashChain
    """Of the tokens that stay."""
    head_blocks: int
    """Leading blocks that stay as they are, name and bytes."""
    supplies: tuple[Supply, ...]
    """Where blocks from `head_blocks` on can come from, latest cut first: as many as are resident."""


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


def tenant_root(fleet: str, tenant: str) -> bytes:
    """The root of a tenant's hashes in a fleet, for all models: their stores are apart."""
    digest = blake2b(fleet.encode(), digest_size=HASH_BYTES)
    digest.update(b"\0" + tenant.encode())
    return digest.digest()


def public_root(fleet: str) -> bytes:
    """The root of what a fleet's operator declared public; no tenant's."""
    return blake2b(fleet.encode(), digest_size=HASH_BYTES, person=b"public").digest()


def public_blocks(token_ids: Sequence[int], public_prefixes: Iterable[Sequence[int]], block_size: int) -> int:
    """Leading full blocks of `token_ids` that lie inside one of the declared prefixes."""
    return max((_equal_tokens(token_ids, prefix) // block_size for prefix in public_prefixes), default=0)


def hash_chain(
    token_ids: Sequence[int],
    block_size: int,
    *,
    salt: bytes,
    public_root: bytes = b"",
    num_public_blocks: int = 0,
) -> HashChain:
    """The chain of a whole sequence, of which the first `num_public_blocks` blocks are public.

    Args:
        salt: the tenant's root.
        public_root: the root of public blocks.
    """
    if not num_public_blocks:
        return HashChain(salt)
    public = extend_hashes(public_root, token_ids[: num_public_blocks * block_size], block_size)
    private = blake2b(public[-1], digest_size=HASH_BYTES, person=b"private")
    private.update(salt)
    return HashChain(salt, ((0, public_root), (num_public_blocks, private.digest())))


def truncated_prefix(
    token_ids: Sequence[int],
    block_size: int,
    chain: HashChain,
    *,
    head: int,
    cuts: Sequence[int],
    window: int,
) -> TruncatedPrefix:
    """What becomes of a sequence that was cut.

    Args:
        token_ids: the whole sequence, never cut.
        chain: of the whole sequence, before any cut (`hash_chain`).
        head: tokens kept at the start; whole blocks.
        cuts: where the rest began after each cut, ascending; whole blocks, at least one.
        window: tokens that the sequence had at most at any time.
    """
    head_blocks = head // block_size
    head_hashes = chain.extend((), token_ids[:head], block_size)
    supplies: list[Supply] = []
    before = head
    for number, cut in enumerate(cuts, start=1):
        held = chain.extend(head_hashes, token_ids[before : before + window - head], block_size)
        moved = cut - before
        gone = moved // block_size
        older = (Supply(supply.hashes[gone:], supply.shift_tokens + moved) for supply in supplies)
        supplies = [Supply(tuple(held[gone:]), moved), *(supply for supply in older if supply.hashes)]
        chain = chain_after_cut(chain, [*head_hashes, *held], head_blocks, gone, number)
        before = cut
    return TruncatedPrefix(chain=chain, head_blocks=head_blocks, supplies=tuple(supplies))


def chain_after_cut(
    chain: HashChain,
    hashes: Sequence[bytes],
    head_blocks: int,
    dropped_blocks: int,
    number: int,
    *,
    is_unseen: bool = False,
) -> HashChain:
    """The chain of what stays when `dropped_blocks` blocks behind the head go.

    Args:
        chain: before the cut.
        hashes: under it, as far as the last block that goes, or farther.
        number: which cut of the conversation this is, from 1.
        is_unseen: nothing of what stays was computed while the dropped tokens were there, so it is not
            what others keep under the names of this cut.
    """
    person = b"unseen" if is_unseen else b"cut"
    root = blake2b(hashes[head_blocks + dropped_blocks - 1], digest_size=HASH_BYTES, person=person)
    root.update(b"".join(part.to_bytes(8, "little") for part in (head_blocks, dropped_blocks, number)))
    root.update(chain.salt)
    joints = (joint for joint in chain.joints if joint[0] < head_blocks)
    return HashChain(chain.salt, (*joints, (head_blocks, root.digest())))


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


def _equal_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix."""
    length = 0
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            break
        length += 1
    return length


def _little_endian(token_ids: Sequence[int]) -> bytes:
    """Four bytes per token."""
    packed = array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()
