"""What an energy meter is, and how a reading can fail."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

from trireme.errors import ServiceUnavailable
from trireme.policies.energy_attribution import Limits

MeterName = Literal["nvml", "rapl", "cpu-model"]


class MeterUnreadable(ServiceUnavailable):
    """A meter is absent, may not be read, or did not answer."""

    code = "meter_unreadable"


class EnergyMeter(Protocol):
    """A counter of joules for one device."""

    @property
    def name(self) -> MeterName: ...

    @property
    def device(self) -> str:
        """What it covers, as workers name it: cpu, or cuda:N."""
        ...

    @property
    def epoch(self) -> str:
        """Names the counter's present life: readings of two processes with equal epochs are comparable."""
        ...

    @property
    def limits(self) -> Limits:
        """What is known beforehand of the device's idle and largest draw."""
        ...

    @property
    def description(self) -> str:
        """One sentence on how the number comes about."""
        ...

    def read_joules(self) -> float:
        """Joules drawn since some start, never going back within one epoch.

        Raises:
            MeterUnreadable: the counter did not answer; a later call may succeed.
        """
        ...


def boot_id(path: Path = Path("/proc/sys/kernel/random/boot_id")) -> str:
    """Names the present boot of the machine; empty where the system does not say."""
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
