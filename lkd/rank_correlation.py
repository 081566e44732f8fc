"""Spearman's rank correlation over a few losses, its bootstrap over repeated measurements, and its noise ceiling."""

import itertools

import torch
from torch import Generator, Tensor

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
