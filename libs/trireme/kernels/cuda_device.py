"""Launch kernels on an NVIDIA GPU, on PyTorch's current stream."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trireme.errors import Kind, TriremeError
from trireme.kernels.cuda_compile import CubinCache, architecture, default_cache, has_wgmma
from trireme.kernels.cuda_launch import Argument, Geometry, Kernel, PackedArguments


class LaunchFailed(TriremeError):
    """The driver refused a kernel; or the bindings to it are not installed."""

    kind = Kind.UNAVAILABLE
    code = "kernel_launch_failed"


class CudaDevice:
    """A launcher on one GPU.

    Args:
        device: which, as PyTorch counts.
        cache: where compiled kernels are kept; None: `default_cache()`.

    Raises:
        UnsupportedGpu: compute capability below 8.0.
        LaunchFailed: `cuda-bindings` is not installed.
    """

    __slots__ = (
        "_cubins",
        "_device",
        "_driver",
        "_functions",
        "_has_wgmma",
        "_modules",
        "_multiprocessors",
        "_shared_bytes",
    )

    def __init__(self, device: torch.device, *, cache: Path | None = None) -> None:
        properties = torch.cuda.get_device_properties(device)
        self._device = device
        self._multiprocessors: int = properties.multi_processor_count
        capability = (properties.major, properties.minor)
        self._has_wgmma = has_wgmma(capability)
        self._cubins = CubinCache(cache or default_cache(), architecture(capability))
        try:
            self._driver: Any = importlib.import_module("cuda.bindings.driver")
        except ModuleNotFoundError as error:
            raise LaunchFailed(
                "cuda-bindings is not installed; PyTorch's builds for CUDA bring it with them"
            ) from error
        self._shared_bytes = self._most_shared_bytes()
        self._modules: list[Any] = []
        self._functions: dict[Kernel, Any] = {}

    @property
    def multiprocessors(self) -> int:
        return self._multiprocessors

    @property
    def has_wgmma(self) -> bool:
        return self._has_wgmma

    def launch(self, kernel: Kernel, geometry: Geometry, arguments: Sequence[Argument]) -> None:
        """Enqueue a kernel; it is compiled and loaded the first time.

        Raises:
            CompilationFailed: it does not compile.
            LaunchFailed: the driver refuses it, or a block wants more shared memory than there is.
        """
        if geometry.shared_bytes > self._shared_bytes:
            raise LaunchFailed(
                f"{kernel.name} wants {geometry.shared_bytes} bytes of shared memory; a block of this GPU "
                f"has {self._shared_bytes}"
            )
        with torch.cuda.device(self._device):
            function = self._functions.get(kernel)
            if function is None:
                function = self._functions[kernel] = self._load(kernel)
            packed = PackedArguments(arguments)
            stream = torch.cuda.current_stream(self._device).cuda_stream
            self._checked(
                kernel.name,
                self._driver.cuLaunchKernel(
                    function,
                    *geometry.grid,
                    geometry.threads,
                    1,
                    1,
                    geometry.shared_bytes,
                    stream,
                    ctypes.addressof(packed.pointers),
                    0,
                ),
            )

    def _load(self, kernel: Kernel) -> Any:
        torch.cuda.current_stream(self._device).synchronize()  # makes the device's context current
        cubin = self._cubins.get(kernel)
        name = kernel.name
        module = self._checked(name, self._driver.cuModuleLoadData(cubin.image))
        self._modules.append(module)
        function = self._checked(name, self._driver.cuModuleGetFunction(module, cubin.symbol.encode()))
        # Beyond 48 KiB of shared memory a kernel gets only what it was allowed before its launch.
        most = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._checked(name, self._driver.cuFuncSetAttribute(function, most, self._shared_bytes))
        return function

    def _most_shared_bytes(self) -> int:
        """Shared memory that one block may have."""
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        handle = self._checked("a device", self._driver.cuDeviceGet(index))
        attributes = self._driver.CUdevice_attribute
        most = attributes.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        return int(self._checked("an attribute", self._driver.cuDeviceGetAttribute(most, handle)))

    def _checked(self, what: str, result: tuple[Any, ...]) -> Any:
        """What a call of the driver returns beside its status."""
        status, *values = result
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise LaunchFailed(f"the driver refuses {what}: {status}")
        return values[0] if values else None
