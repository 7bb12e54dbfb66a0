"""How sure a difference is.

Rows are what varies, so rows are resampled. A metric is a sum of numerators over a sum of
denominators (the loss: over tokens; the others: over rows), which covers both kinds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A value with its confidence interval."""

    value: float
    low: float
    high: float


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The sum of one over the sum of the other."""
    return float(np.sum(numerators) / np.sum(denominators))


def bootstrap(
    numerators: Sequence[float],
    denominators: Sequence[float],
    confidence: float,
    resamples: int,
    seed: int,
) -> Interval:
    """The percentile bootstrap over rows (Efron 1979, doi:10.1214/aos/1176344552)."""
    top, bottom = np.asarray(numerators, float), np.asarray(denominators, float)
    rows = np.random.default_rng(seed).integers(0, len(top), size=(resamples, len(top)))
    found = top[rows].sum(axis=1) / bottom[rows].sum(axis=1)
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(found, [tail, 100 - tail])
    return Interval(ratio(numerators, denominators), float(low), float(high))


def paired_p_value(
    first: Sequence[float], second: Sequence[float], resamples: int, seed: int
) -> float:
    """Could the difference of two systems on the same rows be chance? Two-sided.

    Approximate randomization (Noreen 1989; for language tasks Dror et al. 2018, ACL P18-1128): if
    the systems were alike, each row's two results could be swapped. All swaps are tried where they
    are no more than `resamples`, else so many random ones.

    Args:
        first: each row's numerator under one system.
        second: the same rows' under the other; denominators must be the same.
        resamples: the most swaps to try.
        seed: of the random ones.
    """
    difference = np.asarray(first, float) - np.asarray(second, float)
    difference = difference[difference != 0]  # swapping equal results changes nothing
    if not len(difference):
        return 1.0
    observed = abs(difference.sum()) * (1 - 1e-9)  # rounding must not make it larger than itself
    if 2 ** len(difference) <= resamples:
        signs = _all_signs(len(difference))
        return float(np.mean(np.abs(signs @ difference) >= observed))
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(resamples, len(difference)))
    # The order that was observed counts as one of them (Phipson and Smyth 2010).
    return float((np.sum(np.abs(signs @ difference) >= observed) + 1) / (resamples + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values of several comparisons, corrected for their number (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected = [1.0] * len(p_values)
    reached = 0.0
    for place, index in enumerate(order):
        reached = max(reached, min(1.0, p_values[index] * (len(p_values) - place)))
        corrected[index] = reached
    return corrected


def _all_signs(count: int) -> Any:
    numbers = np.arange(2**count)[:, None] >> np.arange(count)[None, :]
    return 1.0 - 2.0 * (numbers & 1)
