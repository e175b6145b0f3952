"""The pictures of a report: latency distributions, the queue and the blocks over time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from trireme.simulator.result import Floats, Moment, Result

COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
"""Told apart by people with colour-deficient sight too (Okabe and Ito)."""
GREY = "#5a5a5a"
WIDTH_IN = 11.0


def latency_figure(runs: Mapping[str, Result]) -> Figure:
    """Cumulative distributions of completion time, time to first token and time per answer token."""
    panels: tuple[tuple[str, Callable[[Result], Floats]], ...] = (
        ("Completion time, s", lambda run: run.jct_s),
        ("Time to first token, s", lambda run: run.ttft_s),
        ("Completion time per answer token, s", lambda run: run.per_token_s),
    )
    figure, axes = _figure(columns=3, height_in=3.9)
    for axis, (title, of) in zip(axes, panels, strict=True):
        for colour, (name, run) in zip(_colours(runs), runs.items(), strict=True):
            values = np.sort(of(run))
            shares = np.arange(1, len(values) + 1) / len(values)
            axis.step(values, shares, where="post", color=colour, linewidth=1.7, label=name)
            axis.plot(
                values.mean(), np.interp(values.mean(), values, shares), "o", color=colour, markersize=4.5
            )
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(_plain))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_ylim(0, 1.01)
        _finish(axis, title)
    axes[0].set_ylabel("share of requests", color=GREY, fontsize=9)
    _legend(figure, axes[0], note="dots: means")
    return figure


def queue_figure(runs: Mapping[str, Result]) -> Figure:
    """Requests that wait, and the batch, over time."""
    return _over_time(
        runs,
        (
            ("Requests waiting", lambda moment: moment.waiting),
            ("Requests in a batch", lambda moment: moment.running),
        ),
    )


def blocks_figure(runs: Mapping[str, Result]) -> Figure:
    """KV blocks on the device, on the host, and bytes in lower tiers where these were simulated."""
    panels: list[tuple[str, Callable[[Moment], float]]] = [
        ("KV blocks on the device", lambda moment: moment.device_blocks),
        ("KV blocks swapped to the host", lambda moment: moment.host_blocks),
    ]
    tiers = sorted({tier for run in runs.values() for moment in run.timeline for tier in moment.tiers})
    panels.extend((f"{tier}, GB", partial(_tier_gb, tier)) for tier in tiers)
    return _over_time(runs, panels)


def _tier_gb(tier: str, moment: Moment) -> float:
    return moment.tiers.get(tier, 0) / 1e9


def _over_time(runs: Mapping[str, Result], panels: Sequence[tuple[str, Callable[[Moment], float]]]) -> Figure:
    figure, axes = _figure(columns=len(panels), height_in=3.5)
    for axis, (title, of) in zip(axes, panels, strict=True):
        for colour, (name, run) in zip(_colours(runs), runs.items(), strict=True):
            times = [moment.at_s for moment in run.timeline]
            values = [of(moment) for moment in run.timeline]
            axis.step(times, values, where="post", color=colour, linewidth=1.2, alpha=0.85, label=name)
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
        axis.set_xlabel("seconds", color=GREY, fontsize=9)
        _finish(axis, title)
    _legend(figure, axes[0])
    return figure


def _figure(*, columns: int, height_in: float) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained", dpi=150)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    return figure, list(axes)


def _finish(axis: Axes, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=10.5)
    axis.grid(True, which="major", color="#e4e4e4", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=GREY, labelsize=8.5, length=3)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#b0b0b0")


def _legend(figure: Figure, axis: Axes, *, note: str = "") -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower left",
        ncols=max(1, len(labels)),
        frameon=False,
        fontsize=9.5,
        handlelength=1.6,
    )
    if note:
        figure.text(0.995, 0.012, note, ha="right", va="bottom", fontsize=8.5, color=GREY)


def _colours(runs: Mapping[str, Result]) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(len(runs))]


def _plain(value: float, _: int) -> str:
    return f"{value:g}"
