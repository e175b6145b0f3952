"""NVML: which NVIDIA GPUs there are and what they draw. Reading only.

`Nvml` is the part of the library that Trireme uses; `modelled_nvml` has the same methods.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from trireme.devices.meters import MeterName, MeterUnreadable, boot_id
from trireme.policies.energy_attribution import Limits
from trireme.runtime.clock import Clock, SystemClock


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaDevice:
    """One GPU as the driver describes it."""

    index: int
    uuid: str
    name: str
    memory_bytes: int
    power_limit_w: float | None
    """The limit in force; None where the board has no power management."""
    mig_enabled: bool


class Nvml(Protocol):
    """The readings that Trireme takes of GPUs, by index."""

    def devices(self) -> tuple[CudaDevice, ...]: ...

    def energy_mj(self, index: int) -> int | None:
        """Millijoules since the driver was loaded; None where the board has no such counter.

        Raises:
            MeterUnreadable: the driver did not answer.
        """
        ...

    def power_w(self, index: int) -> float:
        """Draw as the driver averages it.

        Raises:
            MeterUnreadable: the driver did not answer.
        """
        ...


class DriverNvml:
    """The real library, through `pynvml`."""

    def __init__(self) -> None:
        """Load the library.

        Raises:
            MeterUnreadable: `pynvml` or the driver is absent.
        """
        try:
            import pynvml
        except ImportError as error:
            raise MeterUnreadable("NVML needs the nvidia-ml-py package: install trireme[nvidia]") from error
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise MeterUnreadable(f"NVML does not start: {error}") from error

    def devices(self) -> tuple[CudaDevice, ...]:
        nvml = self._nvml
        try:
            return tuple(self._describe(index) for index in range(nvml.nvmlDeviceGetCount()))
        except nvml.NVMLError as error:
            raise MeterUnreadable(f"NVML does not list the GPUs: {error}") from error

    def energy_mj(self, index: int) -> int | None:
        nvml = self._nvml
        try:
            return int(nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle(index)))
        except nvml.NVMLError_NotSupported:
            return None
        except nvml.NVMLError as error:
            raise MeterUnreadable(f"NVML energy of GPU {index}: {error}") from error

    def power_w(self, index: int) -> float:
        nvml = self._nvml
        try:
            return float(nvml.nvmlDeviceGetPowerUsage(self._handle(index))) / 1000
        except nvml.NVMLError as error:
            raise MeterUnreadable(f"NVML power of GPU {index}: {error}") from error

    def _handle(self, index: int) -> Any:
        return self._nvml.nvmlDeviceGetHandleByIndex(index)

    def _describe(self, index: int) -> CudaDevice:
        nvml, handle = self._nvml, self._handle(index)
        limit_w, mig = None, False
        with suppress(nvml.NVMLError_NotSupported):
            limit_w = nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000
        with suppress(nvml.NVMLError_NotSupported):
            mig = nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE
        return CudaDevice(
            index=index,
            uuid=str(nvml.nvmlDeviceGetUUID(handle)),
            name=str(nvml.nvmlDeviceGetName(handle)),
            memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
            power_limit_w=limit_w,
            mig_enabled=mig,
        )


class NvmlMeter:
    """One GPU. Where the board has no energy counter, its power is integrated between calls."""

    name: MeterName = "nvml"

    def __init__(self, nvml: Nvml, gpu: CudaDevice, *, clock: Clock | None = None) -> None:
        """Take a first reading.

        Raises:
            MeterUnreadable: the driver did not answer.
        """
        self._nvml = nvml
        self._gpu = gpu
        self._clock = clock or SystemClock()
        self.device = f"cuda:{gpu.index}"
        self._counts = nvml.energy_mj(gpu.index) is not None
        # An integral lives as long as this object; the driver's counter as long as the driver.
        life = boot_id() if self._counts else secrets.token_hex(8)
        self.epoch = f"nvml:{gpu.uuid}:{life}"
        self._integral_j = 0.0
        self._last_w = 0.0 if self._counts else nvml.power_w(gpu.index)
        self._last_s = self._clock.monotonic_s()

    @property
    def limits(self) -> Limits:
        return Limits(max_w=self._gpu.power_limit_w)

    @property
    def description(self) -> str:
        how = "NVML energy counter" if self._counts else "NVML power, integrated once per window,"
        return f"{how} of {self._gpu.name} ({self.device}), the whole board."

    def read_joules(self) -> float:
        """Joules since the driver was loaded, or since this object was made."""
        if self._counts:
            energy_mj = self._nvml.energy_mj(self._gpu.index)
            if energy_mj is None:
                raise MeterUnreadable(f"GPU {self._gpu.index} lost its energy counter")
            return energy_mj / 1000
        power_w, now_s = self._nvml.power_w(self._gpu.index), self._clock.monotonic_s()
        self._integral_j += (power_w + self._last_w) / 2 * (now_s - self._last_s)
        self._last_w, self._last_s = power_w, now_s
        return self._integral_j
