"""(H + damping)⁻¹ v at a network's weights, by several solvers."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lkd.balance.problem import Problem
from lkd.config import InfluenceSettings
from lkd.data import Batch, seeded_generator
from lkd.errors import UserError
from meta.linear_solvers import Vector, solve_conjugate_gradient, sum_neumann

DENSE_LIMIT = 2000  # parameters of the exact method
TOLERANCE = 1e-4  # relative residual at which conjugate gradients are done
RAISE = 10.0  # factor of the damping where the curvature is negative


class Inverse(NamedTuple):
    """(H + damping)⁻¹ v, and how it was got; see `lkd.balance.influence.Influence`."""

    vector: Vector
    damping: float
    least_curvature: float = math.nan
    residual: float = math.nan


def skip_curvature(problem: Problem, start: Vector, settings: InfluenceSettings, seed: int) -> Inverse:
    """The identity in the place of the inverse."""
    return Inverse(start, math.nan)


def solve_dense(problem: Problem, start: Vector, settings: InfluenceSettings, seed: int) -> Inverse:
    """Invert the dense matrix, in float64."""
    if problem.size > DENSE_LIMIT:
        raise UserError(
            f"influence.method: exact inverts a dense matrix of at most {DENSE_LIMIT:,} parameters, not "
            f"{problem.size:,}; choose some with influence.parameters, or take conjugate_gradient"
        )
    batches = list(problem.load(problem.train, draw_examples(problem, settings, seed)))
    columns = []
    for unit in torch.eye(problem.size, dtype=start[0].dtype, device=start[0].device):
        product = problem.multiply_mean(split_like(unit, start), batches, settings.curvature)
        columns.append(join(product))
    matrix = torch.stack(columns).double()
    matrix = (matrix + matrix.T) / 2
    least = float(torch.linalg.eigvalsh(matrix)[0])
    damping = settings.damping
    while least + damping <= 0:
        damping = RAISE * max(damping, 1e-6)
    damped = matrix + damping * torch.eye(problem.size, dtype=torch.float64, device=matrix.device)
    solution = torch.linalg.solve(damped, join(start).double())
    return Inverse(split_like(solution.to(start[0].dtype), start), damping, least)


def solve_iteratively(problem: Problem, start: Vector, settings: InfluenceSettings, seed: int) -> Inverse:
    """Conjugate gradients; the damping is raised until no negative curvature is met."""
    batches = list(problem.load(problem.train, draw_examples(problem, settings, seed)))
    damping, least = settings.damping, math.inf
    while True:
        product = damp(lambda vector: problem.multiply_mean(vector, batches, settings.curvature), damping)
        found = solve_conjugate_gradient(product, start, settings.iterations, TOLERANCE)
        least = min(least, found.least_curvature - damping)
        if not found.least_curvature <= 0:
            return Inverse(found.vector, damping, least, found.residual)
        damping = RAISE * max(damping, 1e-6)


def sum_stochastically(problem: Problem, start: Vector, settings: InfluenceSettings, seed: int) -> Inverse:
    """LiSSA (Agarwal, Bullins, Hazan, 2017): a Neumann series, each term with the curvature of another batch."""
    batches = draw_batches(problem, settings, seed)
    product = damp(lambda vector: problem.multiply_mean(vector, [next(batches)], settings.curvature), settings.damping)
    return Inverse(sum_neumann(product, start, settings.iterations, settings.step_size), settings.damping)


SOLVERS: dict[str, Callable[[Problem, Vector, InfluenceSettings, int], Inverse]] = {
    "conjugate_gradient": solve_iteratively,
    "exact": solve_dense,
    "lissa": sum_stochastically,
    "gradient_similarity": skip_curvature,
}


def damp(product: Callable[[Vector], Vector], damping: float) -> Callable[[Vector], Vector]:
    """The product with H + damping."""
    return lambda vector: [new + damping * old for new, old in zip(product(vector), vector, strict=True)]


def draw_examples(problem: Problem, settings: InfluenceSettings, seed: int) -> Tensor:
    """Positions of the training images that the curvature is taken over."""
    order = torch.randperm(len(problem.train), generator=seeded_generator(seed, 11))
    return order[: settings.curvature_examples] if settings.curvature_examples else order


def draw_batches(problem: Problem, settings: InfluenceSettings, seed: int) -> Iterator[Batch]:
    """Shuffled batches of the training images, without end."""
    for epoch in itertools.count():
        order = torch.randperm(len(problem.train), generator=seeded_generator(seed, 12, epoch))
        yield from problem.load(problem.train, order)


def join(vector: Vector) -> Tensor:
    """A vector as one tensor, [P]."""
    return torch.cat([entry.flatten() for entry in vector])


def split_like(flat: Tensor, vector: Vector) -> Vector:
    """The inverse of `join`."""
    parts = flat.split([entry.numel() for entry in vector])
    return [part.view_as(entry) for part, entry in zip(parts, vector, strict=True)]
