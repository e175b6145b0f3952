"""Writes what simulations found: one page that needs no other file, its pictures, and the figures as JSON."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from jinja2 import Environment
from matplotlib.figure import Figure

from trireme.errors import InvalidConfiguration
from trireme.simulator import plots
from trireme.simulator.result import Result

COLUMNS: Final = (
    ("JCT mean", "jct_s_mean", "s"),
    ("p50", "jct_s_p50", "s"),
    ("p99", "jct_s_p99", "s"),
    ("max", "jct_s_max", "s"),
    ("TTFT mean", "ttft_s_mean", "s"),
    ("p99", "ttft_s_p99", "s"),
    ("per token mean", "per_token_s_mean", "ms"),
    ("p95", "per_token_s_p95", "ms"),
    ("answer tokens/s", "answer_tokens_per_s", ""),
    ("prompt cached", "cached_token_share", "%"),
    ("preempted requests", "preempted_requests", ""),
    ("recomputed tokens", "recomputed_tokens", ""),
)
"""Heading, figure, unit."""

_MORE_IS_BETTER = ("answer_tokens_per_s", "cached_token_share")
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
 body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2.5rem auto }
 body { padding: 0 1rem }
 h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin: 2rem 0 .4rem }
 .table { overflow-x: auto }
 table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
 th, td { text-align: right; padding: .3rem .7rem; border-bottom: 1px solid #e4e4e4; white-space: nowrap }
 th { font-weight: 600; vertical-align: bottom } th:first-child, td:first-child { text-align: left }
 td.best { font-weight: 700 } small { color: #5a5a5a; font-weight: 400 }
 img { max-width: 100%; height: auto }
 dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem }
 dt { color: #5a5a5a } dd { margin: 0 }
</style></head><body>
<h1>{{ title }}</h1>
<h2>Figures</h2>
<div class="table"><table>
<tr><th>policy</th>{% for heading, _, unit in columns -%}
<th>{{ heading }}{% if unit %}<br><small>{{ unit }}</small>{% endif %}</th>{% endfor %}</tr>
{% for row in rows %}<tr><td>{{ row.name }}</td>{% for cell in row.cells -%}
<td{% if cell.best %} class="best"{% endif %}>{{ cell.text }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
<p><small>JCT: from arrival to the last token. TTFT: to the first. Per token: JCT over the answer's tokens.
Bold: the best of its column.</small></p>
{% for picture in pictures %}<h2>{{ picture.title }}</h2>
<img alt="{{ picture.title }}" src="data:image/png;base64,{{ picture.data }}">
{% endfor %}<h2>What was simulated</h2>
<dl>{% for name, value in facts %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
</body></html>
"""


def write_report(
    folder: Path, runs: Mapping[str, Result], *, title: str, facts: Mapping[str, str]
) -> dict[str, dict[str, float]]:
    """Write `report.html`, `latency.png`, `queue.png`, `blocks.png` and `figures.json` into `folder`.

    Args:
        runs: by policy, of the same requests; the first is what the others are compared with.
        facts: what was simulated, as the reader should see it.

    Returns:
        The figures of each run, with those ratios to the first run that the JSON file holds.

    Raises:
        InvalidConfiguration: the folder cannot be written.
    """
    figures = {name: run.figures() for name, run in runs.items()}
    first = next(iter(figures.values()))
    for found in figures.values():
        for name in ("jct_s_mean", "ttft_s_mean", "per_token_s_mean", "per_token_s_p95", "jct_s_max"):
            found[f"first_over_this_{name}"] = first[name] / found[name] if found[name] else float("nan")
    pictures = (
        ("latency", "How long requests take", plots.latency_figure(runs)),
        ("queue", "The queue over time", plots.queue_figure(runs)),
        ("blocks", "KV memory over time", plots.blocks_figure(runs)),
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        encoded = []
        for name, heading, figure in pictures:
            data = _png(figure)
            (folder / f"{name}.png").write_bytes(data)
            encoded.append({"title": heading, "data": base64.b64encode(data).decode("ascii")})
        document = {"facts": dict(facts), "policies": figures}
        (folder / "figures.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        page = Environment(autoescape=True).from_string(_PAGE)
        text = page.render(
            title=title, columns=COLUMNS, rows=_rows(figures), pictures=encoded, facts=list(facts.items())
        )
        (folder / "report.html").write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidConfiguration(f"cannot write {folder}: {error.strerror}", param="--out") from error
    return figures


def shown(value: float, unit: str) -> str:
    """A figure as a person reads it: three digits, thousands apart."""
    scaled = value * {"ms": 1000, "%": 100}.get(unit, 1)
    if unit and abs(scaled) < 100:
        return f"{scaled:.3g}"
    return f"{scaled:,.0f}"


def _rows(figures: Mapping[str, Mapping[str, float]]) -> list[dict[str, object]]:
    best = {
        key: (max if key in _MORE_IS_BETTER else min)(found[key] for found in figures.values())
        for _, key, unit in COLUMNS
        if unit or key in _MORE_IS_BETTER
    }
    return [
        {
            "name": name,
            "cells": [
                {
                    "text": shown(found[key], unit),
                    "best": len(figures) > 1 and best.get(key) == found[key],
                }
                for _, key, unit in COLUMNS
            ],
        }
        for name, found in figures.items()
    ]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": ""})
    return buffer.getvalue()
