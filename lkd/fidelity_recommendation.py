"""Which rollouts to meta-train with, from how well each setting ranked the losses."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lkd.rank_correlation import percentile_interval

Setting = tuple[str, str, int]
"""Annealing, objective, K."""


class SettingFidelity(NamedTuple):
    """How well the rollouts of one setting rank losses, over the ages as they would be drawn.

    Attributes:
        ages: The ages.
        weights: With which each age would be drawn; they sum to 1, or are all 0 if no age ranks at all.
        mean: The plain mean of ρ over the ages.
        rho: The weighted mean of ρ over the ages.
        low: Lower end of its interval.
        high: Upper end.
    """

    ages: list[float]
    weights: list[float]
    mean: float
    rho: float
    low: float
    high: float


def weigh_ages(rhos: list[float]) -> list[float]:
    """Weights proportional to max(0, ρ)², which sum to 1; all 0 if no ρ is positive."""
    squares = [max(0.0, rho) ** 2 for rho in rhos]
    total = sum(squares)
    return [square / total if total else 0.0 for square in squares]


def average_ages(ages: list[float], rhos: list[float], draws: list[Tensor]) -> SettingFidelity:
    """The fidelity of a setting, ages drawn by their own weights.

    Args:
        ages: The ages.
        rhos: ρ of each age.
        draws: Bootstrap draws of each age's ρ, [replicates] each, made with the same resampled trainings. The weights
            are not drawn anew.
    """
    weights = weigh_ages(rhos)
    low, high = percentile_interval(torch.stack([w * draw for w, draw in zip(weights, draws, strict=True)]).sum(0))
    weighted = sum(w * rho for w, rho in zip(weights, rhos, strict=True))
    return SettingFidelity(ages, weights, sum(rhos) / len(rhos), weighted, low, high)


def recommend(settings: dict[Setting, SettingFidelity], tolerance: float) -> dict[str, Any] | None:
    """Choose annealing, objective and K.

    The annealing and the objective: those with the highest ρ in the plain mean over ages and K (a mean weighted by ρ
    itself would favour noise). Then K: the smallest whose weighted ρ has a lower end of its interval that is at most
    `tolerance` under the best K's.

    Args:
        settings: The fidelity of each setting.
        tolerance: Differences in ρ that mean nothing, as `tolerance_of` has them.

    Returns:
        `annealing`, `objective` and `rollout_steps`; None if these do not rank the losses as full trainings do at all
        (no ρ is positive, at any age and K).
    """
    means: dict[tuple[str, str], list[float]] = {}
    for (annealing, objective, _), found in settings.items():
        means.setdefault((annealing, objective), []).append(found.mean)
    annealing, objective = max(means, key=lambda pair: sum(means[pair]) / len(means[pair]))
    lows = {
        steps: found.low
        for (*pair, steps), found in settings.items()
        if pair == [annealing, objective] and found.rho > 0
    }
    if not lows:
        return None
    steps = min(steps for steps, low in lows.items() if low >= max(lows.values()) - tolerance)
    return {"rollout_steps": steps, "objective": objective, "annealing": annealing}


def tolerance_of(ceiling: dict[str, float]) -> float:
    """How far full trainings fall short of their own ranking by chance: the noise ceiling above its lower end."""
    return max(0.0, ceiling["rho"] - ceiling["low"])


def weights_of(settings: dict[Setting, SettingFidelity], recommended: dict[str, Any] | None) -> list[list[float]]:
    """[age, weight] pairs of the recommended setting; none where nothing is recommended."""
    if recommended is None:
        return []
    found = settings[setting_of(recommended)]
    return [[age, round(weight, 4)] for age, weight in zip(found.ages, found.weights, strict=True)]


def setting_of(row: dict[str, Any]) -> Setting:
    """The setting of a row or of a recommendation."""
    return row["annealing"], row["objective"], row["rollout_steps"]
