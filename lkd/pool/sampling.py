"""Which student of the pool a rollout starts from.

LKD's ablation compares uniform, Gaussian and fixed-step sampling of recorded students; how each of them weighs the ages
is *our reconstruction*. Sampling by ranking fidelity is ours.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lkd.config.meta_training import PoolSettings
from lkd.core.errors import UserError
from lkd.core.files import MALFORMED, read_json

AgeWeights = Callable[[Tensor, int], Tensor]
"""From the ages of the pool's students [N] and the number of the draw, from 0, to a weight for each student [N]."""


def build_age_weights(settings: PoolSettings) -> AgeWeights:
    """The weights that `sampling` gives to students by their age."""
    if settings.sampling == "gaussian":
        mean, spread = settings.gaussian_age, settings.gaussian_spread
        return lambda ages, draw: (-((ages - mean) / spread).square() / 2).softmax(0)
    if settings.sampling == "fixed_step":
        return lambda ages, draw: (ages == ages.unique()[draw % len(ages.unique())]).double()
    if settings.sampling == "latest":
        return lambda ages, draw: (ages == ages.max()).double()
    if settings.sampling == "fidelity":
        known = read_fidelity(settings.fidelity_file)
        return lambda ages, draw: torch.from_numpy(np.interp(ages, known[:, 0], known[:, 1]))
    return lambda ages, draw: torch.ones_like(ages)


def find_drawable_ages(age_weights: AgeWeights, ages: Tensor) -> Tensor:
    """The ages that can be drawn at all, in order."""
    weights = torch.stack([age_weights(ages, draw) for draw in range(len(ages.unique()))])
    return ages[weights.amax(0) > 0].unique()


def check_sampling(settings: PoolSettings, ages: Tensor) -> float:
    """Check that a pool with students of these ages, [N], can be drawn from; the oldest age that is drawn."""
    age_weights = build_age_weights(settings)
    span = f"{float(ages.min()):g} to {float(ages.max()):g}"
    if settings.sampling == "gaussian" and not ages.min() <= settings.gaussian_age <= ages.max():
        raise UserError(
            f"pool.gaussian_age: {settings.gaussian_age} is outside the pool, whose ages go from {span}; choose one of "
            "them, or raise pool.max_age"
        )
    drawable = find_drawable_ages(age_weights, ages)
    if not len(drawable):
        raise UserError(
            f"pool.fidelity_file: {settings.fidelity_file} gives no weight to any age of the pool ({span}); run "
            "`lkd fidelity` with the ages of this pool"
        )
    if drawable.min() >= 1:
        raise UserError("pool.max_age: rollouts would all start at the end of the training; let some start earlier")
    return float(drawable.max())


def read_fidelity(path: str | None) -> np.ndarray:
    """Ages, increasing, and their weights, as `lkd fidelity` recommends them, [A, 2]."""
    if path is None:
        raise UserError("pool.fidelity_file: missing; sampling fidelity needs the fidelity.json of `lkd fidelity`")
    if not Path(path).is_file():
        raise UserError(f"pool.fidelity_file: {path}: no such file; `lkd fidelity` writes it")
    content = read_json(Path(path))
    try:
        pairs = np.array(sorted(content["age_weights"]), float).reshape(-1, 2)
    except MALFORMED:
        pairs = np.empty((0, 2))
    increasing = (np.diff(pairs[:, 0]) > 0).all()
    if not len(pairs) or not np.isfinite(pairs).all() or (pairs[:, 1] < 0).any() or not increasing:
        raise UserError(
            f"pool.fidelity_file: {path} has no `age_weights` [[age, weight of at least 0], ...], each age once; "
            "`lkd fidelity` writes such a file"
        )
    return pairs
