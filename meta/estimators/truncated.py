"""The hypergradient of the last inner steps only."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from meta.checks import UnusedError, check_inputs, find_unused
from meta.estimators.adjoint import adjoint
from meta.estimators.first_order import first_order
from meta.optim import SGD, Optimizer, PerStep, build_optimizer, setting_at
from meta.problem import Estimator, Hypergradient, Problem
from meta.randomness import read_generators, replaying
from meta.rollout import differentiate, rollout
from meta.tensors import Tensors, as_leaves


def truncated(problem: Problem, *, steps: int = 5, estimator: Estimator = first_order) -> Hypergradient:
    """Roll out all K steps, but differentiate only through the last `steps` of them.

    The hypergradient of what only earlier steps use is zero.
    Biased unless `steps` ≥ K: the influence of the outer parameters on earlier steps is left out, which is small where
    the inner training contracts (Shaban et al. 2019, truncated back-propagation). Costs K gradient evaluations and what
    `estimator` costs for `steps` steps; memory is that of `estimator`.

    Args:
        problem: The problem.
        steps: How many steps to differentiate through.
        estimator: Any estimator, applied to the last steps.
    """
    check_inputs(problem)
    if steps < 1:
        raise ValueError(f"a hypergradient needs at least one step to go through, not {steps}")
    cut = max(0, len(problem.inner_batches) - steps)
    if cut == 0:
        return estimator(problem)
    at_start = read_generators(problem.state.parameters)
    middle = rollout(replace(problem, inner_batches=problem.inner_batches[:cut]))

    def shifted(hyper: Tensors) -> Optimizer:
        """The optimiser whose schedules go on from step `cut` of the whole rollout."""
        built = build_optimizer(problem.optimizer, hyper)
        if isinstance(built, SGD):  # stays one: `higher` takes nothing else
            return replace(built, learning_rate=lambda step: setting_at(built.learning_rate, step + cut))
        return PerStep(lambda step: (built, step + cut))

    tail = replace(problem, state=middle, inner_batches=problem.inner_batches[cut:], optimizer=shifted)
    generators = read_generators(middle.parameters)
    try:
        return estimator(tail)
    except UnusedError as error:
        idle = set(error.names)
        with replaying(at_start):
            if missing := _find_unused_before(replace(problem, inner_batches=problem.inner_batches[:cut]), idle):
                raise UnusedError(missing) from None

    def mention(parameters: Tensors, buffers: Tensors, hyper: Tensors, batch: Any) -> tuple[Tensor, Tensors]:
        """The inner loss, and nothing of each outer parameter that only the steps before the cut use."""
        loss, updated = problem.inner_loss(parameters, buffers, hyper, batch)
        return loss + sum(0 * hyper[name].sum() for name in idle), updated

    with replaying(generators):
        return estimator(replace(tail, inner_loss=mention))


def last_step(problem: Problem) -> Hypergradient:
    """Differentiate only through the last inner step (T1–T2, Luketina et al. 2016).

    Biased: what earlier steps owe to the outer parameters is left out, so the norm is far too small and the direction
    right only roughly. Costs K gradient evaluations and two or three more; memory of one step.
    """
    return truncated(problem, steps=1, estimator=adjoint)


def _find_unused_before(problem: Problem, names: set[str]) -> set[str]:
    """Those of these outer parameters that no step of a rollout uses; takes the steps anew."""
    hyper = as_leaves(problem.hyper)
    optimizer, state = build_optimizer(problem.optimizer, hyper), problem.state.detach()
    for index, batch in enumerate(problem.inner_batches):
        found = differentiate(problem, state, batch, hyper=True)
        with torch.enable_grad():
            after = optimizer.update(state, found.parameters, index)
        names = names - found.hyper.keys()
        names = set(find_unused(list(after.parameters.values()), {name: hyper[name] for name in names}))
        if not names:
            break
        state = after._replace(buffers=found.buffers).detach()
    return names
