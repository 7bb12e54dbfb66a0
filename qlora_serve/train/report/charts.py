"""Curves as inline SVG: no script, no font, nothing to load."""

import math
from collections.abc import Sequence
from html import escape

Point = tuple[float, float]

_WIDTH, _HEIGHT = 480, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 20, 14, 34
_MOST_POINTS = 500
_SMOOTHING_SPAN = 20  # the bold line follows about a twentieth of the run


def curve(
    points: Sequence[Point], label: str, smooth: bool = False, marks: Sequence[Point] = ()
) -> str:
    """A line chart.

    Args:
        points: (step, value) in order; values that are not finite are left out.
        label: what the values are, for those who cannot see it.
        smooth: draw the points thin, and their running mean bold.
        marks: dots on top, such as the loss on held-out rows.
    """
    shown = [point for point in points if math.isfinite(point[1])]
    dots = [point for point in marks if math.isfinite(point[1])]
    if not shown:
        return ""
    everything = [*shown, *dots]
    first, last = min(x for x, _ in everything), max(x for x, _ in everything)
    low, high = min(y for _, y in everything), max(y for _, y in everything)
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def place(point: Point) -> str:
        x = _LEFT + (point[0] - first) / max(last - first, 1e-12) * (_WIDTH - _LEFT - _RIGHT)
        y = _HEIGHT - _BOTTOM - (point[1] - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(label)}: {shown[0][1]:.4g} to {shown[-1][1]:.4g}">'
    ]
    for tick in ticks:
        y = place((first, tick)).partition(",")[2]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text x="{_LEFT - 8}" y="{y}" dy="4" text-anchor="end">{_short(tick)}</text>'
        )
    for step in _steps(first, last):
        x = place((step, low)).partition(",")[0]
        parts.append(f'<text x="{x}" y="{_HEIGHT - 10}" text-anchor="middle">{step:g}</text>')
    thin = _thinned(shown)
    line = " ".join(map(place, thin))
    if smooth and len(shown) > _SMOOTHING_SPAN:
        parts.append(f'<polyline class="raw" points="{line}"/>')
        line = " ".join(map(place, _thinned(_smoothed(shown))))
    parts.append(f'<polyline class="line" points="{line}"/>')
    for dot in dots:
        x, _, y = place(dot).partition(",")
        title = f"step {dot[0]:g}: {dot[1]:.4g}"
        parts.append(
            f'<circle class="mark" cx="{x}" cy="{y}" r="4"><title>{title}</title></circle>'
        )
    return "".join(parts) + "</svg>"


def _smoothed(points: Sequence[Point]) -> list[Point]:
    """The mean over a window around each point, which lags behind nothing."""
    reach = max(1, len(points) // _SMOOTHING_SPAN // 2)
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    found = []
    for index, (step, _) in enumerate(points):
        # As far to one side as to the other, so that the ends are not pulled inwards.
        near = min(reach, index, len(points) - 1 - index)
        first, last = index - near, index + near + 1
        found.append((step, (sums[last] - sums[first]) / (last - first)))
    return found


def _thinned(points: Sequence[Point]) -> list[Point]:
    """At most some hundred points, the first and the last among them."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    last = len(points) - 1
    return [points[round(i * last / (_MOST_POINTS - 1))] for i in range(_MOST_POINTS)]


def _ticks(low: float, high: float) -> list[float]:
    """About four round values that span a range."""
    if high <= low:
        low, high = low - abs(low) / 2 - 1e-9, high + abs(high) / 2 + 1e-9
    rough = (high - low) / 4
    magnitude = 10 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough)
    start = math.floor(low / step)
    return [i * step for i in range(start, math.ceil(high / step) + 1)]


def _steps(first: float, last: float) -> list[float]:
    """Up to five whole steps for the axis."""
    count = min(5, int(last - first) + 1)
    if count < 2:
        return [first]
    return [round(first + i * (last - first) / (count - 1)) for i in range(count)]


def _short(value: float) -> str:
    """A tick's value in few characters, such as 1.5e-4."""
    if value == 0 or abs(value) >= 0.01:
        return f"{value:.4g}"
    digits, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(digits):g}e{int(exponent)}"
