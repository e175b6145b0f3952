"""How a stored block looks, in the arena and in a segment file alike: a header, then the payload.

A block's image fills a whole number of 4 KiB pages in both places, so that moving it
between the tiers is one read or one write of aligned memory. The generation is the only
field that changes during a block's life, and the only one that the header's checksum
leaves out; it means something in the arena alone.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, NewType

import xxhash

from trireme.errors import InvalidRequest

Buffer = bytes | bytearray | memoryview

BlockKey = NewType("BlockKey", bytes)
"""Digest of the namespace and hash of the block, 32 bytes: the block's name in every tier."""

HASH_BYTES = 16
PAGE_BYTES = 4096
HEADER_BYTES = 192
MAX_PAYLOAD_BYTES = 2**32 - PAGE_BYTES
_MAGIC = b"TRIKVBLK"
_NO_MAGIC = bytes(len(_MAGIC))
_FORMAT_VERSION = 2
_TENANT_BYTES = 64
_FIELDS = struct.Struct("<8sHHI32sQQd64s")
_CHECKSUM = struct.Struct("<Q")
_GENERATION = struct.Struct("<Q")
_GENERATION_AT = HEADER_BYTES - _GENERATION.size


class BlockHeader(NamedTuple):
    """What a block's image says of its payload."""

    key: BlockKey
    payload_bytes: int
    checksum: int
    """`payload_checksum` of the payload."""
    tenant: str
    """Who pays for the room, as `tenant_label` writes it."""
    saved_unix_s: float
    position: int = 0
    """Place in the run of blocks that were saved together; 0 begins one."""


def namespace_digest(namespace: str) -> bytes:
    """16 bytes that stand for a namespace (model key, dtype and layout)."""
    return hashlib.blake2b(namespace.encode(), digest_size=16).digest()


def block_key(digest: bytes, block_hash: bytes) -> BlockKey:
    """The key of one block of a namespace, given by its digest."""
    return BlockKey(digest + block_hash)


def block_keys(namespace: str, block_hashes: bytes) -> list[BlockKey]:
    """The keys of concatenated 16-byte hashes.

    Raises:
        InvalidRequest: the length is no multiple of 16.
    """
    if len(block_hashes) % HASH_BYTES:
        raise InvalidRequest(
            f"block_hashes has {len(block_hashes)} bytes, which is no multiple of {HASH_BYTES}",
            param="block_hashes",
        )
    digest = namespace_digest(namespace)
    starts = range(0, len(block_hashes), HASH_BYTES)
    return [block_key(digest, block_hashes[start : start + HASH_BYTES]) for start in starts]


def join_hashes(hashes: Sequence[bytes]) -> bytes:
    """Concatenate 16-byte hashes.

    Raises:
        ValueError: one has another length.
    """
    if any(len(block_hash) != HASH_BYTES for block_hash in hashes):
        raise ValueError(f"block hashes have {HASH_BYTES} bytes")
    return b"".join(hashes)


def tenant_label(tenant: str) -> str:
    """The tenant's name, shortened to at most 64 bytes of UTF-8 and still distinct."""
    encoded = tenant.encode()
    if len(encoded) <= _TENANT_BYTES:
        return tenant
    mark = hashlib.blake2b(encoded, digest_size=8).hexdigest()
    return encoded[:47].decode(errors="ignore") + "~" + mark


def payload_checksum(payload: Buffer) -> int:
    """XXH3 of a payload, 64 bits; the interpreter lock is released meanwhile.

    It finds accidents, as a CRC does, at the speed of memory; it is no proof against a forger.
    """
    return xxhash.xxh3_64_intdigest(payload)


@lru_cache(maxsize=1024)
def image_bytes(payload_bytes: int) -> int:
    """Bytes of a block's image: header and payload, rounded up to whole pages."""
    return -(-(HEADER_BYTES + payload_bytes) // PAGE_BYTES) * PAGE_BYTES


def write_header(image: memoryview | bytearray, header: BlockHeader, *, generation: int, at: int = 0) -> None:
    """Write a header to the beginning of an image, which lies at `at`."""
    fields = _FIELDS.pack(
        _MAGIC, _FORMAT_VERSION, HEADER_BYTES, header.position, header.key,
        header.payload_bytes, header.checksum, header.saved_unix_s, header.tenant.encode(),
    )  # fmt: skip
    image[at : at + _FIELDS.size] = fields
    _CHECKSUM.pack_into(image, at + _FIELDS.size, payload_checksum(fields))
    write_generation(image, generation, at=at)


def read_header(image: Buffer) -> BlockHeader | None:
    """The header at the beginning of an image; None where there is no intact one of this format."""
    if len(image) < HEADER_BYTES:
        return None
    fields = bytes(image[: _FIELDS.size])
    magic, version, header_bytes, position, key, payload_bytes, checksum, saved, tenant = _FIELDS.unpack(
        fields
    )
    if (magic, version, header_bytes) != (_MAGIC, _FORMAT_VERSION, HEADER_BYTES):
        return None
    if _CHECKSUM.unpack_from(image, _FIELDS.size)[0] != payload_checksum(fields):
        return None
    return BlockHeader(
        key=BlockKey(key),
        payload_bytes=payload_bytes,
        checksum=checksum,
        tenant=tenant.rstrip(b"\0").decode(errors="replace"),
        saved_unix_s=saved,
        position=position,
    )


def payload_of(image: Buffer, payload_bytes: int) -> memoryview:
    """The payload inside an image."""
    return memoryview(image)[HEADER_BYTES : HEADER_BYTES + payload_bytes]


def is_intact(image: Buffer, header: BlockHeader) -> bool:
    """Whether the image's payload is the one its header speaks of."""
    payload = payload_of(image, header.payload_bytes)
    return len(payload) == header.payload_bytes and payload_checksum(payload) == header.checksum


def wipe_header(image: memoryview | bytearray, *, at: int = 0) -> None:
    """Leave no readable header at the beginning of an image, which lies at `at`."""
    image[at : at + len(_MAGIC)] = _NO_MAGIC


def write_generation(image: memoryview | bytearray, generation: int, *, at: int = 0) -> None:
    """Stamp an image, which lies at `at`, with the generation of its slot; 0: nothing readable is here."""
    _GENERATION.pack_into(image, at + _GENERATION_AT, generation)


def read_generation(image: Buffer) -> int:
    """The generation that an image shows now."""
    return int(_GENERATION.unpack_from(image, _GENERATION_AT)[0])
