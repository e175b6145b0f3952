"""A client's own marks on what is stored for it."""

from __future__ import annotations

from collections.abc import Mapping

from trireme.errors import InvalidRequest

MAX_ENTRIES = 16
MAX_KEY, MAX_VALUE = 64, 512
"""Characters."""


def check_metadata(metadata: Mapping[str, str] | None) -> None:
    """Raise InvalidRequest unless it is within OpenAI's bounds."""
    if metadata is None:
        return
    if len(metadata) > MAX_ENTRIES:
        raise InvalidRequest(
            f"metadata has {len(metadata)} entries; at most {MAX_ENTRIES} are allowed", param="metadata"
        )
    for key, value in metadata.items():
        if len(key) > MAX_KEY or len(value) > MAX_VALUE:
            raise InvalidRequest(
                f"metadata: keys have at most {MAX_KEY} characters, values {MAX_VALUE}", param="metadata"
            )
