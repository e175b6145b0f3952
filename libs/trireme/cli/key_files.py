"""Changes to a keys file: whole and at once, so that no gateway reads half of it."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from trireme.errors import InvalidConfiguration
from trireme.runtime.fleet import Name
from trireme.runtime.tenant_keys import key_digest, load_keys, new_key

_NAME: TypeAdapter[str] = TypeAdapter(Name)


def entry_text(tenant: str, key_id: str | None) -> tuple[str, str]:
    """A new key, and the YAML that makes a gateway know it.

    Raises:
        InvalidConfiguration: a name is malformed.
    """
    key, entry = _made(tenant, key_id)
    return key, yaml.safe_dump({"tenants": {tenant: {"keys": [entry]}}}, sort_keys=False).rstrip()


def add_key(path: Path, tenant: str, key_id: str | None) -> str:
    """Add a new key for the tenant and return it.

    Raises:
        InvalidConfiguration: a name is malformed or taken, or the file is not right.
    """
    document = _read(path) if path.exists() else {}
    key, entry = _made(tenant, key_id)
    tenants = document.setdefault("tenants", {})
    found = tenants.get(tenant) or {}
    present = found.get("keys") or []
    if any(other["id"] == entry["id"] for other in present):
        raise InvalidConfiguration(
            f"{path}: tenant {tenant!r} has a key {entry['id']!r}: choose another --id", param="--id"
        )
    tenants[tenant] = {**found, "keys": [*present, entry]}
    _write(path, document)
    return key


def remove_key(path: Path, tenant: str, key_id: str) -> None:
    """Take a key out.

    Raises:
        InvalidConfiguration: there is none of that name, or the file is not right.
    """
    document = _read(path)
    found = (document.get("tenants") or {}).get(tenant) or {}
    present = found.get("keys") or []
    left = [entry for entry in present if entry["id"] != key_id]
    if len(left) == len(present):
        raise InvalidConfiguration(f"{path}: tenant {tenant!r} has no key {key_id!r}", param="ID")
    found["keys"] = left
    _write(path, document)


def _made(tenant: str, key_id: str | None) -> tuple[str, dict[str, str]]:
    key_id = key_id or f"{tenant[:50]}-{secrets.token_hex(3)}"
    for option, name in (("--tenant", tenant), ("--id", key_id)):
        try:
            _NAME.validate_python(name)
        except ValidationError:
            raise InvalidConfiguration(
                f"{option} {name!r}: a name has 1 to 63 letters, digits and . _ -, "
                "and starts with a letter or digit",
                param=option,
            ) from None
    key = new_key()
    return key, {"id": key_id, "sha256": key_digest(key)}


def _read(path: Path) -> dict[str, Any]:
    load_keys(path)
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def _write(path: Path, document: dict[str, Any]) -> None:
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            yaml.safe_dump(document, file, sort_keys=False)
        load_keys(Path(name))
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
