"""The walk back over a trajectory that every adjoint estimator shares."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from meta.checks import check_scalar
from meta.optim import evaluation_parameters
from meta.problem import Problem
from meta.tensors import State, Tensors, add, as_leaves, global_norm

Segment = TypeVar("Segment")

PullBack = Callable[[Segment, State, bool], tuple[State, Tensors]]
"""`pull_back(segment, cotangents, to_start) -> (cotangents, hypergradient of the segment)`.

Takes the cotangents of the state after a segment of steps to those of the state before it. Where `to_start` is true
only the hypergradient is wanted. Outer parameters that the segment does not reach are left out."""


class Walk(NamedTuple):
    """What a walk back found.

    Attributes:
        grads: The hypergradient; names that no step used are left out.
        norms: Norm of the parameters' cotangents at every state of the walk, the last state first.
    """

    grads: Tensors
    norms: Tensor


def outer_cotangents(problem: Problem, end: State) -> tuple[Tensor, State]:
    """Return the outer loss at the end of a rollout, and its cotangents with respect to the state there."""
    parameters = as_leaves(evaluation_parameters(end))
    with torch.enable_grad():
        value = problem.outer_loss(parameters, end.buffers, problem.outer_batch)
        check_scalar("outer", value)
        found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    if all(gradient is None for gradient in found):
        raise ValueError("the outer loss does not depend on the inner parameters it was given")
    cotangents = {
        name: torch.zeros_like(tensor) if gradient is None else gradient
        for (name, tensor), gradient in zip(parameters.items(), found, strict=True)
    }
    average = {name: cotangents[name] for name in end.optimizer.get("average", {})}
    plain = {name: torch.zeros_like(x) if name in average else x for name, x in cotangents.items()}
    return value.detach(), State(plain, {}, {"average": average} if average else {})


def walk_back(segments: Sequence[Segment], cotangents: State, pull_back: PullBack[Segment]) -> Walk:
    """Carry cotangents from the end of a trajectory to its start and collect the hypergradient on the way."""
    grads: Tensors = {}
    norms = [global_norm(cotangents.parameters)]
    for position in reversed(range(len(segments))):
        to_start = position == 0
        cotangents, found = pull_back(segments[position], cotangents, to_start)
        grads = add(grads, found)
        if not to_start:
            norms.append(global_norm(cotangents.parameters))
    return Walk(grads, torch.stack(norms))
