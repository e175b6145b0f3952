"""A kernel for one kind of GPU alone is used once it has computed there what the general one computes.

Both compute the first product that asks for it, which costs one product and one wait. So hardware that does
not do what the emulator does costs speed, and never a wrong token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from trireme.kernels.cuda_launch import Kernel, Launcher

log = logging.getLogger(__name__)

_TOLERANCE: Final = 0.01
"""Of the largest value: sums in another order are nearer, in 16 bits too."""
_found: Final[dict[tuple[Launcher, Kernel], bool]] = {}


def is_proven(
    launcher: Launcher, kernel: Kernel, special: Callable[[], Tensor], general: Callable[[], Tensor]
) -> bool:
    """Whether a kernel may be used on this device; finds out by the first call that can tell.

    Args:
        special: computes with the kernel.
        general: computes the same with the one that runs everywhere.
    """
    known = _found.get((launcher, kernel))
    if known is not None:
        return known
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return False  # nothing can be waited for now
    expected = general().float()
    if not expected.isfinite().all():
        return False  # these operands show nothing
    fault = _fault(special, expected)
    if fault is not None:
        log.error("kernel_not_used", extra={"kernel": kernel.name, "reason": fault})
    _found[launcher, kernel] = fault is None
    return fault is None


def _fault(special: Callable[[], Tensor], expected: Tensor) -> str | None:
    try:
        difference = float((special().float() - expected).abs().max())
    except Exception as error:
        return f"it failed: {error!r}"
    most = float(expected.abs().max())
    return (
        None
        if difference <= _TOLERANCE * most
        else f"differs by {difference:.3g} where {most:.3g} is largest"
    )
