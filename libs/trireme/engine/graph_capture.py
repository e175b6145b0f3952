"""Capture what is enqueued on a device once, and enqueue it again as a whole.

This is the only place that knows CUDA graphs. What is captured must read all that changes from tensors
that stay, and must not wait for the device or ask it for a value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from trireme.kernels import cuda_ops
from trireme.models.model import Model

_WARM_UPS = 2
"""Runs before a capture: kernels are compiled and loaded, libraries opened, what is kept is made."""


class Graph(Protocol):
    """What was captured."""

    output: Tensor
    """Each replay overwrites it."""

    def replay(self) -> None:
        """Enqueue it. Never waits."""


class Capturer(Protocol):
    """Captures."""

    def capture(self, run: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        """Capture what `run` enqueues; it is run a few times.

        Returns:
            The graph, which was not replayed yet, and what a run without it gave.

        Raises:
            RuntimeError: it cannot be captured.
        """

    def clear(self) -> None:
        """Nothing that was captured is replayed again."""


def capturer_of(model: Model) -> Capturer | None:
    """The one for a model's device; None: there is none, or the model's steps look at values on the host."""
    if not cuda_ops.is_available(model.device) or model.config.mixture is not None:
        return None
    return CudaCapturer(model.device)


class CudaCapturer:
    """On one GPU. Meets `Capturer`.

    Its graphs share memory, since one replays after the other, on the stream that is current then.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def capture(self, run: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        current = torch.cuda.current_stream(self._device)
        beside = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            for _ in range(_WARM_UPS):
                expected = run().clone()
        current.wait_stream(beside)
        expected.record_stream(current)
        graph = torch.cuda.CUDAGraph()
        # Other threads copy and draft in the meantime: what they ask of the device is none of this capture's.
        with torch.cuda.graph(graph, pool=self._pool, stream=beside, capture_error_mode="thread_local"):
            output = run()
        self._pool = graph.pool()
        return _CudaGraph(graph, output), expected

    def clear(self) -> None:
        self._pool = None


class _CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, output: Tensor) -> None:
        self._graph = graph
        self.output = output

    def replay(self) -> None:
        self._graph.replay()
