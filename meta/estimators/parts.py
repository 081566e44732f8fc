"""What estimators share: pulling optimiser settings back to the outer parameters, and the result put together."""

from collections.abc import Iterable

import torch
from torch import Tensor

from meta.checks import check_used
from meta.problem import Hypergradient, Problem
from meta.randomness import replaying
from meta.rollout import differentiate, drop_missing
from meta.tensors import State, Tensors, add, global_norm
from meta.trajectory import Step


def pull_back_settings(settings: list[tuple[Tensor, Tensor]], leaves: Tensors) -> Tensors:
    """Pull cotangents of optimiser settings back to the outer parameters that the settings were made of."""
    grads: Tensors = {}
    for setting, cotangent in settings:
        if setting.requires_grad:
            # Settings may share a graph, and one setting serves every step.
            found = torch.autograd.grad(setting, list(leaves.values()), cotangent, allow_unused=True, retain_graph=True)
            grads = add(grads, drop_missing(leaves, found))
    return grads


def find_fault(problem: Problem, steps: Iterable[Step], end: State) -> str | None:
    """Name the first tensor of a trajectory that is not finite, or None if all are; takes the gradients again."""
    for step in steps:
        with replaying(step.generators):
            gradients = differentiate(problem, step.before, step.batch).parameters
        for kind, tensors in (("parameter", step.before.parameters), ("gradient of", gradients)):
            for name, tensor in tensors.items():
                if not torch.isfinite(tensor).all():
                    return f"inner step {step.index}: {kind} {name!r}"
    faults = (name for name, tensor in end.parameters.items() if not torch.isfinite(tensor).all())
    return next((f"end of the rollout: parameter {name!r}" for name in faults), None)


def is_finite(hypergradient: Hypergradient) -> bool:
    """Whether the outer value and the hypergradient are finite."""
    return bool(torch.isfinite(hypergradient.norm + hypergradient.outer_value))


def collect(
    value: Tensor,
    grads: Tensors,
    hyper: Tensors,
    final_state: State,
    unused: Iterable[str],
    adjoint_norms: Tensor | None = None,
) -> Hypergradient:
    """Put an estimator's result together; an outer parameter that was used but has no gradient gets zeros.

    Raises:
        ValueError: There is an unused outer parameter.
    """
    check_used(unused)
    found = {
        name: grads[name].detach() if name in grads else torch.zeros_like(tensor.detach())
        for name, tensor in hyper.items()
    }
    return Hypergradient(value.detach(), found, final_state.detach(), global_norm(found), adjoint_norms)
