"""`sweep.html`: all points of a sweep beside each other, and a picture of their losses."""

from html import escape
from typing import TYPE_CHECKING

from qlora_serve.train.evaluate.show import HEADINGS, figure

if TYPE_CHECKING:
    from qlora_serve.train.sweep import SweepResult

_WIDTH, _ROW, _LABEL = 720, 26, 300


def loss_bars(losses: dict[str, tuple[float, float, float]], best: str | None) -> str:
    """Bars with confidence intervals as SVG, the lowest loss first.

    Args:
        losses: name → value, low, high.
        best: the name that stands out.
    """
    ordered = sorted(losses.items(), key=lambda item: item[1][0])
    widest = max(high for _, (_, _, high) in ordered) or 1.0
    scale = (_WIDTH - _LABEL - 70) / widest
    height = _ROW * len(ordered) + 8
    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="held-out loss of {len(ordered)} systems">'
    ]
    for place, (name, (value, low, high)) in enumerate(ordered):
        y = place * _ROW + 4
        kind = "best" if name == best else "base" if name == "base" else "bar"
        middle = y + _ROW / 2 - 3
        shown = name if len(name) <= 42 else name[:41] + "…"
        parts.append(
            f'<text x="{_LABEL - 10}" y="{middle + 4}" text-anchor="end">{escape(shown)}</text>'
            f'<rect class="{kind}" x="{_LABEL}" y="{y}" width="{max(1, value * scale):.1f}" '
            f'height="{_ROW - 7}" rx="3"/>'
            f'<line class="range" x1="{_LABEL + low * scale:.1f}" '
            f'x2="{_LABEL + high * scale:.1f}" y1="{middle}" y2="{middle}"/>'
            f'<text x="{_LABEL + high * scale + 8:.1f}" y="{middle + 4}">{value:.3f}</text>'
        )
    return "".join(parts) + "</svg>"


def sweep_page(result: "SweepResult") -> str:
    """The page, in one file that loads nothing."""
    from importlib.resources import files

    from jinja2 import Environment

    from qlora_serve.train.sweep import best

    evaluation, winner = result.evaluation, best(result)
    template = files(__package__).joinpath("sweep.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    systems = evaluation.systems if evaluation else {}
    losses = {n: (m["loss"].value, m["loss"].low, m["loss"].high) for n, m in systems.items()}
    ordered = sorted(systems, key=lambda name: losses[name][0])
    metrics = list(next(iter(systems.values()), {}))
    return environment.from_string(template).render(
        picture=loss_bars(losses, winner) if losses else "",
        metrics=[HEADINGS[metric] for metric in metrics],
        keys=list(next(iter(result.points.values()))),
        rows=[
            {
                "name": name,
                "best": name == winner,
                "values": list(result.points.get(name, {}).values()),
                "cells": [figure(m, systems[name][m].value) for m in metrics],
            }
            for name in ordered
        ],
        failed=result.failed,
        best=winner,
        held_out=f"{evaluation.rows} rows of {evaluation.data}" if evaluation else "",
    )
