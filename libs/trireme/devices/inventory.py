"""What hardware is there: the CPU as far as this process may use it, and the GPUs."""

from __future__ import annotations

import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil

from trireme.devices.meters import MeterUnreadable
from trireme.devices.nvml import CudaDevice, DriverNvml, Nvml

CPUINFO = Path("/proc/cpuinfo")
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """The processor, as the operating system sees it."""

    vendor: str
    """As cpuid says it: AuthenticAMD, GenuineIntel; empty elsewhere."""
    family: int
    """cpuid family; 0 where there is none."""
    model: int
    """cpuid model; 0 where there is none."""
    name: str
    logical_cpus: int
    """Logical CPUs of the machine."""
    threads_per_core: int
    """Logical CPUs per physical core, as the machine or its hypervisor says."""
    usable_cpus: float
    """Logical CPUs that this process may use: the least of affinity and cgroup quota."""
    virtual: bool
    """True below a hypervisor: the package is shared with machines that cannot be seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """The hardware of this machine."""

    cpu: Cpu
    memory_bytes: int
    cuda: tuple[CudaDevice, ...]


def take_inventory(nvml: Nvml | None = None) -> Inventory:
    """Look at this machine; without NVML there are no GPUs."""
    return Inventory(cpu=read_cpu(), memory_bytes=psutil.virtual_memory().total, cuda=cuda_devices(nvml))


def cuda_devices(nvml: Nvml | None = None) -> tuple[CudaDevice, ...]:
    """The GPUs; empty where NVML or a driver is absent."""
    try:
        return (nvml or DriverNvml()).devices()
    except MeterUnreadable:
        return ()


def read_cpu(cpuinfo: Path = CPUINFO, cgroup: Path = CGROUP) -> Cpu:
    """The processor; fields that the system does not tell are empty or 0."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    first: dict[str, str] = {}
    for line in text.split("\n\n", 1)[0].splitlines():
        key, _, value = line.partition(":")
        first[key.strip()] = value.strip()
    logical = text.count("processor\t") or os.cpu_count() or 1
    siblings, cores = _number(first.get("siblings")), _number(first.get("cpu cores"))
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
    return Cpu(
        vendor=first.get("vendor_id", ""),
        family=_number(first.get("cpu family")),
        model=_number(first.get("model")),
        name=first.get("model name", "") or platform.processor() or platform.machine(),
        logical_cpus=logical,
        threads_per_core=max(1, siblings // cores) if cores else 1,
        usable_cpus=min(float(affinity), cgroup_quota_cpus(cgroup)),
        virtual="hypervisor" in first.get("flags", "").split(),
    )


def cgroup_quota_cpus(cgroup: Path = CGROUP) -> float:
    """CPUs that the cgroup's quota grants (version 2); infinite where there is none."""
    try:
        quota, period = (cgroup / "cpu.max").read_text(encoding="ascii").split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return math.inf


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0
