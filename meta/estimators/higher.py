"""The hypergradient by the library `higher`: the reference that others know."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from meta.checks import check_inputs, check_step, check_twice_differentiable, find_unused
from meta.estimators.parts import collect
from meta.optim import SGD, build_optimizer, setting_at
from meta.problem import Hypergradient, Problem
from meta.rollout import drop_missing, take_inner_loss
from meta.tensors import State, Tensors, as_leaves, detach
from meta.walk import outer_cotangents


@torch.enable_grad()
def higher(problem: Problem) -> Hypergradient:
    """Differentiate through every inner step with `higher`'s differentiable SGD (Grefenstette et al. 2019).

    Exact, and equal to `unrolled`; same cost (about three gradient evaluations a step), and memory that grows with K.
    Unlike `higher` used by itself, it starts from the momentum in `problem.state` and hands the momentum back.

    Raises:
        ValueError: The optimiser is not SGD.
    """
    from higher.optim import DifferentiableSGD

    check_inputs(problem)
    leaves = as_leaves(problem.hyper)
    sgd = build_optimizer(problem.optimizer, leaves)
    if not isinstance(sgd, SGD):
        raise ValueError(f"estimator 'higher' supports SGD only, not {type(sgd).__name__}: use 'unrolled'")

    parameters, buffers = as_leaves(problem.state.parameters), problem.state.buffers
    stepper = DifferentiableSGD(_seeded_optimizer(sgd, parameters, problem.state.optimizer), list(parameters.values()))
    losses: list[Tensor] = []
    for step, batch in enumerate(problem.inner_batches):
        learning_rate = setting_at(sgd.learning_rate, step)
        loss, buffers = take_inner_loss(problem, parameters, buffers, leaves, batch)
        settings = {"lr": [learning_rate], "momentum": [sgd.momentum], "weight_decay": [sgd.weight_decay]}
        callback = partial(_check_gradients, twice=step == 0)
        stepped = stepper.step(loss, params=parameters.values(), override=settings, grad_callback=callback)
        before, parameters = parameters, dict(zip(parameters, stepped, strict=True))
        check_step(before, parameters)
        buffers = detach(buffers)
        losses.append(loss)

    slots = [stepper.state[0].get(index, {}).get("momentum_buffer") for index in range(len(parameters))]
    momentum = drop_missing(parameters, slots)
    end = State(parameters, buffers, {"momentum_buffer": momentum} if momentum else {})
    value, cotangents = outer_cotangents(problem, end)
    reached = [name for name, parameter in end.parameters.items() if parameter.requires_grad]
    found = torch.autograd.grad(
        [end.parameters[name] for name in reached],
        list(leaves.values()),
        [cotangents.parameters[name] for name in reached],
        allow_unused=True,
    )
    grads = drop_missing(leaves, found)
    unused = find_unused(losses, {name: leaf for name, leaf in leaves.items() if name not in grads})
    return collect(value, grads, leaves, end, unused)


def _check_gradients(gradients: Sequence[Tensor | None], twice: bool) -> Sequence[Tensor | None]:
    if all(gradient is None for gradient in gradients):
        raise ValueError("the inner loss does not depend on any inner parameter that it was given")
    if twice:
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
