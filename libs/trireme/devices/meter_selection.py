"""Which meter covers which device: the counter where one can be read, else the model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trireme.devices.cpu_model import open_cpu_model
from trireme.devices.inventory import read_cpu
from trireme.devices.meters import EnergyMeter, MeterUnreadable
from trireme.devices.nvml import DriverNvml, Nvml, NvmlMeter
from trireme.devices.rapl import POWERCAP, RaplMeter
from trireme.policies.energy_billing import metered_device

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Measured constants of the CPU model; None keeps the table's."""

    idle_w: float | None = None
    max_w: float | None = None
    alpha: float = 1.0


def open_meters(
    kind: Literal["auto", "nvml", "rapl", "cpu-model"],
    devices: Iterable[str],
    *,
    calibration: Calibration,
    nvml: Nvml | None = None,
    powercap: Path = POWERCAP,
) -> tuple[EnergyMeter, ...]:
    """One meter per device that the worker device slices `devices` need.

    `auto` takes NVML for GPUs, and for the CPU RAPL where it can be read, else the model; it
    leaves out, with a warning, a GPU that cannot be read. A named kind opens only the devices
    that it can measure.

    Raises:
        MeterUnreadable: the named kind of meter cannot be read.
    """
    needed = sorted({metered_device(device) for device in devices})
    meters: list[EnergyMeter] = []
    if "cpu" in needed and kind in ("auto", "rapl", "cpu-model"):
        meters.append(_cpu_meter(kind, calibration, powercap))
    gpus = [device for device in needed if device.startswith("cuda:")]
    if gpus and kind in ("auto", "nvml"):
        try:
            meters.extend(_gpu_meters(gpus, nvml or DriverNvml()))
        except MeterUnreadable as error:
            if kind == "nvml":
                raise
            log.warning("gpu_not_metered", extra={"devices": gpus, "reason": error.message})
    return tuple(meters)


def _gpu_meters(gpus: Sequence[str], nvml: Nvml) -> list[NvmlMeter]:
    present = {f"cuda:{gpu.index}": gpu for gpu in nvml.devices()}
    absent = [device for device in gpus if device not in present]
    if absent:
        raise MeterUnreadable(f"NVML shows no {absent[0]}; it shows {sorted(present)}")
    return [NvmlMeter(nvml, present[device]) for device in gpus]


def _cpu_meter(kind: str, calibration: Calibration, powercap: Path) -> EnergyMeter:
    if kind in ("auto", "rapl"):
        try:
            return RaplMeter(powercap)
        except MeterUnreadable as error:
            if kind == "rapl":
                raise
            log.info("rapl_not_readable", extra={"reason": error.message, "instead": "cpu-model"})
    return open_cpu_model(
        read_cpu(), idle_w=calibration.idle_w, max_w=calibration.max_w, alpha=calibration.alpha
    )
