"""What the estimators share: leaves to differentiate, the outer loss's derivative, and the result put together."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from meta.checks import check_scalar, check_used, find_unused
from meta.types import Hypergradient, OuterLoss, State, Tensors


def as_leaves(tensors: Tensors) -> Tensors:
    """Copy the tensors' handles to new leaves that require gradients; memory is shared, graphs are not."""
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


def differentiate_outer(
    outer_loss: OuterLoss, state: State, targets: Tensors, batch: Any
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Evaluate the outer loss at `state` and differentiate it with respect to `targets` through the graph there is.

    Returns:
        The outer loss and, for every target, its gradient, or None where no graph leads to it.

    Raises:
        ValueError: The outer loss is no scalar, or does not depend on the state's parameters.
    """
    value = outer_loss(state.parameters, state.buffers, batch)
    check_scalar("outer", value)
    parameters = list(state.parameters.values())
    gradients = torch.autograd.grad(value, [*targets.values(), *parameters], allow_unused=True)
    if all(gradient is None for gradient in gradients[len(targets) :]):
        raise ValueError("the outer loss does not depend on the inner parameters it was given")
    return value, dict(zip(targets, gradients, strict=False))


def collect(
    value: Tensor, grads: dict[str, Tensor | None], leaves: Tensors, final_state: State, losses: Sequence[Tensor]
) -> Hypergradient:
    """Put an estimator's result together; an outer parameter without a gradient gets zeros if some inner loss uses it.

    Raises:
        ValueError: An outer parameter that no inner loss uses.
    """
    without = {name: leaves[name] for name, gradient in grads.items() if gradient is None}
    check_used(find_unused(losses, without))
    found = {
        name: torch.zeros_like(leaves[name]) if gradient is None else gradient.detach()
        for name, gradient in grads.items()
    }
    return Hypergradient(value.detach(), found, final_state.detach(), global_norm(found))


def global_norm(tensors: Tensors) -> Tensor:
    """Return the 2-norm of all the tensors taken as one vector."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors.values()]))
