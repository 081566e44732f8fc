"""Means over seeds, their standard errors, and intervals by Student's t."""

import math


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
