"""How much of a stored prefix must be there before its sequence runs: measured, in the engine process."""

from __future__ import annotations

from collections.abc import Callable

from trireme.policies.kv_load import layers_to_preload

LEAST_TOKENS = 16
"""A step with fewer prompt tokens says little about what one costs."""
SMOOTHING = 0.1
"""Weight of the newest step."""


class PreloadRule:
    """Meets `engine.kv_preloads.LayersNeeded` for one engine.

    Args:
        num_layers: of the model.
        bytes_per_token: keys and values of one token, all layers.
        bytes_per_s: measured, from host memory to the device; 0 before the first copy.
    """

    def __init__(self, *, num_layers: int, bytes_per_token: float, bytes_per_s: Callable[[], float]) -> None:
        self._num_layers = num_layers
        self._bytes_per_token = bytes_per_token
        self._bytes_per_s = bytes_per_s
        self._prefill_s = 0.0

    def note(self, prefill_tokens: int, seconds: float) -> None:
        """A step computed so many prompt tokens."""
        if prefill_tokens >= LEAST_TOKENS:
            each_s = seconds / prefill_tokens
            self._prefill_s = (
                each_s if not self._prefill_s else (1 - SMOOTHING) * self._prefill_s + SMOOTHING * each_s
            )

    def __call__(self, loaded_tokens: int, new_tokens: int) -> int:
        """Layers that must be there, so that the later ones arrive before they are computed."""
        rate = self._bytes_per_s()
        if not rate or not self._prefill_s:
            return 1
        load_s = loaded_tokens * self._bytes_per_token / rate
        compute_s = new_tokens * self._prefill_s
        return layers_to_preload(load_s / self._num_layers, compute_s / self._num_layers, self._num_layers)
