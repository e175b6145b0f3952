"""GPUs that are not there: the methods of `Nvml`, answered by a model of board power.

For controllers and tests on machines without a GPU. Each GPU draws
idle_w + (power_limit_w - idle_w) * utilisation; its energy counter starts at the
Unix epoch, so that processes that model the same GPU at idle agree on its reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from trireme.devices.nvml import CudaDevice
from trireme.runtime.clock import Clock


@dataclass(slots=True, kw_only=True)
class ModelledGpu:
    """One GPU's parameters and the state of its counter."""

    idle_w: float = 70.0
    power_limit_w: float = 700.0
    memory_bytes: int = 80 * 2**30
    has_energy_counter: bool = True
    mig_enabled: bool = False
    utilisation: float = field(default=0.0, init=False)
    _extra_j: float = field(default=0.0, init=False)
    """Joules above the idle draw up to `_since_s`."""
    _since_s: float = field(default=0.0, init=False)


class ModelledNvml:
    """Answers like `DriverNvml` for `gpus`, on `clock`."""

    def __init__(self, gpus: Sequence[ModelledGpu], clock: Clock) -> None:
        self._gpus = tuple(gpus)
        self._clock = clock

    def set_utilisation(self, index: int, utilisation: float) -> None:
        """From now on the GPU is busy to this share, 0..1."""
        gpu = self._gpus[index]
        now_s = self._clock.unix_s()
        gpu._extra_j = self._extra_j(gpu, now_s)
        gpu._since_s = now_s
        gpu.utilisation = min(1.0, max(0.0, utilisation))

    def devices(self) -> tuple[CudaDevice, ...]:
        return tuple(
            CudaDevice(
                index=index,
                uuid=f"GPU-modelled-{index}",
                name="modelled GPU",
                memory_bytes=gpu.memory_bytes,
                power_limit_w=gpu.power_limit_w,
                mig_enabled=gpu.mig_enabled,
            )
            for index, gpu in enumerate(self._gpus)
        )

    def energy_mj(self, index: int) -> int | None:
        gpu = self._gpus[index]
        now_s = self._clock.unix_s()
        joules = gpu.idle_w * now_s + self._extra_j(gpu, now_s)
        return int(joules * 1000) if gpu.has_energy_counter else None

    def power_w(self, index: int) -> float:
        gpu = self._gpus[index]
        return gpu.idle_w + (gpu.power_limit_w - gpu.idle_w) * gpu.utilisation

    def _extra_j(self, gpu: ModelledGpu, now_s: float) -> float:
        above_w = (gpu.power_limit_w - gpu.idle_w) * gpu.utilisation
        return gpu._extra_j + above_w * (now_s - gpu._since_s)
