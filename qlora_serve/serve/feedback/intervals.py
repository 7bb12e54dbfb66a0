"""How sure a rate or a mean is, when answers to one user are not independent of each other."""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


@dataclass(frozen=True)
class Interval:
    """A value with its confidence interval."""

    value: float
    low: float | None
    """None where there is too little to tell."""
    high: float | None


@dataclass(frozen=True)
class Sample:
    """Numbers, and whose they are: numbers of one cluster may depend on each other."""

    values: Sequence[float]
    clusters: Sequence[Hashable]

    @property
    def mean(self) -> float:
        """Of all values."""
        return math.fsum(self.values) / len(self.values)

    @property
    def cluster_count(self) -> int:
        """How many clusters there are."""
        return len(set(self.clusters))

    @property
    def variance(self) -> float:
        """Of the mean, robust to dependence within clusters (Liang and Zeger 1986)."""
        mean = self.mean
        residuals: dict[Hashable, float] = defaultdict(float)
        for value, cluster in zip(self.values, self.clusters, strict=True):
            residuals[cluster] += value - mean
        count = len(residuals)
        total = math.fsum(residual**2 for residual in residuals.values())
        return count / (count - 1) * total / len(self.values) ** 2


def rate(sample: Sample) -> Interval:
    """The share of ones among zeros and ones, by Wilson's score interval (1927).

    Dependence within clusters makes a sample worth fewer answers than it has (Kish's design
    effect); where all answers agree, that cannot be seen, and each cluster counts once.
    """
    low, high = _wilson(sample.mean, _effective(sample))
    return Interval(sample.mean, low, high)


def rate_difference(one: Sample, other: Sample) -> Interval:
    """The first's rate minus the second's (Newcombe 1998, Statistics in
    Medicine 17:873, method 10)."""
    p, q = one.mean, other.mean
    p_low, p_high = _wilson(p, _effective(one))
    q_low, q_high = _wilson(q, _effective(other))
    low = p - q - math.hypot(p - p_low, q_high - q)
    high = p - q + math.hypot(p_high - p, q - q_low)
    return Interval(p - q, low, high)


def mean(sample: Sample) -> Interval:
    """The mean, by Student's t over clusters."""
    if sample.cluster_count < 2:
        return Interval(sample.mean, None, None)
    half = t_quantile(sample.cluster_count - 1) * math.sqrt(sample.variance)
    return Interval(sample.mean, sample.mean - half, sample.mean + half)


def mean_difference(one: Sample, other: Sample) -> Interval:
    """The first's mean minus the second's, by Welch's t with the smaller sample's freedom."""
    value = one.mean - other.mean
    fewest = min(one.cluster_count, other.cluster_count)
    if fewest < 2:
        return Interval(value, None, None)
    half = t_quantile(fewest - 1) * math.sqrt(one.variance + other.variance)
    return Interval(value, value - half, value + half)


def _effective(sample: Sample) -> float:
    count, clusters, p = len(sample.values), sample.cluster_count, sample.mean
    if clusters == count:
        return count
    if p in (0, 1) or clusters < 2:
        return clusters
    effect = sample.variance / (p * (1 - p) / count)
    return count / max(1.0, effect)


def _wilson(p: float, count: float) -> tuple[float, float]:
    square = _Z**2 / count
    centre = (p + square / 2) / (1 + square)
    half = _Z / (1 + square) * math.sqrt(p * (1 - p) / count + square / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def t_quantile(freedom: int) -> float:
    """Student's t for `CONFIDENCE`, two-sided.

    Exact for 1 and 2 degrees of freedom, else by its expansion around the normal quantile
    (Abramowitz and Stegun 26.7.5), which is good to 0.2 % from 3 on.
    """
    if freedom == 1:
        return math.tan(math.pi * CONFIDENCE / 2)
    if freedom == 2:
        return CONFIDENCE * math.sqrt(2 / (1 - CONFIDENCE**2))
    z = _Z
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum(term / freedom**power for power, term in enumerate(terms))
