"""Which student of the pool a rollout starts from.

LKD's ablation compares uniform, Gaussian and fixed-step sampling of recorded students; how each of them weighs the ages
is *our reconstruction*. Sampling by ranking fidelity is ours.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Generator, Tensor

from lkd.config.meta_training import PoolSettings
from lkd.core.errors import UserError
from lkd.core.files import MALFORMED, read_json

AgeWeights = Callable[[Tensor, int], Tensor]
"""From the ages of the pool's students [N] and the number of the draw, from 0, to a weight for each student [N]."""


def build_age_weights(settings: PoolSettings) -> AgeWeights:
    """The weights that `sampling` gives to students by their age.

    Raises:
        UserError: If a setting of this sampling is impossible, or the fidelity file is not good.
    """
    if settings.sampling == "gaussian":
        mean, spread = settings.gaussian_age, settings.gaussian_spread
        return lambda ages, draw: (-((ages - mean) / spread).square() / 2).softmax(0)
    if settings.sampling == "fixed_step":
        return lambda ages, draw: (ages == ages.unique()[draw % len(ages.unique())]).double()
    if settings.sampling == "latest":
        return lambda ages, draw: (ages == ages.max()).double()
    if settings.sampling == "fidelity":
        known_ages, known_weights = read_fidelity(settings.fidelity_file)
        return lambda ages, draw: interpolate(ages, known_ages, known_weights)
    return lambda ages, draw: torch.ones_like(ages)


def draw_position(weights: Tensor, generator: Generator) -> int:
    """Draw a position with a probability in proportion to its weight, [N]."""
    return int(torch.multinomial(weights, 1, generator=generator))


def find_drawable_ages(age_weights: AgeWeights, ages: Tensor) -> Tensor:
    """The ages that can be drawn at all, in order."""
    weights = torch.stack([age_weights(ages, draw) for draw in range(len(ages.unique()))])
    return ages[weights.amax(0) > 0].unique()


def check_sampling(settings: PoolSettings, ages: Tensor) -> None:
    """Check that this pool can be drawn from.

    Args:
        settings: The sampling.
        ages: Of the pool's students, [N].

    Raises:
        UserError: If a setting is impossible, or the pool has no students where the sampling looks for them.
    """
    age_weights = build_age_weights(settings)
    youngest, oldest = float(ages.min()), float(ages.max())
    if settings.sampling == "gaussian" and not youngest <= settings.gaussian_age <= oldest:
        raise UserError(
            f"pool.gaussian_age: {settings.gaussian_age} is outside the pool, whose ages go from {youngest:g} to "
            f"{oldest:g}; choose one of them, or raise pool.max_age"
        )
    if not len(find_drawable_ages(age_weights, ages)):
        raise UserError(
            f"pool.fidelity_file: {settings.fidelity_file} gives no weight to any age of the pool "
            f"({youngest:g} to {oldest:g}); run `lkd fidelity` with the ages of this pool"
        )


def read_fidelity(path: str | None) -> tuple[Tensor, Tensor]:
    """Ages, increasing, and their weights, as `lkd fidelity` recommends them; both [A], float64.

    Raises:
        UserError: If the file is missing, or holds no weights by age.
    """
    if path is None:
        raise UserError("pool.fidelity_file: missing; sampling fidelity needs the fidelity.json of `lkd fidelity`")
    if not Path(path).is_file():
        raise UserError(f"pool.fidelity_file: {path}: no such file; `lkd fidelity` writes it")
    content = read_json(Path(path))
    try:
        pairs = torch.tensor(content["age_weights"], dtype=torch.float64).view(-1, 2)
    except MALFORMED:
        pairs = torch.empty(0, 2)
    pairs = pairs[pairs[:, 0].argsort()]
    repeated = (pairs[:, 0].diff() == 0).any()
    if not len(pairs) or not torch.isfinite(pairs).all() or (pairs[:, 1] < 0).any() or repeated:
        raise UserError(
            f"pool.fidelity_file: {path} has no `age_weights` [[age, weight of at least 0], ...], each age once; "
            "`lkd fidelity` writes such a file"
        )
    return pairs[:, 0].contiguous(), pairs[:, 1].contiguous()


def interpolate(points: Tensor, known: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear through (`known`, `values`), both [A], constant beyond both ends; [N] → [N]."""
    if len(known) == 1:
        return values.expand(len(points))
    after = torch.searchsorted(known, points).clamp(1, len(known) - 1)
    left, right = known[after - 1], known[after]
    share = ((points - left) / (right - left)).clamp(0, 1)
    return values[after - 1] + share * (values[after] - values[after - 1])
