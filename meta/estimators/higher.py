"""The hypergradient by the library `higher`: the reference that others know."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from meta.checks import check_inputs, check_scalar
from meta.estimators.parts import as_leaves, collect, differentiate_outer
from meta.optim import SGD, OptimizerOrRecipe, build_optimizer
from meta.types import Hypergradient, InnerLoss, OuterLoss, State, Tensors


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

    Args:
        inner_loss: `inner_loss(parameters, buffers, hyper, batch) -> (scalar, buffers)`.
        outer_loss: `outer_loss(parameters, buffers, batch) -> scalar`, at the end of the rollout.
        state: Where the rollout starts; it is not written to.
        hyper: The outer parameters.
        inner_batches: One batch a step.
        outer_batch: The outer loss's batch.
        optimizer: An SGD, or a function of `hyper` that returns one.

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
        learning_rate = sgd.learning_rate(step) if callable(sgd.learning_rate) else sgd.learning_rate
        loss, buffers = inner_loss(parameters, buffers, leaves, batch)
        check_scalar("inner", loss)
        settings = {"lr": [learning_rate], "momentum": [sgd.momentum], "weight_decay": [sgd.weight_decay]}
        stepped = stepper.step(loss, params=parameters.values(), override=settings)
        parameters = dict(zip(parameters, stepped, strict=True))
        buffers = {name: buffer.detach() for name, buffer in buffers.items()}
        losses.append(loss)

    slots = [stepper.state[0].get(index, {}).get("momentum_buffer") for index in range(len(parameters))]
    momentum = {name: slot for name, slot in zip(parameters, slots, strict=True) if slot is not None}
    end = State(parameters, buffers, {"momentum_buffer": momentum} if momentum else {})
    value, grads = differentiate_outer(outer_loss, end, leaves, outer_batch)
    return collect(value, grads, leaves, end, losses)


def _seeded_optimizer(sgd: SGD, parameters: Tensors, slots: dict[str, Tensors]) -> torch.optim.SGD:
    """Build the torch optimiser that `higher` copies; every other setting is given anew at each step."""
    seeded = torch.optim.SGD(
        parameters.values(), lr=0.0, momentum=0.5, dampening=sgd.dampening, nesterov=sgd.nesterov, weight_decay=0.0
    )
    for name, buffer in slots.get("momentum_buffer", {}).items():
        seeded.state[parameters[name]]["momentum_buffer"] = buffer
    return seeded
