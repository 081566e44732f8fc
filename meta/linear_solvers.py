"""H⁻¹ v from products with H alone."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Vector = list[Tensor]
Product = Callable[[Vector], Vector]


class Solution(NamedTuple):
    """What conjugate gradients found.

    Attributes:
        vector: The approximation of H⁻¹ v.
        iterations: Products that it took.
        residual: ‖v − H · vector‖ / ‖v‖, by the recurrence.
        least_curvature: The least dᵀHd / dᵀd over the directions d; not positive where H is not positive definite.
    """

    vector: Vector
    iterations: int
    residual: float
    least_curvature: float


def sum_neumann(apply_hessian: Product, start: Vector, terms: int, rate: float) -> Vector:
    """Return rate · Σ (1 − rate · H)ʲ start, j = 0 … terms."""
    term, total = start, start
    for _ in range(terms):
        term = [entry - rate * product for entry, product in zip(term, apply_hessian(term), strict=True)]
        total = [summed + entry for summed, entry in zip(total, term, strict=True)]
    return [rate * summed for summed in total]


def solve_conjugate_gradient(
    apply_hessian: Product, start: Vector, iterations: int, tolerance: float = 1e-15
) -> Solution:
    """Approximate H⁻¹ start.

    Args:
        apply_hessian: The product with H.
        start: The right-hand side; where it is zero, so is the solution.
        iterations: At most.
        tolerance: Relative residual at which it is done.
    """
    solution = [torch.zeros_like(entry) for entry in start]
    residual, direction = start, start
    first = energy = dot(residual, residual)
    if first == 0:
        return Solution(solution, 0, 0.0, float("nan"))
    curvatures = []
    for _ in range(iterations):
        product = apply_hessian(direction)
        bend = dot(direction, product)
        curvatures.append(bend / dot(direction, direction))
        if not bend.abs() > 0:  # none to go along, or not a number
            break
        length = energy / bend
        solution = [entry + length * step for entry, step in zip(solution, direction, strict=True)]
        residual = [entry - length * change for entry, change in zip(residual, product, strict=True)]
        previous, energy = energy, dot(residual, residual)
        if energy <= tolerance**2 * first:
            break
        direction = [entry + energy / previous * step for entry, step in zip(residual, direction, strict=True)]
    least = float(torch.stack(curvatures).min()) if curvatures else float("nan")  # min of a NaN is NaN
    return Solution(solution, len(curvatures), float((energy / first).sqrt()), least)


def dot(first: Vector, second: Vector) -> Tensor:
    """The inner product of two vectors."""
    return torch.stack([(left * right).sum() for left, right in zip(first, second, strict=True)]).sum()
