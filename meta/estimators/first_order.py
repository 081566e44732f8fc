"""The hypergradient by an adjoint walk whose second derivatives are differences of first-order gradients."""

from dataclasses import replace

import torch
from torch import Tensor

from meta.checks import check_differences, check_inputs
from meta.estimators.parts import collect, pull_back_settings, trace_fault
from meta.optim import Optimizer, build_optimizer
from meta.problem import Hypergradient, Problem
from meta.randomness import replaying
from meta.rollout import WayBack, differentiate, record
from meta.tensors import State, Tensors, add, as_leaves, global_norm
from meta.trajectory import Step, Storage, Trajectory
from meta.walk import outer_cotangents, walk_back

LEAST_SCALE = 1e-3  # root mean square of the parameters under which a perturbation is not shortened any more


def first_order(
    problem: Problem, *, radius: float = 3e-3, central: bool = False, storage: Storage = "memory"
) -> Hypergradient:
    """Walk the adjoint back; take each Hessian and mixed product as a difference of two gradients of the inner loss.

    No double backward: it works wherever the inner loss can be trained at all (fused attention, torch.compile,
    autocast, operations without a second derivative). Costs K gradient evaluations forward and K (`central`: 2K) back,
    and holds K parameters and gradients (`central`: parameters; optimiser state too where the update is not linear in
    it), no activations. Biased: O(`radius`) one-sided (sides change from step to step, so that most of it cancels),
    O(`radius`²) central, plus rounding over `radius`; across kinks (ReLU) the difference is the mean curvature over the
    step instead of the curvature almost everywhere. (DARTS, Liu et al. 2019, takes such a difference at one step.)

    Args:
        problem: The problem.
        radius: Length of the perturbation of the inner parameters, relative to their norm. That is taken for at least
            0.001 a parameter, in root mean square: a student may start at zero.
        central: Whether to step to both sides; otherwise the rollout's own gradient is one of the two.
        storage: How the K states are stored; see `meta.trajectory.Storage`.

    Raises:
        ValueError: The inputs are of less than float32, in which differences vanish.
    """
    check_inputs(problem)
    check_differences(problem, radius)
    problem = replace(problem, hyper=as_leaves(problem.hyper))
    optimizer = build_optimizer(problem.optimizer, problem.hyper)
    back: WayBack = "central difference" if central else "difference"
    trajectory = record(problem, optimizer, back, storage)
    return walk_trajectory(trajectory, problem, optimizer, radius=radius, central=central)


def walk_trajectory(
    trajectory: Trajectory, problem: Problem, optimizer: Optimizer, *, radius: float, central: bool
) -> Hypergradient:
    """Walk back over a trajectory of the problem that is already there; its `hyper` are leaves."""

    def pull_back(step: Step, cotangents: State, to_start: bool) -> tuple[State, Tensors]:
        adjoint = optimizer.adjoint(step.before, step.gradients, step.index, cotangents)
        curvature, mixed = _difference(problem, step, adjoint.gradients, radius, central, to_start)
        settings = pull_back_settings(adjoint.settings, problem.hyper)
        return State(add(adjoint.parameters, curvature), {}, adjoint.optimizer), add(mixed, settings)

    with torch.no_grad():
        value, cotangents = outer_cotangents(problem, trajectory.end)
        walk = walk_back(trajectory.steps, cotangents, pull_back)
    unused = problem.hyper.keys() - walk.grads.keys()
    if unused:
        unused -= {name for step in trajectory.steps for name in step.hyper_gradients}
    result = collect(value, walk.grads, problem.hyper, trajectory.end, unused, walk.norms)
    return trace_fault(result, problem, trajectory.steps)


def _difference(
    problem: Problem, step: Step, direction: Tensors, radius: float, central: bool, to_start: bool
) -> tuple[Tensors, Tensors]:
    """Difference the inner loss's gradients along `direction`.

    Returns:
        The Hessian product (empty if `to_start`: no one needs it) and the mixed product (empty where the step does not
        use the outer parameters).
    """
    if to_start and not step.hyper_gradients:
        return {}, {}
    parameters = step.before.parameters
    moving = {name: parameters[name] for name in direction}
    count = sum(tensor.numel() for tensor in moving.values())
    length = radius * global_norm(moving).clamp(min=LEAST_SCALE * count**0.5)
    side = 1 if step.index % 2 == 0 else -1  # sides change along the walk, so that the biases of one-sided ones cancel
    scale = side * length / global_norm(direction).clamp(min=1e-30)

    def gradients_at(scale: Tensor) -> tuple[Tensors, Tensors]:
        moved = parameters | {name: parameters[name] + scale * tensor for name, tensor in direction.items()}
        with replaying(step.generators):
            before = step.before._replace(parameters=moved)
            found = differentiate(problem, before, step.batch, parameters=not to_start, hyper=True)
        return found.parameters, found.hyper

    ahead = gradients_at(scale)
    behind = gradients_at(-scale) if central else (step.gradients, step.hyper_gradients)
    span = 2 * scale if central else scale
    curvature, mixed = (
        {name: (tensor - before[name]) / span for name, tensor in after.items()}
        for after, before in zip(ahead, behind, strict=True)
    )
    return curvature, mixed
