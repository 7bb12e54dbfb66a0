"""What a run gave, and the figures that are made of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from workload import Measurement

Results = dict[str, dict[str, list[Measurement]]]
"""Case → system → one measurement a round."""


def percentile(values: list[float], share: float) -> float | None:
    """The value below which a share of all values lies, interpolated; None for no values."""
    if not values:
        return None
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def ratios(ours: list[Measurement], theirs: list[Measurement]) -> list[float]:
    """Tokens per second, ours over theirs, of each round that both have."""
    pairs = zip(ours, theirs, strict=False)
    return [one.tokens_per_second / other.tokens_per_second for one, other in pairs]


def rate(turns: list[Measurement]) -> float:
    """The median of the rounds' tokens per second."""
    return median(turn.tokens_per_second for turn in turns)


def latencies(turns: list[Measurement]) -> dict[str, float | None]:
    """Percentiles over the requests of all rounds, in seconds."""
    ttfts = [value for turn in turns for value in turn.ttfts]
    itls = [value for turn in turns for value in turn.itls]
    return {
        "ttft_p50": percentile(ttfts, 0.50),
        "ttft_p95": percentile(ttfts, 0.95),
        "itl_p50": percentile(itls, 0.50),
        "itl_p95": percentile(itls, 0.95),
    }


@dataclass(frozen=True)
class Outcome:
    """What a scenario gave."""

    ratios: Mapping[str, Sequence[float]]
    """By the names that the limits use; a value a round."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """What the ratios were made of, for the JSON file."""
    summary: str = ""
    """The figures in a line."""


def milliseconds(seconds: float | None) -> str:
    """For a table."""
    if seconds is None:
        return "–"
    return f"{seconds * 1000:.{1 if seconds < 0.1 else 0}f} ms"
