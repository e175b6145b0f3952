"""How long a job waits for its KV when layers are loaded while earlier ones compute, and what follows.

One copy stream brings the history's KV layer by layer, `load_s` each; layer i may compute, `compute_s`, when
its KV is there and layer i - 1 is done. Some layers may be there before the job starts (the read buffer).

Times may be floats in seconds or integers in any unit; with integers all results are exact.
Source: layer-wise preloading of CachedAttention (ATC 2024); page 02 of the design, 2.3. Compute-or-load
is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable


def finish_s(load_s: float, compute_s: float, num_layers: int, *, preloaded: int = 0) -> float:
    """Time from the start to the end of the last layer, both per-layer times above or at 0.

    The copy stream starts with the job, at layer `preloaded` + 1. The last wait is either for the first
    copied layer, then all is compute bound, or for the last one.
    """
    missing = num_layers - preloaded
    if missing <= 0:
        return num_layers * compute_s
    return max(num_layers * compute_s, load_s + missing * compute_s, missing * load_s + compute_s)


def stall_s(load_s: float, compute_s: float, num_layers: int, *, preloaded: int = 0) -> float:
    """The part of `finish_s` in which nothing computes."""
    return finish_s(load_s, compute_s, num_layers, preloaded=preloaded) - num_layers * compute_s


def layers_to_preload(t_load_layer_s: float, t_compute_layer_s: float, num_layers: int) -> int:
    """Fewest layers that must be there at the start so that nothing stalls: in 0..num_layers.

    0 only where there is nothing to load. All layers where loading is impossible (NaN or infinite time).
    """
    if t_load_layer_s <= 0:
        return 0
    if not t_load_layer_s < math.inf:
        return num_layers
    if t_load_layer_s <= t_compute_layer_s:
        return min(1, num_layers)
    # ceil(L - (L - 1) * t_c / t_l), by floor division, which is exact.
    return max(1, num_layers - int((num_layers - 1) * max(0, t_compute_layer_s) // t_load_layer_s))


def read_buffer_bytes(
    *,
    bandwidth_bytes_s: float,
    load_s_per_token: float,
    prefill_s_per_token: float,
    history_tokens: int,
    new_tokens: int,
) -> int:
    """Bytes to have in the read buffer before a job starts, by the paper's formula; 0 where none help.

    It neglects that the first layer always waits for its own KV: `layers_to_preload` does not.
    """
    late_s = load_s_per_token * history_tokens - prefill_s_per_token * new_tokens
    size = bandwidth_bytes_s * late_s
    return math.ceil(size) if 0 < size < math.inf else 0


def tokens_to_recompute(
    history_tokens: int,
    new_tokens: int,
    *,
    load_s: Callable[[int], float],
    prefill_s: Callable[[int, int], float],
    step_tokens: int = 1,
) -> int:
    """Newest tokens of the history to compute again although they are stored: m in 0..history_tokens.

    Minimises max(load(history - m), prefill(new + m)), since the two overlap. Where loading is fast enough
    this is 0. A multiple of `step_tokens`, or the whole history. O(log history).

    Args:
        load_s: seconds to load the KV of so many leading tokens; does not fall with their number.
        prefill_s: seconds to prefill (new tokens, tokens cached before them); does not fall as history
            tokens become new ones.
    """
    if history_tokens <= 0:
        return 0

    def recomputed(step: int) -> int:
        return min(step * step_tokens, history_tokens)

    def times_s(step: int) -> tuple[float, float]:
        kept = history_tokens - recomputed(step)
        return (load_s(kept) if kept else 0.0, prefill_s(new_tokens + recomputed(step), kept))

    low, high = 0, -(-history_tokens // step_tokens)
    while low < high:  # first step at which loading is no longer the slower one
        middle = (low + high) // 2
        loading_s, computing_s = times_s(middle)
        if loading_s <= computing_s:
            high = middle
        else:
            low = middle + 1
    candidates = [step for step in (low - 1, low) if step >= 0]
    return recomputed(min(candidates, key=lambda step: max(times_s(step))))


def is_worth_asking(
    history_tokens: int,
    new_tokens: int,
    *,
    load_s: Callable[[int], float],
    prefill_s: Callable[[int, int], float],
    round_trip_s: float,
    step_tokens: int = 1,
) -> bool:
    """Whether asking the store for a history is faster than computing it, at the best split of both."""
    if history_tokens <= 0:
        return False
    again = tokens_to_recompute(
        history_tokens, new_tokens, load_s=load_s, prefill_s=prefill_s, step_tokens=step_tokens
    )
    kept = history_tokens - again
    if not kept:
        return False
    with_load_s = round_trip_s + max(load_s(kept), prefill_s(new_tokens + again, kept))
    return with_load_s < prefill_s(new_tokens + history_tokens, 0)
