"""Means over seeds with their errors, and rank correlations."""

import itertools
import math
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Values = NDArray[np.float64]

# `scipy.stats` is imported where it is called: it takes a second, and most commands need none of it.


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error (NaN for a single value)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def confidence_interval(values: list[float], level: float = 0.95) -> tuple[float, float]:
    """The interval of the mean by Student's t, (low, high); NaN for a single value."""
    from scipy.special import stdtrit

    mean, error = mean_and_error(values)
    half = float(stdtrit(len(values) - 1, (1 + level) / 2)) * error
    return mean - half, mean + half


# ----------------------------------------------------------------------------------------------------------------------
# Spearman's rank correlation over a few losses, its bootstrap over repeated measurements, and its noise ceiling.

MOST_SPLITS = 200
REPLICATES = 2000  # of a bootstrap


def spearman(a: Values, b: Values) -> Values:
    """Spearman's ρ along the last dimension, [..., N] to [...]: Pearson's correlation of the ranks.

    A constant ranks nothing, so its ρ is 0 (scipy's own has NaN there, and takes one pair at a time).
    """
    from scipy.stats import rankdata

    left, right = (ranks - ranks.mean(-1, keepdims=True) for ranks in (rankdata(a, axis=-1), rankdata(b, axis=-1)))
    spread = np.sqrt(np.square(left).sum(-1) * np.square(right).sum(-1))
    return np.divide((left * right).sum(-1), spread, out=np.zeros_like(spread), where=spread > 0)


def area_under_curve(scores: Values, positive: NDArray[np.bool_]) -> float:
    """The area under the ROC curve: the probability that a positive scores higher than a negative; [N] each."""
    from scipy.stats import mannwhitneyu  # slow to import

    above = mannwhitneyu(scores[positive], scores[~positive]).statistic
    return float(above / (positive.sum() * (~positive).sum()))


def correlate(a: Values, b: Values) -> float:
    """ρ of the means of two sets of repeated measurements, [repetitions, N], not necessarily as many."""
    return float(spearman(a.mean(0), b.mean(0)))


def bootstrap_correlation(a: Values, b: Values, generator: Generator, replicates: int = REPLICATES) -> Values:
    """ρ of the means of repetitions drawn with replacement, `replicates` times, [replicates].

    A repetition is drawn with all its N columns, so that what they share (a seed, a batch) stays shared. Resampling
    adds the measurements' noise a second time, so that these ρ lie lower than `correlate`'s on the whole.
    """
    from scipy.stats import bootstrap

    def correlate_drawn(first: Any, second: Any, axis: int) -> Values:
        return spearman(a[first].mean(axis - 1), b[second].mean(axis - 1))

    rows = np.arange(len(a)), np.arange(len(b))
    options: dict[str, Any] = {"n_resamples": replicates, "method": "percentile", "rng": generator}
    return bootstrap(rows, correlate_drawn, **options).bootstrap_distribution


def percentile_interval(values: Values, level: float = 0.95) -> tuple[float, float]:
    """The interval that holds the middle `level` of the values."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return low, high


def split_halves(count: int) -> list[tuple[list[int], list[int]]]:
    """The ways to split `count` things into two halves (one is left out of an odd number), at most `MOST_SPLITS`."""
    half = count // 2
    splits = (
        (list(first), list(second))
        for first in itertools.combinations(range(count), half)
        for second in itertools.combinations(sorted(set(range(count)) - set(first)), half)
        if first < second
    )
    return list(itertools.islice(splits, MOST_SPLITS))


def noise_ceiling(values: Values, generator: Generator, replicates: int = REPLICATES) -> tuple[float, float, float]:
    """How well as many repeated measurements again as these, [repetitions, N], would rank as these do.

    By ρ of the means of two halves, which are noisier than the means of all, and the Spearman-Brown formula.

    Returns:
        The mean over the ways to split, and its 95 % percentile interval. A bootstrap draw takes a split at random and
        resamples within each half, so that no repetition is ever on both sides.
    """
    splits = np.array(split_halves(len(values)))
    longer = len(values) / splits.shape[-1]
    mean = float(lengthen(spearman(*(values[splits[:, side]].mean(1) for side in (0, 1))), longer).mean())
    drawn = splits[generator.integers(len(splits), size=replicates)]
    places = generator.integers(drawn.shape[-1], size=drawn.shape)
    rows = np.take_along_axis(drawn, places, -1)
    return mean, *percentile_interval(lengthen(spearman(*(values[rows[:, side]].mean(1) for side in (0, 1))), longer))


def lengthen(rho: Values, longer: float) -> Values:
    """The correlation of means over `longer` times as many measurements (Spearman, Brown, 1910); odd in ρ."""
    return longer * rho / (1 + (longer - 1) * np.abs(rho))
