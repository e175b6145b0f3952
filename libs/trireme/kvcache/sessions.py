"""Conversations: a view on the chains of blocks, which say themselves what they continue.

A conversation is the chain that its last turn ended with. It owns nothing: blocks live and die by
their own use, and whoever reads compares hashes. The view keeps a conversation's blocks together in
age, tells what is here of it, and lets a hint name it in place of its blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from trireme.kvcache.block_codec import BlockKey

MAX_SESSIONS = 100_000
"""Conversations kept; of more the one used least recently is forgotten, its blocks are not."""


@dataclass(frozen=True, slots=True)
class Session:
    """The end of a conversation's last turn."""

    namespace: str
    keys: Sequence[BlockKey]
    version: int
    """Orders the turns."""
    used_s: float


class Sessions:
    """The conversations of all tenants."""

    def __init__(self, *, ttl_s: float, max_sessions: int = MAX_SESSIONS) -> None:
        self._ttl_s = ttl_s
        self._max_sessions = max_sessions
        self._sessions: OrderedDict[tuple[str, str], Session] = OrderedDict()
        """Least recently used first."""

    def __len__(self) -> int:
        return len(self._sessions)

    def note(
        self,
        tenant: str,
        session_id: str,
        namespace: str,
        keys: Sequence[BlockKey],
        *,
        version: int,
        now_s: float,
    ) -> bool:
        """A turn ended with this chain; False where a turn of the same or a higher version did before.

        Two turns of one conversation may end in any order, and be told twice: the last one by version stays,
        and the blocks of the other one stay blocks.
        """
        known = self._sessions.get((tenant, session_id))
        if known is not None and known.version >= version:
            return False
        self._sessions[tenant, session_id] = Session(namespace, tuple(keys), version, now_s)
        self._sessions.move_to_end((tenant, session_id))
        while len(self._sessions) > self._max_sessions:
            self._sessions.popitem(last=False)
        return True

    def get(self, tenant: str, session_id: str) -> Session | None:
        """A tenant's conversation; None where nothing is known of it."""
        return self._sessions.get((tenant, session_id))

    def expire(self, now_s: float) -> None:
        """Forget the conversations that were not continued for the time to live."""
        while self._sessions:
            oldest = next(iter(self._sessions.values()))
            if oldest.used_s + self._ttl_s > now_s:
                return
            self._sessions.popitem(last=False)
