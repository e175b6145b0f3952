"""What each tenant holds in one tier, and in which order it used it.

A tenant that would exceed its share gives up its own oldest runs; nobody else's are touched for it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from trireme.kvcache.stored_blocks import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """The largest share of each tier that a tenant may fill, 0..1."""

    default: float = 1.0
    by_tenant: Mapping[str, float] = field(default_factory=dict)

    def of(self, tenant: str) -> float:
        """The tenant's share."""
        return self.by_tenant.get(tenant, self.default)


class TenantLedger:
    """One tier's bytes by tenant."""

    def __init__(self, shares: Shares, *, capacity_bytes: int) -> None:
        self._shares = shares
        self._capacity_bytes = capacity_bytes
        self._runs: dict[str, OrderedDict[int, Run]] = {}
        self.bytes: Counter[str] = Counter()
        """By tenant; tenants that hold nothing are absent."""
        self.over_quota: Counter[str] = Counter()
        """Blocks that a tenant gave up because its share was full, since the start."""

    def add(self, run: Run) -> None:
        """A run entered the tier, as the one used last."""
        self._runs.setdefault(run.tenant, OrderedDict())[run.number] = run
        self.bytes[run.tenant] += run.size_bytes

    def remove(self, run: Run) -> None:
        """A run left the tier."""
        runs = self._runs[run.tenant]
        del runs[run.number]
        if not runs:
            del self._runs[run.tenant]
        self.shrink(run.tenant, run.size_bytes)

    def shrink(self, tenant: str, size_bytes: int) -> None:
        """A run that stays lost a block, or room that was taken comes back."""
        self.bytes[tenant] -= size_bytes
        if not self.bytes[tenant]:
            del self.bytes[tenant]

    def grow(self, tenant: str, size_bytes: int) -> None:
        """Room was taken for a block that belongs to no run yet."""
        self.bytes[tenant] += size_bytes

    def touch(self, run: Run) -> None:
        """A run was used, if it is here."""
        runs = self._runs.get(run.tenant)
        if runs is not None and run.number in runs:
            runs.move_to_end(run.number)

    def is_bounded(self, tenant: str) -> bool:
        """Whether the tenant may fill a part of the tier only."""
        return self._shares.of(tenant) < 1

    def excess_bytes(self, tenant: str, more_bytes: int) -> int:
        """By how much the tenant would exceed its share with so much more; at most 0 where it would not."""
        share = self._shares.of(tenant)
        if share >= 1:
            return 0
        return self.bytes[tenant] + more_bytes - int(share * self._capacity_bytes)

    def oldest_first(self, tenant: str) -> Iterator[Run]:
        """The tenant's runs in order of last use; not to be changed meanwhile."""
        return iter(self._runs.get(tenant, {}).values())
