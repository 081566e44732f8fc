"""Means, intervals and rank correlations against the printed table, the textbook and scipy; bootstraps of known ρ."""

import math
import statistics

import numpy as np
import pytest
from scipy import stats

from lkd.core.statistics import (
    bootstrap_correlation,
    confidence_interval,
    correlate,
    mean_and_error,
    noise_ceiling,
    percentile_interval,
    spearman,
    split_halves,
)


def draw(number: int = 0) -> np.random.Generator:
    return np.random.default_rng(number)


def test_the_interval_is_around_the_mean_with_the_printed_tables_t() -> None:
    values = [1.0, 2.0, 6.0]
    mean, error = mean_and_error(values)
    assert (mean, error) == pytest.approx((statistics.mean(values), statistics.stdev(values) / math.sqrt(3)))
    for count, quantile in ((2, 12.7062), (3, 4.3027), (10, 2.2622)):
        low, high = confidence_interval([0.0, 1.0] + [0.5] * (count - 2))
        assert (high - low) / 2 == pytest.approx(
            quantile * mean_and_error([0.0, 1.0] + [0.5] * (count - 2))[1], abs=1e-4
        )
    assert all(math.isnan(value) for value in (mean_and_error([1.0])[1], *confidence_interval([1.0])))


def test_rho_is_scipys_with_ties_and_a_constant_ranks_nothing() -> None:
    a, b = draw().integers(4, size=(50, 8)), draw(1).normal(size=(50, 8)).round()
    expected = [stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(spearman(a, b), expected)
    assert spearman(np.array([3.0, 1.0, 2.0, -math.inf]), np.array([2.0, -1.0, 0.0, -7.0])) == 1
    assert spearman(np.arange(7.0), np.ones(7)) == 0


def test_what_the_columns_share_is_no_noise() -> None:
    """Seeds that are better or worse as a whole do not blur a ranking within each."""
    truth = np.arange(6.0)
    seeds = truth + 100 * draw().normal(size=(5, 1))
    repeated = np.tile(truth, (3, 1))
    assert correlate(seeds, repeated) == 1
    assert percentile_interval(bootstrap_correlation(seeds, repeated, draw(), 200)) == (1, 1)
    assert noise_ceiling(seeds, draw(), 200) == (1, 1, 1)


def test_the_interval_covers_the_true_correlation() -> None:
    """Of 60 noisy measurements of a ranking whose ρ is known, the interval holds it in most."""
    a, b = np.arange(8.0), np.array([1.0, 0, 3, 2, 5, 7, 4, 6])
    true, held, noise = float(spearman(a, b)), 0, draw()
    for number in range(60):
        noisy = [mean + 1.5 * noise.normal(size=(8, 8)) for mean in (a, b)]
        low, high = percentile_interval(bootstrap_correlation(*noisy, draw(number), 300))
        assert -1 <= low < high <= 1
        held += low <= true <= high
    assert held >= 50


def test_halves_are_disjoint_and_noise_alone_has_no_ceiling() -> None:
    assert [len(split_halves(count)) for count in (2, 3, 4, 5, 6)] == [1, 3, 3, 15, 10]
    assert all(len(first) == len(second) == 3 and not set(first) & set(second) for first, second in split_halves(7))
    noise = draw()
    ceilings = [noise_ceiling(noise.normal(size=(4, 8)), draw(n), 300) for n in range(20)]
    assert abs(sum(mean for mean, _, _ in ceilings) / 20) < 0.15
    assert all(low < 0.2 and high - low > 0.3 for _, low, high in ceilings)


def test_the_ceiling_is_that_of_as_many_measurements_again() -> None:
    noise, ceilings, others = draw(), [], []
    for number in range(60):
        effects = noise.normal(size=8)
        first, second = effects + noise.normal(size=(2, 4, 8))
        ceilings.append(noise_ceiling(first, draw(number), 10)[0])
        others.append(float(spearman(first.mean(0), second.mean(0))))
    assert np.mean(ceilings) == pytest.approx(np.mean(others), abs=0.06)
