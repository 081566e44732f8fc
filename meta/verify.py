"""An estimator against finite differences of the outer objective."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from meta.checks import check_inputs
from meta.problem import Estimator, Problem
from meta.rollout import rollout
from meta.tensors import Tensors, global_norm


class Verification(NamedTuple):
    """Directional derivatives of the outer objective, two ways.

    Attributes:
        estimated: Hypergradient · direction, one entry per direction.
        measured: Central difference of the outer objective along the same directions.
        relative_error: ‖estimated − measured‖ / ‖measured‖; 0 where both vanish.
    """

    estimated: Tensor
    measured: Tensor
    relative_error: float


def verify(
    estimator: Estimator, problem: Problem, *, directions: int = 4, step_size: float = 1e-5, seed: int = 0
) -> Verification:
    """Compare an estimator with central differences of the outer objective along random unit directions, in float64.

    Every floating-point tensor of the state, the outer parameters and the batches is converted; tensors that the losses
    close over are the caller's to convert. Random numbers drawn by the losses are the same in every evaluation. Costs
    2 · `directions` rollouts. Kinks (ReLU, max-pooling) and chaotic rollouts disturb the differences, not the
    estimator: then try another `step_size`.

    Args:
        estimator: The estimator to test.
        problem: The problem to test it on.
        directions: How many directions to try.
        step_size: Distance from `hyper` to either side, in units of max(1, ‖hyper‖).
        seed: Seed of the directions and of the random numbers that the losses draw.
    """
    check_inputs(problem)
    names = ("state", "hyper", "inner_batches", "outer_batch")
    problem = replace(problem, **{name: tree_map(_to_float64, getattr(problem, name)) for name in names})
    hyper = problem.hyper
    distance = step_size * max(1.0, global_norm(hyper).item())
    generator = torch.Generator().manual_seed(seed)

    def objective(shifted: Tensors) -> Tensor:
        torch.manual_seed(seed)
        return problem.evaluate(rollout(replace(problem, hyper=shifted))).detach()

    estimated, measured = [], []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        grads = estimator(problem).grads
        for _ in range(directions):
            direction = _random_unit(hyper, generator)
            ahead = objective({name: tensor + distance * direction[name] for name, tensor in hyper.items()})
            behind = objective({name: tensor - distance * direction[name] for name, tensor in hyper.items()})
            measured.append((ahead - behind) / (2 * distance))
            estimated.append(sum(((grads[name] * direction[name]).sum() for name in hyper), torch.zeros_like(ahead)))
    estimates, measurements = torch.stack(estimated), torch.stack(measured)
    error = torch.linalg.vector_norm(estimates - measurements)
    relative = error / torch.linalg.vector_norm(measurements) if error != 0 else error
    return Verification(estimates, measurements, relative.item())


def _to_float64(leaf: Any) -> Any:
    return leaf.detach().double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _random_unit(like: Tensors, generator: torch.Generator) -> Tensors:
    drawn = {
        name: torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
        for name, tensor in like.items()
    }
    norm = global_norm(drawn)
    return {name: tensor / norm for name, tensor in drawn.items()}
