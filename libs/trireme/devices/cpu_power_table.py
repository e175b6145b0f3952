"""Package power per CPU family, for machines that show no energy counter.

TDP and cores are of each family's largest common part, as its maker states them; the
exact part is unknown in most virtual machines, and watts per core differ between the
parts of a family by a factor of up to two. The idle share is assumed: no maker states it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagePower:
    """One CPU package."""

    part: str
    """The part that the numbers are of."""
    tdp_w: float
    cores: int
    threads_per_core: int
    idle_share: float
    """Idle draw as a share of the TDP. Assumed everywhere."""
    source: Literal["maker", "assumed"]
    """Where TDP and cores come from: the maker's data sheet (from memory), or a guess."""


IDLE_SHARE = 0.25

_AMD = "AuthenticAMD"
_INTEL = "GenuineIntel"


def _maker(part: str, tdp_w: float, cores: int, *, threads_per_core: int = 2) -> PackagePower:
    return PackagePower(
        part=part,
        tdp_w=tdp_w,
        cores=cores,
        threads_per_core=threads_per_core,
        idle_share=IDLE_SHARE,
        source="maker",
    )


BY_MODEL: dict[tuple[str, int, range], PackagePower] = {
    (_AMD, 26, range(0x10)): _maker("EPYC 9755 (Turin)", 500, 128),
    (_AMD, 26, range(0x10, 0x20)): _maker("EPYC 9965 (Turin dense)", 500, 192),
    (_AMD, 25, range(0x10, 0x20)): _maker("EPYC 9654 (Genoa)", 360, 96),
    (_AMD, 25, range(0xA0, 0xB0)): _maker("EPYC 9754 (Bergamo)", 360, 128),
    (_AMD, 25, range(0x10)): _maker("EPYC 7763 (Milan)", 280, 64),
    (_AMD, 23, range(0x30, 0x40)): _maker("EPYC 7742 (Rome)", 225, 64),
    (_INTEL, 6, range(0xAD, 0xAE)): _maker("Xeon 6980P (Granite Rapids)", 500, 128),
    (_INTEL, 6, range(0xCF, 0xD0)): _maker("Xeon 8592+ (Emerald Rapids)", 350, 64),
    (_INTEL, 6, range(0x8F, 0x90)): _maker("Xeon 8480+ (Sapphire Rapids)", 350, 56),
    (_INTEL, 6, range(0x6A, 0x6B)): _maker("Xeon 8380 (Ice Lake)", 270, 40),
    (_INTEL, 6, range(0x55, 0x56)): _maker("Xeon 8280 (Cascade Lake)", 205, 28),
}
"""By (vendor, cpuid family, cpuid models)."""

UNKNOWN = PackagePower(
    part="unknown CPU, 5 W per core",
    tdp_w=40.0,
    cores=8,
    threads_per_core=1,
    idle_share=IDLE_SHARE,
    source="assumed",
)


def package_power(*, vendor: str, family: int, model: int) -> PackagePower:
    """The table's entry for a cpuid, or the assumption for unknown ones."""
    for (entry_vendor, entry_family, models), power in BY_MODEL.items():
        if entry_vendor == vendor and entry_family == family and model in models:
            return power
    return UNKNOWN
