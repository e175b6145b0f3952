"""What a client shows of itself: its API key."""

from __future__ import annotations

import os

API_KEY_VARIABLE = "TRIREME_API_KEY"


def call_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata that each call brings. None: the key in TRIREME_API_KEY; empty: no key."""
    key = os.environ.get(API_KEY_VARIABLE, "") if api_key is None else api_key
    return (("authorization", f"Bearer {key}"),) if key else ()
