"""One file that tells what a look at a fleet found, for whoever is asked to help."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from trireme.cli.doctoring.collecting import Look
from trireme.cli.doctoring.findings import Finding
from trireme.errors import InvalidConfiguration


def write_bundle(path: Path, look: Look, found: Sequence[Finding]) -> None:
    """Write a .tar.gz that only its owner can read.

    Raises:
        InvalidConfiguration: the file exists, or cannot be written.
    """
    papers = {
        "findings.json": json.dumps([as_plain(finding) for finding in found], indent=1),
        "facts.json": json.dumps(asdict(look.facts), indent=1),
        **look.papers,
    }
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise InvalidConfiguration(f"{path} exists: name another file", param="bundle") from None
    except OSError as error:
        raise InvalidConfiguration(f"cannot write {path}: {error.strerror}", param="bundle") from error
    with os.fdopen(descriptor, "wb") as out, tarfile.open(fileobj=out, mode="w:gz") as bundle:
        for name, text in papers.items():
            raw = text.encode()
            entry = tarfile.TarInfo(f"{path.name.removesuffix('.tar.gz')}/{name}")
            entry.size, entry.mtime, entry.mode = len(raw), int(time.time()), 0o600
            bundle.addfile(entry, io.BytesIO(raw))


def as_plain(finding: Finding) -> dict[str, object]:
    """A finding for JSON."""
    return {**asdict(finding), "severity": finding.severity.value}
