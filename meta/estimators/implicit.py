"""The hypergradient by the implicit function theorem at the rollout's end."""

from typing import Literal

import torch

from meta.checks import check_inputs, check_twice_differentiable, find_unused
from meta.estimators.parts import collect
from meta.linear_solvers import Vector, solve_conjugate_gradient, sum_neumann
from meta.optim import SGD, Adam, AdamW, build_optimizer, evaluation_parameters, setting_at
from meta.problem import Hypergradient, Problem
from meta.randomness import read_generators, replaying
from meta.rollout import drop_missing, rollout, take_inner_loss
from meta.tensors import as_leaves
from meta.walk import outer_cotangents


def implicit(
    problem: Problem,
    *,
    solver: Literal["neumann", "conjugate_gradient"] = "neumann",
    terms: int = 10,
    step_size: float | None = None,
    damping: float = 0.0,
) -> Hypergradient:
    """Take the end of the rollout for a stationary point and apply the implicit function theorem there.

    −∂²L/∂φ∂θ · H⁻¹ · ∂(outer loss)/∂θ, with H⁻¹ by a Neumann series (Lorraine et al. 2020) or by conjugate gradients
    (Pedregosa 2016), on the last inner batch. Exact only where the gradient of that batch's loss plus the weight decay
    vanishes, H is positive definite (`damping` may help), and the solver has converged (Neumann: `step_size` times the
    largest eigenvalue below 2). A learned loss on a network that is still training fulfils none of the three: then the
    result can even point the wrong way. Costs K gradient evaluations and about two for each term; memory of one step's
    double graph.

    Args:
        problem: The problem.
        solver: How the inverse Hessian is applied.
        terms: Terms of the series after the first, or iterations of conjugate gradients.
        step_size: Of the Neumann series; None takes the learning rate of the last step.
        damping: Added to the Hessian's diagonal.

    Raises:
        ValueError: The optimiser's stationary points are not those of the loss with an L2 penalty (anything but SGD
            and Adam), or the solver is unknown.
    """
    check_inputs(problem)
    leaves = as_leaves(problem.hyper)
    built = build_optimizer(problem.optimizer, leaves)
    if not isinstance(built, SGD | Adam) or isinstance(built, AdamW):
        raise ValueError(f"estimator 'implicit' supports SGD and Adam, not {type(built).__name__}")
    if solver not in ("neumann", "conjugate_gradient"):
        raise ValueError(f"unknown solver {solver!r}: neumann or conjugate_gradient")
    if terms < 1:
        raise ValueError(f"terms: {terms} is not at least 1")
    end = rollout(problem)
    value, cotangents = outer_cotangents(problem, end)

    with replaying(read_generators(end.parameters)), torch.enable_grad():
        point = as_leaves(evaluation_parameters(end))
        loss, _ = take_inner_loss(problem, point, end.buffers, leaves, problem.inner_batches[-1])
        found = torch.autograd.grad(loss, list(point.values()), create_graph=True, allow_unused=True)
        check_twice_differentiable(found)
        reached = [name for name, gradient in zip(point, found, strict=True) if gradient is not None]
        residual = [
            gradient + built.weight_decay * tensor
            for gradient, tensor in zip(found, point.values(), strict=True)
            if gradient is not None
        ]
    sought = evaluation_parameters(cotangents)
    targets, start = [point[name] for name in reached], [sought[name] for name in reached]

    def apply_hessian(vector: Vector) -> Vector:
        products = torch.autograd.grad(residual, targets, vector, retain_graph=True, materialize_grads=True)
        return [product + damping * entry for product, entry in zip(products, vector, strict=True)]

    if solver == "neumann":
        rate = (
            float(setting_at(built.learning_rate, len(problem.inner_batches) - 1)) if step_size is None else step_size
        )
        solution = sum_neumann(apply_hessian, start, terms, rate)
    else:
        solution = solve_conjugate_gradient(apply_hessian, start, terms).vector
    mixed = torch.autograd.grad(residual, list(leaves.values()), solution, allow_unused=True)
    grads = {name: -product for name, product in drop_missing(leaves, mixed).items()}
    unused = find_unused([loss], {name: leaf for name, leaf in leaves.items() if name not in grads})
    return collect(value, grads, leaves, end, unused)
