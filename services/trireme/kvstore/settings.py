"""Settings of the kvstore, from TRIREME_KVSTORE_*."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trireme.errors import InvalidConfiguration
from trireme.kvcache.block_codec import tenant_label
from trireme.kvcache.tenant_ledger import Shares
from trireme.kvcache.tiered_store import Limits
from trireme.runtime.fleet import KvStore, load_fleet


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Read once at start."""

    redis_url: str
    bus_prefix: str = "trireme"
    node: str = "local"
    """The node whose workers it serves; one kvstore per node."""
    fleet: Path | None = None
    """fleet.yaml: its `kvstore` section gives the sizes that are absent here."""
    dram_mib: int | None = None
    """Shared memory for blocks, MiB; absent: the fleet's."""
    ssd_mib: int | None = None
    """Segment files, MiB; 0: no SSD tier; absent: the fleet's."""
    ttl_s: float | None = None
    """Seconds after which blocks that nobody used are deleted; absent: the fleet's."""
    tenant_share: float | None = None
    """Largest share of each tier that one tenant may fill, 0..1; absent: the fleet's."""
    directory: Path = Path(".run/kv")
    """Where the segment files lie."""
    arena_directory: Path | None = None
    """Where the arena lies; absent: /dev/shm where it has room, else `directory`."""
    ephemeral: bool = False
    """The SSD tier ends with this process, so a stop gives what is in DRAM to another node instead."""
    flush_s: float = 3.0
    """Seconds that a stop may take to write what is in DRAM to SSD, or to give it away."""
    listen: str = "127.0.0.1:0"
    metrics_listen: str = "127.0.0.1:0"
    advertise: str | None = None
    """host:port others reach the gRPC server at; absent: what it is bound to."""
    log_level: str = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Bytes of the two tiers, what bounds their blocks, and the fleet's name."""

    dram_bytes: int
    ssd_bytes: int
    limits: Limits
    fleet_name: str


def sizes_of(settings: Settings) -> Sizes:
    """The sizes in force: those set here, else the fleet's, else the defaults.

    Raises:
        InvalidConfiguration: the fleet file or a size is wrong.
    """
    fleet = load_fleet(settings.fleet) if settings.fleet is not None else None
    section = fleet.kvstore if fleet is not None else KvStore()
    dram_mib = section.dram_mib if settings.dram_mib is None else settings.dram_mib
    ssd_mib = section.ssd_mib if settings.ssd_mib is None else settings.ssd_mib
    if dram_mib < 1 or ssd_mib < 0:
        raise InvalidConfiguration(
            f"dram_mib={dram_mib} must be at least 1 and ssd_mib={ssd_mib} at least 0", param="dram_mib"
        )
    ttl_s = section.ttl_s if settings.ttl_s is None else settings.ttl_s
    tenant_share = section.tenant_share if settings.tenant_share is None else settings.tenant_share
    if ttl_s <= 0:
        raise InvalidConfiguration(f"ttl_s={ttl_s} must be above 0", param="ttl_s")
    if not 0 < tenant_share <= 1:
        raise InvalidConfiguration(
            f"tenant_share={tenant_share} must be above 0 and at most 1", param="tenant_share"
        )
    return Sizes(
        dram_bytes=dram_mib * 2**20,
        ssd_bytes=ssd_mib * 2**20,
        limits=Limits(
            ttl_s=ttl_s,
            shares=Shares(
                default=tenant_share,
                by_tenant={tenant_label(tenant): share for tenant, share in section.tenant_shares.items()},
            ),
        ),
        fleet_name=fleet.name if fleet is not None else "",
    )
