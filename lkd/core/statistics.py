"""Means over seeds with their errors, and rank correlations."""

import itertools
import math

import torch
from torch import Generator, Tensor

# ----------------------------------------------------------------------------------------------------------------------
# Means over seeds, their standard errors, and intervals by Student's t.


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error (NaN for a single value)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def confidence_interval(values: list[float], level: float = 0.95) -> tuple[float, float]:
    """The interval of the mean by Student's t, (low, high); NaN for a single value."""
    mean, error = mean_and_error(values)
    if math.isnan(error):
        return math.nan, math.nan
    half = t_quantile(level, len(values) - 1) * error
    return mean - half, mean + half


def t_quantile(level: float, degrees: int) -> float:
    """The t with P(|T| < t) = `level`, by bisection.

    Args:
        level: In (0, 1).
        degrees: Degrees of freedom, at least 1.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if t_probability(angle, degrees) < level else (low, angle)
    return math.sqrt(degrees) * math.tan(low)


def t_probability(angle: float, degrees: int) -> float:
    """P(|T| < √degrees · tan(angle)): Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(degrees // 2):
        total += term
        term *= cosine**2 * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


# ----------------------------------------------------------------------------------------------------------------------
# Spearman's rank correlation over a few losses, its bootstrap over repeated measurements, and its noise ceiling.

MOST_SPLITS = 200
REPLICATES = 2000  # of a bootstrap


def rank(values: Tensor) -> Tensor:
    """Ranks along the last dimension, from 1 for the least; ties share the mean of their ranks.

    Args:
        values: [..., N].
    """
    mine, others = values.unsqueeze(-1), values.unsqueeze(-2)
    less, equal = (others < mine).sum(-1), (others == mine).sum(-1)
    return less + (equal + 1) / 2


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's ρ along the last dimension: Pearson's correlation of the ranks, [...].

    A constant ranks nothing, so its ρ is 0.

    Args:
        a: [..., N].
        b: [..., N].
    """
    left, right = ((ranks - ranks.mean(-1, keepdim=True)).double() for ranks in (rank(a).double(), rank(b).double()))
    spread = (left.square().sum(-1) * right.square().sum(-1)).sqrt()
    return torch.where(spread > 0, (left * right).sum(-1) / spread.clamp(min=1e-12), 0.0)


def correlate(a: Tensor, b: Tensor) -> float:
    """ρ of the means of two sets of repeated measurements.

    Args:
        a: [repetitions, N].
        b: [repetitions, N], not necessarily as many.
    """
    return float(spearman(a.mean(0), b.mean(0)))


def bootstrap_correlation(a: Tensor, b: Tensor, replicates: int, generator: Generator) -> Tensor:
    """ρ of the means of repetitions drawn with replacement, `replicates` times, [replicates].

    A repetition is drawn with all its N columns, so that what they share (a seed, a batch) stays shared. Resampling
    adds the measurements' noise a second time, so that these ρ lie lower than `correlate`'s on the whole.

    Args:
        a: [repetitions, N].
        b: [repetitions, N].
        replicates: How often.
        generator: Of the draws.
    """
    return spearman(resample(a, replicates, generator).mean(1), resample(b, replicates, generator).mean(1))


def resample(values: Tensor, replicates: int, generator: Generator) -> Tensor:
    """Draw repetitions with replacement: [repetitions, N] to [replicates, repetitions, N]."""
    return values[torch.randint(len(values), (replicates, len(values)), generator=generator)]


def percentile_interval(values: Tensor, level: float = 0.95) -> tuple[float, float]:
    """The interval that holds the middle `level` of the values."""
    tail = (1 - level) / 2
    low, high = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=values.dtype)).tolist()
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


def noise_ceiling(values: Tensor, replicates: int, generator: Generator) -> tuple[float, float, float]:
    """How well repeated measurements rank as they themselves do: ρ of the means of two halves of the repetitions.

    Args:
        values: [repetitions, N], at least 2 repetitions.
        replicates: Draws of the bootstrap.
        generator: Of the draws.

    Returns:
        The mean over the ways to split, and its 95 % percentile interval. A bootstrap draw takes a split at random and
        resamples within each half, so that no repetition is ever on both sides.
    """
    splits = split_halves(len(values))
    mean = sum(correlate(values[first], values[second]) for first, second in splits) / len(splits)
    drawn = torch.randint(len(splits), (replicates,), generator=generator).tolist()
    pairs = [tuple(resample(values[half], 1, generator)[0].mean(0) for half in splits[number]) for number in drawn]
    low, high = percentile_interval(spearman(*(torch.stack(means) for means in zip(*pairs, strict=True))))
    return mean, low, high
