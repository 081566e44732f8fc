"""Inner training: K steps of an inner optimiser, and the trajectory they leave."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from meta.checks import check_inputs, check_scalar, check_twice_differentiable
from meta.optim import Optimizer, OptimizerOrRecipe, build_optimizer
from meta.randomness import read_generators
from meta.trajectory import Step, Storage, StoredSteps, Trajectory, without_values
from meta.types import InnerLoss, State, Tensors

WayBack = Literal["graph", "difference", "central difference"]
"""How steps are walked back: taken again with their graph, or by differences of gradients to one side or to both."""


class Derivatives(NamedTuple):
    """First-order derivatives of the inner loss; names that the loss does not reach are left out."""

    parameters: Tensors
    hyper: Tensors
    buffers: Tensors


def rollout(
    inner_loss: InnerLoss, state: State, hyper: Tensors, inner_batches: Sequence[Any], optimizer: OptimizerOrRecipe
) -> State:
    """Train for `len(inner_batches)` steps and return the state reached, detached.

    Args:
        inner_loss: The loss that is descended.
        state: Where to start; it is not written to.
        hyper: The outer parameters; empty where the loss has none.
        inner_batches: One batch a step.
        optimizer: The inner optimiser, or a function of `hyper` that returns one.

    Raises:
        ValueError: There is no step to take, or the loss cannot be differentiated with respect to the parameters.
    """
    check_inputs(state, hyper or None, inner_batches)
    hyper = {name: tensor.detach() for name, tensor in hyper.items()}
    built = build_optimizer(optimizer, hyper)
    state = state.detach()
    for index, batch in enumerate(inner_batches):
        derivatives = differentiate(inner_loss, state, hyper, batch)
        with torch.no_grad():
            parameters, slots = built.update(state.parameters, derivatives.parameters, state.optimizer, index)
        state = State(parameters, derivatives.buffers, slots)
    return state


def record(
    inner_loss: InnerLoss,
    state: State,
    hyper: Tensors,
    inner_batches: Sequence[Any],
    optimizer: Optimizer,
    back: WayBack,
    storage: Storage = "memory",
) -> Trajectory:
    """Train as `rollout` does and keep of every step what the walk back needs; no graph is kept.

    Args:
        inner_loss: The loss that is descended.
        state: Where to start; it is not written to.
        hyper: The outer parameters.
        inner_batches: One batch a step.
        optimizer: The inner optimiser.
        back: How the steps will be walked back.
        storage: How the steps are stored.

    Raises:
        ValueError: The loss is no scalar, depends on no parameter, or cannot be differentiated twice; or there is no
            such storage.
    """
    detached = {name: tensor.detach() for name, tensor in hyper.items()}
    state = state.detach()
    steps = StoredSteps(storage, max(1, len(inner_batches)))
    for index, batch in enumerate(inner_batches):
        generators = read_generators(state.parameters)
        by_graph = back == "graph"
        derivatives = differentiate(
            inner_loss, state, detached, batch, hyper=not by_graph, twice=by_graph and not steps
        )
        step = Step(index, state, batch, generators, derivatives.parameters, derivatives.hyper)
        steps.append(_strip(step, back, optimizer.reads_values(index)))
        with torch.no_grad():
            parameters, slots = optimizer.update(state.parameters, derivatives.parameters, state.optimizer, index)
        state = State(parameters, derivatives.buffers, slots)
    return Trajectory(steps, state)


def differentiate(
    inner_loss: InnerLoss,
    state: State,
    hyper_values: Tensors,
    batch: Any,
    *,
    parameters: bool = True,
    hyper: bool = False,
    twice: bool = False,
) -> Derivatives:
    """Differentiate the inner loss once, with respect to the parameters, the outer parameters, or both; keep no graph.

    Args:
        inner_loss: The loss.
        state: The parameters and buffers to evaluate it at.
        hyper_values: The outer parameters.
        batch: The batch.
        parameters: Whether to differentiate with respect to the parameters.
        hyper: Whether to differentiate with respect to the outer parameters.
        twice: Whether to check that the loss can be differentiated once more.

    Raises:
        ValueError: The loss is no scalar, depends on no parameter, or cannot be differentiated twice.
    """
    inner = {name: tensor.detach().requires_grad_(parameters) for name, tensor in state.parameters.items()}
    outer = {name: tensor.detach().requires_grad_(hyper) for name, tensor in hyper_values.items()}
    inner_targets, outer_targets = inner if parameters else {}, outer if hyper else {}
    with torch.enable_grad():
        loss, buffers = inner_loss(inner, state.buffers, outer, batch)
        check_scalar("inner", loss)
        targets = [*inner_targets.values(), *outer_targets.values()]
        found = torch.autograd.grad(loss, targets, create_graph=twice, allow_unused=True)
    inner_gradients = _drop_missing(inner_targets, found[: len(inner_targets)])
    outer_gradients = _drop_missing(outer_targets, found[len(inner_targets) :])
    if parameters and not inner_gradients:
        raise ValueError("the inner loss does not depend on any inner parameter that it was given")
    if twice:
        check_twice_differentiable(inner_gradients.values())
        inner_gradients, outer_gradients = _detach(inner_gradients), _detach(outer_gradients)
    return Derivatives(inner_gradients, outer_gradients, _detach(buffers))


def unroll(
    inner_loss: InnerLoss,
    state: State,
    hyper: Tensors,
    inner_batches: Sequence[Any],
    optimizer: Optimizer,
    first_step: int = 0,
) -> tuple[State, list[Tensor]]:
    """Train as `rollout` does and keep the graph from the state reached back to `state` and `hyper`.

    Buffers are constants to the derivative, as BatchNorm's statistics are in autograd.

    Args:
        inner_loss: The loss that is descended.
        state: Where to start. Its parameters must require gradients.
        hyper: The outer parameters; those to differentiate must require gradients.
        inner_batches: One batch a step.
        optimizer: The inner optimiser.
        first_step: The step within the rollout that the first batch belongs to, for schedules.

    Returns:
        The state reached and each step's inner loss, all with their graph.

    Raises:
        ValueError: A loss is no scalar, depends on no parameter, or cannot be differentiated twice.
    """
    losses = []
    for index, batch in enumerate(inner_batches, start=first_step):
        loss, buffers = inner_loss(state.parameters, state.buffers, hyper, batch)
        check_scalar("inner", loss)
        found = torch.autograd.grad(loss, list(state.parameters.values()), create_graph=True, allow_unused=True)
        gradients = _drop_missing(state.parameters, found)
        if not gradients:
            raise ValueError("the inner loss does not depend on any inner parameter that it was given")
        if index == 0:
            check_twice_differentiable(gradients.values())
        parameters, slots = optimizer.update(state.parameters, gradients, state.optimizer, index)
        state = State(parameters, _detach(buffers), slots)
        losses.append(loss)
    return state, losses


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


def _drop_missing(targets: Tensors, gradients: Sequence[Tensor | None]) -> Tensors:
    return {name: gradient for name, gradient in zip(targets, gradients, strict=True) if gradient is not None}


def _detach(tensors: Tensors) -> Tensors:
    return {name: tensor.detach() for name, tensor in tensors.items()}
