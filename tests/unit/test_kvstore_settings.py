"""The kvstore's settings: its own win over the fleet's, and what is wrong is refused with its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from trireme.errors import InvalidConfiguration
from trireme.kvstore.settings import Settings, sizes_of

FLEET = """
name: sea
models: {m: {variants: {v: {checkpoint: .}}}}
kvstore:
  dram_mib: 64
  ssd_mib: 128
  ttl_s: 600
  tenant_share: 0.5
  tenant_shares: {acme: 0.8}
"""


def fleet(tmp_path: Path, text: str = FLEET) -> Path:
    path = tmp_path / "fleet.yaml"
    path.write_text(text)
    return path


def test_the_fleets_section_is_in_force_where_nothing_else_is_set(tmp_path: Path) -> None:
    sizes = sizes_of(Settings(redis_url="", fleet=fleet(tmp_path)))
    assert (sizes.dram_bytes, sizes.ssd_bytes, sizes.fleet_name) == (64 * 2**20, 128 * 2**20, "sea")
    assert sizes.limits.ttl_s == 600
    assert [sizes.limits.shares.of(tenant) for tenant in ("acme", "other")] == [0.8, 0.5]


def test_own_settings_win_and_defaults_bound_nobody(tmp_path: Path) -> None:
    own = Settings(redis_url="", fleet=fleet(tmp_path), dram_mib=32, ssd_mib=0, ttl_s=5.0, tenant_share=0.25)
    sizes = sizes_of(own)
    assert (sizes.dram_bytes, sizes.ssd_bytes, sizes.limits.ttl_s) == (32 * 2**20, 0, 5.0)
    assert sizes.limits.shares.of("other") == 0.25
    plain = sizes_of(Settings(redis_url=""))
    assert plain.limits.ttl_s == 3600 and plain.limits.shares.of("anyone") == 1.0


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("ttl_s: 0", "ttl_s"),
        ("tenant_share: 1.5", "tenant_share"),
        ("tenant_shares: {acme: 0}", "tenant_shares"),
    ],
)
def test_a_wrong_bound_is_named(tmp_path: Path, line: str, key: str) -> None:
    text = FLEET.split("kvstore:")[0] + f"kvstore: {{{line}}}\n"
    with pytest.raises(InvalidConfiguration, match=key):
        sizes_of(Settings(redis_url="", fleet=fleet(tmp_path, text)))


def test_own_bounds_are_checked_too() -> None:
    for wrong in ({"ttl_s": 0.0}, {"tenant_share": 0.0}, {"tenant_share": 2.0}, {"dram_mib": 0}):
        with pytest.raises(InvalidConfiguration, match=next(iter(wrong))):
            sizes_of(Settings(redis_url="", **wrong))
