"""Inner training: K steps of an inner optimiser, with or without a graph behind them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from meta.checks import check_inputs, check_scalar
from meta.optim import Optimizer, OptimizerOrRecipe, build_optimizer
from meta.types import InnerLoss, State, Tensors


def rollout(
    inner_loss: InnerLoss, state: State, hyper: Tensors, inner_batches: Sequence[Any], optimizer: OptimizerOrRecipe
) -> State:
    """Train for `len(inner_batches)` steps and return the state reached, detached.

    Args:
        inner_loss: The loss that is descended.
        state: Where to start; it is not written to.
        hyper: The outer parameters.
        inner_batches: One batch a step.
        optimizer: The inner optimiser, or a function of `hyper` that returns one.

    Raises:
        ValueError: There is no step to take, or the loss cannot be differentiated with respect to the parameters.
    """
    check_inputs(state, hyper, inner_batches)
    hyper = {name: tensor.detach() for name, tensor in hyper.items()}
    built = build_optimizer(optimizer, hyper)
    state = state.detach()
    for step, batch in enumerate(inner_batches):
        gradients, buffers = differentiate(inner_loss, state, hyper, batch)
        with torch.no_grad():
            parameters, slots = built.update(state.parameters, gradients, state.optimizer, step)
        state = State(parameters, buffers, slots)
    return state


def differentiate(inner_loss: InnerLoss, state: State, hyper: Tensors, batch: Any) -> tuple[Tensors, Tensors]:
    """Return the inner loss's gradients with respect to the parameters, and the buffers after the step.

    Parameters that the loss does not reach are left out of the gradients.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in state.parameters.items()}
    with torch.enable_grad():
        loss, buffers = inner_loss(leaves, state.buffers, hyper, batch)
    check_scalar("inner", loss)
    return _named_gradients(loss, leaves, create_graph=False), _detach(buffers)


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
    """
    losses = []
    for step, batch in enumerate(inner_batches, start=first_step):
        loss, buffers = inner_loss(state.parameters, state.buffers, hyper, batch)
        check_scalar("inner", loss)
        gradients = _named_gradients(loss, state.parameters, create_graph=True)
        parameters, slots = optimizer.update(state.parameters, gradients, state.optimizer, step)
        state = State(parameters, _detach(buffers), slots)
        losses.append(loss)
    return state, losses


def _named_gradients(loss: Tensor, parameters: Tensors, create_graph: bool) -> Tensors:
    gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=create_graph, allow_unused=True)
    named = {name: gradient for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
    if not named:
        raise ValueError("the inner loss does not depend on any inner parameter it was given")
    return named


def _detach(tensors: Tensors) -> Tensors:
    return {name: tensor.detach() for name, tensor in tensors.items()}
