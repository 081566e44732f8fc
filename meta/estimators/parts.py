"""What estimators share: pulling optimiser settings back to the outer parameters, and the result put together."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from meta.checks import UnusedError
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


def trace_fault(result: Hypergradient, problem: Problem, steps: Iterable[Step]) -> Hypergradient:
    """Let a result that is not finite name the first tensor of these steps that is not; takes the gradients again."""
    for step in steps if result.fault else ():
        with replaying(step.generators):
            gradients = differentiate(problem, step.before, step.batch).parameters
        for kind, tensors in (("parameter", step.before.parameters), ("gradient of", gradients)):
            for name, tensor in tensors.items():
                if not torch.isfinite(tensor).all():
                    return result._replace(fault=f"inner step {step.index}: {kind} {name!r}")
    return result


def _name_fault(result: Hypergradient) -> str:
    """Name the first thing that is not finite of what an estimator returns."""
    for kind, tensors in (
        ("end of the rollout: parameter", result.final_state.parameters),
        ("end of the rollout: buffer", result.final_state.buffers),
    ):
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                return f"{kind} {name!r}"
    if not torch.isfinite(result.outer_value):
        return "the outer loss"
    norms = [] if result.adjoint_norms is None else result.adjoint_norms.tolist()
    for steps_back, norm in enumerate(norms):
        if not math.isfinite(norm):
            return f"gradient of the outer loss, carried {steps_back} steps back"
    names = [name for name, gradient in result.grads.items() if not torch.isfinite(gradient).all()]
    return f"hypergradient of {names[0]!r}" if names else "norm of the hypergradient"


def collect(
    value: Tensor,
    grads: Tensors,
    hyper: Tensors,
    final_state: State,
    unused: Iterable[str],
    adjoint_norms: Tensor | None = None,
) -> Hypergradient:
    """Put an estimator's result together; an outer parameter that was used but has no gradient gets zeros.

    A result that is not finite names its fault.
    """
    if unused := list(unused):
        raise UnusedError(unused)
    found = {
        name: grads[name].detach() if name in grads else torch.zeros_like(tensor.detach())
        for name, tensor in hyper.items()
    }
    result = Hypergradient(value.detach(), found, final_state.detach(), global_norm(found), adjoint_norms)
    finite = bool(torch.isfinite(result.norm + result.outer_value))
    return result if finite else result._replace(fault=_name_fault(result))
