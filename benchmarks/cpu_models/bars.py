"""What was to be reached, beside what was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.cpu_models.turns import Times

_READ_SHARE = 0.75
_FP6_OVER_BF16 = 0.45
_MODELS = ("125m", "850m")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One of them."""

    name: str
    wanted: float
    measured: float
    is_ceiling: bool = False
    """At most so much is wanted; otherwise at least."""

    @property
    def is_met(self) -> bool:
        return self.measured <= self.wanted if self.is_ceiling else self.measured >= self.wanted


def bars(model: str, form: str, all_times: Mapping[str, Times], shares: Mapping[str, float]) -> list[Bar]:
    """Those that hold for a model and a format.

    Args:
        all_times: by name of the case.
        shares: by name of the case, what our decoding reaches of the read bandwidth.
    """
    if model not in _MODELS:
        return []
    found = []
    for case, times in all_times.items():
        ours = f"trireme {form}"
        peers = [name for name in times.seconds if not name.startswith(("trireme", "transformers"))]
        at = f"{model} {form} {case}"
        if form == "fp6" and case.startswith("decode"):
            over = 1.0 / times.ratio(ours, "trireme bf16")
            found.append(Bar(name=f"{at} over bf16", wanted=_FP6_OVER_BF16, measured=over, is_ceiling=True))
            found += [
                Bar(name=f"{at} against {peer}", wanted=1.0, measured=times.ratio(ours, peer))
                for peer in peers
            ]
        elif form in ("int8", "int4") and peers:
            best = min(peers, key=times.median_s)
            wanted = _wanted_over_peers(model, case)
            found.append(Bar(name=f"{at} against {best}", wanted=wanted, measured=times.ratio(ours, best)))
        if model == "850m" and case == "decode 1" and case in shares:
            found.append(Bar(name=f"{at} of read bandwidth", wanted=_READ_SHARE, measured=shares[case]))
    return found


def _wanted_over_peers(model: str, case: str) -> float:
    """How many times as fast as the better of llama.cpp and OpenVINO."""
    if case == "decode 1":
        return 1.25 if model == "850m" else 1.1
    return 1.1 if model == "850m" and case.startswith("decode") else 1.0
