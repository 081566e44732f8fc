"""The hypergradient by the library `higher`: the reference that others know."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from meta.checks import check_inputs, check_scalar, check_twice_differentiable, find_unused
from meta.estimators.parts import collect
from meta.optim import SGD, OptimizerOrRecipe, build_optimizer
from meta.optim.base import setting_at
from meta.tensors import as_leaves
from meta.types import Hypergradient, InnerLoss, OuterLoss, State, Tensors
from meta.walk import outer_cotangents


@torch.enable_grad()
def higher(
    inner_loss: InnerLoss,
    outer_loss: OuterLoss,
    state: State,
    hyper: Tensors,
    inner_batches: Sequence[Any],
    outer_batch: Any,
    optimizer: OptimizerOrRecipe,
) -> Hypergradient:
    """Differentiate through every inner step with `higher`'s differentiable SGD (Grefenstette et al. 2019).

    Exact, and equal to `unrolled`; same cost (about three gradient evaluations a step), and memory that grows with K.
    Unlike `higher` used
    by itself, it starts from the momentum in `state` and hands the momentum back.

    Raises:
        ValueError: The inputs make no bi-level problem, or the optimiser is not SGD; the message says why.
    """
    from higher.optim import DifferentiableSGD

    check_inputs(state, hyper, inner_batches)
    leaves = as_leaves(hyper)
    sgd = build_optimizer(optimizer, leaves)
    if not isinstance(sgd, SGD):
        raise ValueError(f"estimator 'higher' supports SGD only, not {type(sgd).__name__}: use 'unrolled'")

    parameters, buffers = as_leaves(state.parameters), state.buffers
    stepper = DifferentiableSGD(_seeded_optimizer(sgd, parameters, state.optimizer), list(parameters.values()))
    losses: list[Tensor] = []
    for step, batch in enumerate(inner_batches):
        learning_rate = setting_at(sgd.learning_rate, step)
        loss, buffers = inner_loss(parameters, buffers, leaves, batch)
        check_scalar("inner", loss)
        settings = {"lr": [learning_rate], "momentum": [sgd.momentum], "weight_decay": [sgd.weight_decay]}
        callback = _check_gradients if step == 0 else None
        stepped = stepper.step(loss, params=parameters.values(), override=settings, grad_callback=callback)
        parameters = dict(zip(parameters, stepped, strict=True))
        buffers = {name: buffer.detach() for name, buffer in buffers.items()}
        losses.append(loss)

    slots = [stepper.state[0].get(index, {}).get("momentum_buffer") for index in range(len(parameters))]
    momentum = {name: slot for name, slot in zip(parameters, slots, strict=True) if slot is not None}
    end = State(parameters, buffers, {"momentum_buffer": momentum} if momentum else {})
    value, cotangents = outer_cotangents(outer_loss, end, outer_batch)
    reached = [name for name, parameter in end.parameters.items() if parameter.requires_grad]
    found = torch.autograd.grad(
        [end.parameters[name] for name in reached],
        list(leaves.values()),
        [cotangents.parameters[name] for name in reached],
        allow_unused=True,
    )
    grads = {name: gradient for name, gradient in zip(leaves, found, strict=True) if gradient is not None}
    unused = find_unused(losses, {name: leaf for name, leaf in leaves.items() if name not in grads})
    return collect(value, grads, leaves, end, unused)


def _check_gradients(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    check_twice_differentiable(gradients)
    return gradients


def _seeded_optimizer(sgd: SGD, parameters: Tensors, slots: dict[str, Tensors]) -> torch.optim.SGD:
    """Build the torch optimiser that `higher` copies; every other setting is given anew at each step."""
    seeded = torch.optim.SGD(
        parameters.values(), lr=0.0, momentum=0.5, dampening=sgd.dampening, nesterov=sgd.nesterov, weight_decay=0.0
    )
    for name, buffer in slots.get("momentum_buffer", {}).items():
        seeded.state[parameters[name]]["momentum_buffer"] = buffer
    return seeded
