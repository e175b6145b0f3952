"""The keys file: tenants, what they may use, and the SHA-256 of each of their API keys.

Keys are 256 random bits, so a plain digest of them cannot be searched. The file is read again
when it changes; one that is not right leaves the keys as they were.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trireme.errors import InvalidConfiguration
from trireme.runtime.fleet import Name

log = logging.getLogger(__name__)

KEY_PREFIX = "trk_"
"""Lets scanners find keys that were published by mistake."""
MAX_KEY_CHARACTERS = 256
"""Longer ones are refused unread."""
MAX_FILE_BYTES = 8 * 2**20
POLL_S = 1.0


class Role(StrEnum):
    """What a key opens."""

    INFERENCE = "inference"
    """Models, requests, reflection."""
    METRICS = "metrics"
    """The measurements, and nothing else."""
    ADMIN = "admin"
    """Everything."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class KeyEntry(_Section):
    """One key, as far as it is kept."""

    id: Name
    """Its name in the audit log."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Tenant(_Section):
    """Who pays, who is isolated from others, who shares fairly."""

    keys: list[KeyEntry] = Field(default_factory=list, max_length=64)
    """Several are valid at once, so that one can follow the other."""
    roles: frozenset[Role] = frozenset({Role.INFERENCE})
    requests_per_minute: int = Field(default=0, ge=0, le=10_000_000)
    """In the whole fleet; 0: as many as there is room for."""
    tokens_per_minute: int = Field(default=0, ge=0, le=10_000_000_000)
    """Prompt and answer tokens in the whole fleet; 0: as many as there is room for."""
    max_inflight: int = Field(default=0, ge=0, le=1_000_000)
    """Requests at once in each gateway; 0: as many as there is room for."""
    weight: float = Field(default=1.0, ge=0.01, le=100.0)
    """Its part of a fleet in which others wait, over the part of a tenant of weight 1."""


class KeysFile(_Section):
    """The whole file."""

    tenants: dict[Name, Tenant] = Field(default_factory=dict, max_length=65536)

    @model_validator(mode="after")
    def _keys_differ(self) -> KeysFile:
        digests: set[str] = set()
        for name, tenant in self.tenants.items():
            ids = [key.id for key in tenant.keys]
            if len(set(ids)) != len(ids):
                raise ValueError(f"tenant {name!r} has two keys of the same id")
            for key in tenant.keys:
                if key.sha256 in digests:
                    raise ValueError(f"key {key.id!r} of tenant {name!r} stands there twice")
                digests.add(key.sha256)
        return self


@dataclass(frozen=True, slots=True)
class KeyOwner:
    """Whose key it is."""

    tenant: str
    key_id: str
    limits: Tenant


def new_key() -> str:
    """A key of 256 random bits, to be shown once."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def key_digest(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def load_keys(path: Path) -> KeysFile:
    """Read and check a keys file.

    Raises:
        InvalidConfiguration: it is absent, too large, not YAML, or a value is wrong; names the key.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidConfiguration(f"cannot read {path}: {error.strerror}", param=str(path)) from error
    if len(raw) > MAX_FILE_BYTES:
        raise InvalidConfiguration(f"{path} is larger than {MAX_FILE_BYTES} bytes", param=str(path))
    try:
        data = yaml.safe_load(raw.decode())
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidConfiguration(f"{path} is not valid YAML: {error}", param=str(path)) from error
    try:
        return KeysFile.model_validate(data if data is not None else {})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "(top level)"
        raise InvalidConfiguration(f"{path}: {key}: {first['msg']}", param=key) from error


class KeyBook:
    """The keys that are valid now."""

    def __init__(self, path: Path) -> None:
        """Raises InvalidConfiguration: as `load_keys` does."""
        self._path = path
        self._seen = self._looked_at = _state_of(path)
        self.tenants: dict[str, Tenant] = {}
        self._owners: dict[str, KeyOwner] = {}
        self._take(load_keys(path))

    def find(self, key: str) -> KeyOwner | None:
        """The key's owner. Compared by digest: how long that takes says nothing of a key."""
        if len(key) > MAX_KEY_CHARACTERS:
            return None
        return self._owners.get(hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest())

    def refresh(self) -> bool:
        """Read the file again if it changed; True where its keys are in force."""
        state = _state_of(self._path)
        if state == self._looked_at:
            return state == self._seen
        self._looked_at = state
        try:
            found = load_keys(self._path)
        except InvalidConfiguration as error:
            log.error("keys_not_reloaded", extra={"path": str(self._path), "error": error.message})
            return False
        self._seen = state
        self._take(found)
        log.info("keys_reloaded", extra={"tenants": len(self.tenants), "keys": len(self._owners)})
        return True

    async def watch(self) -> None:
        """Follow the file for ever; also where it is a link that is turned to another file."""
        while True:
            await asyncio.sleep(POLL_S)
            await asyncio.to_thread(self.refresh)

    def _take(self, found: KeysFile) -> None:
        self.tenants = dict(found.tenants)
        self._owners = {
            key.sha256: KeyOwner(name, key.id, tenant)
            for name, tenant in found.tenants.items()
            for key in tenant.keys
        }


def _state_of(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
