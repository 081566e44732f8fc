"""Inner training: K steps of an inner optimiser, and the trajectory they leave."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from meta.checks import check_inputs, check_scalar, check_step, check_twice_differentiable
from meta.optim import Optimizer, build_optimizer
from meta.problem import Problem
from meta.randomness import read_generators
from meta.tensors import State, Tensors, detach
from meta.trajectory import Step, Storage, StoredSteps, Trajectory, without_values

WayBack = Literal["graph", "difference", "central difference"]
"""How steps are walked back: taken again with their graph, or by differences of gradients to one side or to both."""


class Derivatives(NamedTuple):
    """First-order derivatives of the inner loss; names that the loss does not reach are left out."""

    parameters: Tensors
    hyper: Tensors
    buffers: Tensors


def take_inner_loss(
    problem: Problem, parameters: Tensors, buffers: Tensors, hyper: Tensors, batch: Any
) -> tuple[Tensor, Tensors]:
    """Call the inner loss; return it and the buffers after it."""
    returned = problem.inner_loss(parameters, buffers, hyper, batch)
    if not (isinstance(returned, tuple | list) and len(returned) == 2 and isinstance(returned[1], Mapping)):
        parts = returned if isinstance(returned, tuple | list) else [returned]
        raise ValueError(
            "inner_loss has to return (loss, buffers), the buffers as a dict, {} where there are none; it returned "
            f"({', '.join(type(part).__name__ for part in parts)})"
        )
    loss, updated = returned
    check_scalar("inner", loss)
    return loss, dict(updated)


def rollout(problem: Problem) -> State:
    """Take a problem's inner steps and return the state reached, detached; there need be no outer parameters."""
    check_inputs(problem, needs_hyper=False)
    problem = replace(problem, hyper=detach(problem.hyper))
    optimizer = build_optimizer(problem.optimizer, problem.hyper)
    state = problem.state.detach()
    for index, batch in enumerate(problem.inner_batches):
        state = _step(optimizer, state, differentiate(problem, state, batch), index)
    return state


def record(problem: Problem, optimizer: Optimizer, back: WayBack, storage: Storage = "memory") -> Trajectory:
    """Train as `rollout` does and keep of every step what the walk back needs; no graph is kept."""
    problem = replace(problem, hyper=detach(problem.hyper))
    state = problem.state.detach()
    steps = StoredSteps(storage, max(1, len(problem.inner_batches)))
    by_graph = back == "graph"
    for index, batch in enumerate(problem.inner_batches):
        generators = read_generators(state.parameters)
        derivatives = differentiate(problem, state, batch, hyper=not by_graph, twice=by_graph and not steps)
        step = Step(index, state, batch, generators, derivatives.parameters, derivatives.hyper)
        steps.append(_strip(step, back, optimizer.reads_values(index)))
        state = _step(optimizer, state, derivatives, index)
    return Trajectory(steps, state)


def differentiate(
    problem: Problem, state: State, batch: Any, *, parameters: bool = True, hyper: bool = False, twice: bool = False
) -> Derivatives:
    """Differentiate the inner loss once, with respect to the parameters, the outer parameters, or both; keep no graph.

    `twice`: whether to check that the loss can be differentiated once more.
    """
    inner = {name: tensor.detach().requires_grad_(parameters) for name, tensor in state.parameters.items()}
    outer = {name: tensor.detach().requires_grad_(hyper) for name, tensor in problem.hyper.items()}
    inner_targets, outer_targets = inner if parameters else {}, outer if hyper else {}
    with torch.enable_grad():
        loss, buffers = take_inner_loss(problem, inner, state.buffers, outer, batch)
        targets = [*inner_targets.values(), *outer_targets.values()]
        found = torch.autograd.grad(loss, targets, create_graph=twice, allow_unused=True)
    inner_gradients = drop_missing(inner_targets, found[: len(inner_targets)])
    outer_gradients = drop_missing(outer_targets, found[len(inner_targets) :])
    if parameters and not inner_gradients:
        raise ValueError("the inner loss does not depend on any inner parameter that it was given")
    if twice:
        check_twice_differentiable(inner_gradients.values())
        inner_gradients, outer_gradients = detach(inner_gradients), detach(outer_gradients)
    return Derivatives(inner_gradients, outer_gradients, detach(buffers))


def unroll(problem: Problem, optimizer: Optimizer, first_step: int = 0) -> tuple[State, list[Tensor]]:
    """Train as `rollout` does and keep the graph from the state reached back to the problem's state and `hyper`.

    Buffers are constants to the derivative, as BatchNorm's statistics are in autograd.

    Args:
        problem: The problem; its parameters must require gradients, and of `hyper` those to differentiate.
        optimizer: Its inner optimiser, built.
        first_step: The step within the rollout that the first batch belongs to, for schedules.

    Returns:
        The state reached and each step's inner loss, all with their graph.
    """
    state, losses = problem.state, []
    for index, batch in enumerate(problem.inner_batches, start=first_step):
        loss, buffers = take_inner_loss(problem, state.parameters, state.buffers, problem.hyper, batch)
        found = torch.autograd.grad(loss, list(state.parameters.values()), create_graph=True, allow_unused=True)
        gradients = drop_missing(state.parameters, found)
        if not gradients:
            raise ValueError("the inner loss does not depend on any inner parameter that it was given")
        if index == 0:
            check_twice_differentiable(gradients.values())
        before, state = state, optimizer.update(state, gradients, index)._replace(buffers=detach(buffers))
        check_step(before.parameters, state.parameters)
        losses.append(loss)
    return state, losses


def drop_missing(targets: Tensors, gradients: Sequence[Tensor | None]) -> Tensors:
    """Name what `torch.autograd.grad` found for these targets, and leave out what it did not reach."""
    return {name: gradient for name, gradient in zip(targets, gradients, strict=True) if gradient is not None}


@torch.no_grad()
def _step(optimizer: Optimizer, state: State, derivatives: Derivatives, index: int) -> State:
    after = optimizer.update(state, derivatives.parameters, index)._replace(buffers=derivatives.buffers)
    check_step(state.parameters, after.parameters)
    return after


def _strip(step: Step, back: WayBack, reads_values: bool) -> Step:
    """Leave out the values that the walk back does not read; the names stay."""
    gradients, hyper_gradients, slots = step.gradients, step.hyper_gradients, step.before.optimizer
    if back == "graph" or (back == "central difference" and not reads_values):
        gradients = without_values(gradients)
    if back == "central difference":
        hyper_gradients = without_values(hyper_gradients)
    if back != "graph" and not reads_values:
        slots = {slot: without_values(tensors) for slot, tensors in slots.items()}
    before = step.before._replace(optimizer=slots)
    return replace(step, before=before, gradients=gradients, hyper_gradients=hyper_gradients)
