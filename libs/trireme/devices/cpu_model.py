"""A model of CPU energy for machines without a counter. Its name says so: `cpu-model`.

    watts = idle_w + (max_w - idle_w) * utilisation ** alpha

idle_w and max_w are the package's, scaled to the cores that this machine has of it. With
alpha = 1 the model is additive: its energy since boot follows from the busy seconds since
boot alone, whoever reads it and however often. docs/energy.md says how far off it can be.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from trireme.devices.cpu_power_table import PackagePower, package_power
from trireme.devices.inventory import CGROUP, Cpu, cgroup_quota_cpus
from trireme.devices.meters import MeterName, MeterUnreadable, boot_id
from trireme.policies.energy_attribution import Limits


@dataclass(frozen=True, slots=True)
class CpuSeconds:
    """How the CPUs spent their time since some start."""

    busy_s: float
    """Busy CPU seconds, summed over CPUs."""
    elapsed_s: float
    """Seconds passed, once, not per CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuPowerModel:
    """The model's constants for one machine."""

    idle_w: float
    max_w: float
    cpus: float
    """CPUs at whose full use max_w is drawn."""
    alpha: float = 1.0

    def draw_w(self, utilisation: float) -> float:
        """Watts at a utilisation of 0..1."""
        share = math.pow(min(1.0, max(0.0, utilisation)), self.alpha)
        return self.idle_w + (self.max_w - self.idle_w) * share


def calibrated(
    cpu: Cpu, *, idle_w: float | None = None, max_w: float | None = None, alpha: float = 1.0
) -> CpuPowerModel:
    """The model for this machine: from the table, unless a constant is measured and given."""
    package = package_of(cpu)
    cpus = min(float(cpu.logical_cpus), cpu.usable_cpus)
    share = cpus / cpu.threads_per_core / package.cores
    top_w = package.tdp_w * share if max_w is None else max_w
    floor_w = top_w * package.idle_share if idle_w is None else idle_w
    return CpuPowerModel(idle_w=floor_w, max_w=max(top_w, floor_w), cpus=cpus, alpha=alpha)


def package_of(cpu: Cpu) -> PackagePower:
    """The table's entry for a processor."""
    return package_power(vendor=cpu.vendor, family=cpu.family, model=cpu.model)


def machine_seconds() -> CpuSeconds:
    """CPU time of the whole machine since boot; time stolen by the hypervisor is not ours."""
    times = psutil.cpu_times()
    idle_s = times.idle + getattr(times, "iowait", 0.0)
    busy_s = times.user + times.nice + times.system
    busy_s += getattr(times, "irq", 0.0) + getattr(times, "softirq", 0.0)
    stolen_s = getattr(times, "steal", 0.0)
    return CpuSeconds(busy_s, (busy_s + idle_s + stolen_s) / (psutil.cpu_count() or 1))


def cgroup_seconds(cgroup: Path) -> CpuSeconds:
    """CPU time of this container (cgroup version 2) since it was made; elapsed since boot.

    Raises:
        MeterUnreadable: cpu.stat is absent or malformed.
    """
    try:
        lines = (cgroup / "cpu.stat").read_text(encoding="ascii").splitlines()
        usage_us = next(int(line.split()[1]) for line in lines if line.startswith("usage_usec "))
    except (OSError, ValueError, IndexError, StopIteration) as error:
        raise MeterUnreadable(f"cannot read {cgroup / 'cpu.stat'}: {error}") from error
    return CpuSeconds(usage_us / 1e6, machine_seconds().elapsed_s)


class CpuModelMeter:
    """Integrates the model over the CPU's busy time."""

    name: MeterName = "cpu-model"
    device = "cpu"

    def __init__(
        self, model: CpuPowerModel, *, seconds: Callable[[], CpuSeconds], part: str, life: str | None = None
    ) -> None:
        """`seconds` tells the CPU time since a start that `life` names (the boot, by default)."""
        self._model = model
        self._seconds = seconds
        self._part = part
        # A bent model depends on when it was read, so two processes' sums do not compare.
        life = boot_id() if life is None else life
        self.epoch = f"cpu-model:{model}:{life if model.alpha == 1.0 and life else secrets.token_hex(8)}"
        self._last = CpuSeconds(0.0, 0.0)
        self._joules = 0.0

    @property
    def limits(self) -> Limits:
        return Limits(idle_w=self._model.idle_w, max_w=self._model.max_w)

    @property
    def description(self) -> str:
        model = self._model
        return (
            f"A model, not a measurement: {model.idle_w:.2f} W idle to {model.max_w:.2f} W with "
            f"{model.cpus:g} CPUs busy, after {self._part}; alpha {model.alpha:g}."
        )

    def read_joules(self) -> float:
        """Joules since boot by the model."""
        now = self._seconds()
        elapsed_s = now.elapsed_s - self._last.elapsed_s
        if elapsed_s > 0:
            busy_s = max(0.0, now.busy_s - self._last.busy_s)
            utilisation = busy_s / elapsed_s / self._model.cpus
            self._joules += self._model.draw_w(utilisation) * elapsed_s
            self._last = now
        return self._joules


def open_cpu_model(
    cpu: Cpu,
    *,
    idle_w: float | None = None,
    max_w: float | None = None,
    alpha: float = 1.0,
    cgroup: Path = CGROUP,
) -> CpuModelMeter:
    """The model for this machine, or for this container where a CPU quota limits it."""
    limited = cgroup_quota_cpus(cgroup) < cpu.logical_cpus

    def container() -> CpuSeconds:
        return cgroup_seconds(cgroup)

    return CpuModelMeter(
        calibrated(cpu, idle_w=idle_w, max_w=max_w, alpha=alpha),
        seconds=container if limited else machine_seconds,
        part=package_of(cpu).part if max_w is None else "the constants in the settings",
    )
