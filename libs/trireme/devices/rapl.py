"""RAPL: the CPU packages' own energy counters, from Linux' powercap tree.

Most kernels let only root read them; a container sees the whole machine's packages.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trireme.devices.meters import MeterName, MeterUnreadable, boot_id
from trireme.policies.energy_attribution import Limits

POWERCAP = Path("/sys/class/powercap")


@dataclass(slots=True)
class _Package:
    energy: Path
    range_uj: int
    last_uj: int
    wrapped_uj: int = 0

    def read_uj(self) -> int:
        now_uj = _number(self.energy)
        if now_uj < self.last_uj:
            self.wrapped_uj += self.range_uj
        self.last_uj = now_uj
        return self.wrapped_uj + now_uj


class RaplMeter:
    """The sum of all CPU packages. Read it at least once per wrap (about an hour at full load)."""

    name: MeterName = "rapl"
    device = "cpu"

    def __init__(self, root: Path = POWERCAP) -> None:
        """Open every package domain below `root`.

        Raises:
            MeterUnreadable: there is none, or reading is not permitted; the message says which.
        """
        zones = sorted(zone for zone in root.glob("intel-rapl:*") if zone.name.count(":") == 1)
        packages = [zone for zone in zones if _text(zone / "name").startswith("package")]
        if not packages:
            raise MeterUnreadable(f"no RAPL package domain below {root}")
        self._packages = [
            _Package(
                energy=zone / "energy_uj",
                range_uj=_number(zone / "max_energy_range_uj") + 1,
                last_uj=_number(zone / "energy_uj"),
            )
            for zone in packages
        ]
        caps_uw = [
            _optional(zone / "constraint_0_max_power_uw") or _optional(zone / "constraint_0_power_limit_uw")
            for zone in packages
        ]
        self._max_w = sum(cap for cap in caps_uw if cap) / 1e6 if all(caps_uw) else None
        self.epoch = f"rapl:{boot_id()}"

    @property
    def limits(self) -> Limits:
        return Limits(max_w=self._max_w)

    @property
    def description(self) -> str:
        return f"RAPL counters of {len(self._packages)} CPU package(s), whole machine, packages only."

    def read_joules(self) -> float:
        """Joules since the counters' last reset at or before opening."""
        return sum(package.read_uj() for package in self._packages) / 1e6


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except PermissionError:
        raise MeterUnreadable(f"reading {path} is not permitted: RAPL needs root on this kernel") from None
    except OSError as error:
        raise MeterUnreadable(f"cannot read {path}: {error.strerror}") from error


def _number(path: Path) -> int:
    text = _text(path)
    try:
        return int(text)
    except ValueError:
        raise MeterUnreadable(f"{path} holds {text!r}, not a number") from None


def _optional(path: Path) -> int | None:
    try:
        return _number(path)
    except MeterUnreadable:
        return None
