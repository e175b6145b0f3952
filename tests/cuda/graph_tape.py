"""A stand-in for CUDA graphs: operators on tape.

What is captured is a list of operators, kernels and the very tensors they had; a replay runs those again, in
the same memory, and no line of the Python that made them. So, as on a GPU, whatever a step knew only on the
host is what it was at the capture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trireme.engine.graph_capture import Graph
from trireme.kernels.cuda_launch import Argument, Geometry, Kernel, Launcher

_FORBIDDEN = {
    "aten._local_scalar_dense.default": "the device is asked for a value",
    "aten.lift_fresh.default": "a value of the host is brought to the device",
}


class Tape(TorchDispatchMode):
    """What was run while it was open."""

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[Callable[[], None]] = []
        self._is_paused = False

    def __len__(self) -> int:
        return len(self._steps)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._is_paused:
            return func(*args, **kwargs)
        if (why := _FORBIDDEN.get(str(func))) is not None:
            raise RuntimeError(f"while a graph is captured, {why}")
        made = func(*args, **kwargs)

        def again() -> None:
            for new, old in zip(tree_leaves(func(*args, **kwargs)), tree_leaves(made), strict=True):
                is_same = not isinstance(new, Tensor) or _memory(new) == _memory(old)
                if not is_same:
                    old.copy_(new)

        self._steps.append(again)
        return made

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs in it is not taped."""
        self._is_paused = True
        yield
        self._is_paused = False

    def tape(self, step: Callable[[], None]) -> None:
        self._steps.append(step)

    def replay(self) -> None:
        for step in self._steps:
            step()


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Taped:
    def __init__(self, capturer: TapeCapturer, tape: Tape, output: Tensor) -> None:
        self._capturer = capturer
        self._tape = tape
        self.output = output

    def replay(self) -> None:
        self._capturer.replays += 1
        self._tape.replay()


class TapeCapturer:
    """Meets `Capturer`."""

    def __init__(self) -> None:
        self.captures = self.replays = self.clears = 0
        self.open: Tape | None = None

    def capture(self, run: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        expected = run().clone()
        tape = self.open = Tape()
        try:
            with tape:
                output = run()
        finally:
            self.open = None
        assert len(tape) > 10
        output.fill_(torch.nan)  # a capture does not run anything
        self.captures += 1
        return _Taped(self, tape, output), expected

    def clear(self) -> None:
        self.clears += 1


class TapedLauncher:
    """A launcher whose launches are taped, too."""

    def __init__(self, launcher: Launcher, capturer: TapeCapturer) -> None:
        self._launcher = launcher
        self._capturer = capturer
        self.multiprocessors = launcher.multiprocessors
        self.has_wgmma = launcher.has_wgmma

    def launch(self, kernel: Kernel, geometry: Geometry, arguments: Sequence[Argument]) -> None:
        tape = self._capturer.open
        if tape is None:
            self._launcher.launch(kernel, geometry, arguments)
            return
        with tape.paused():
            self._launcher.launch(kernel, geometry, arguments)
        tape.tape(lambda: self._launcher.launch(kernel, geometry, arguments))
