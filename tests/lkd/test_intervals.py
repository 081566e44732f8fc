"""Intervals by Student's t."""

import math
import statistics

import pytest

from lkd.core.statistics import confidence_interval, t_quantile


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423)]
)
def test_quantiles_are_those_of_the_printed_table(degrees: int, quantile: float) -> None:
    assert t_quantile(0.95, degrees) == pytest.approx(quantile, abs=1e-4)


def test_many_degrees_approach_the_normal_distribution() -> None:
    assert t_quantile(0.9, 10_000) == pytest.approx(statistics.NormalDist().inv_cdf(0.95), abs=1e-3)


def test_the_interval_is_around_the_mean() -> None:
    low, high = confidence_interval([1.0, 2.0, 6.0])
    assert (low + high) / 2 == pytest.approx(3.0)
    assert (high - low) / 2 == pytest.approx(4.3027 * statistics.stdev([1.0, 2.0, 6.0]) / math.sqrt(3), abs=1e-3)
    assert all(math.isnan(end) for end in confidence_interval([1.0]))
