"""The hypergradient of the last inner steps only."""

from dataclasses import replace

from meta.checks import check_inputs
from meta.estimators.first_order import first_order
from meta.optim import SGD, Optimizer, PerStep, build_optimizer, setting_at
from meta.problem import Estimator, Hypergradient, Problem
from meta.rollout import rollout
from meta.tensors import Tensors


def truncated(problem: Problem, *, steps: int = 5, estimator: Estimator = first_order) -> Hypergradient:
    """Roll out all K steps, but differentiate only through the last `steps` of them.

    Biased unless `steps` ≥ K: the influence of the outer parameters on earlier steps is left out, which is small where
    the inner training contracts (Shaban et al. 2019, truncated back-propagation). Costs K gradient evaluations and what
    `estimator` costs for `steps` steps; memory is that of `estimator`.

    Args:
        problem: The problem.
        steps: How many steps to differentiate through.
        estimator: Any estimator, applied to the last steps.

    Raises:
        ValueError: The inputs make no bi-level problem; the message says why.
    """
    check_inputs(problem)
    if steps < 1:
        raise ValueError(f"a hypergradient needs at least one step to go through, not {steps}")
    cut = max(0, len(problem.inner_batches) - steps)
    if cut == 0:
        return estimator(problem)
    middle = rollout(replace(problem, inner_batches=problem.inner_batches[:cut]))

    def shifted(hyper: Tensors) -> Optimizer:
        """The optimiser whose schedules go on from step `cut` of the whole rollout."""
        built = build_optimizer(problem.optimizer, hyper)
        if isinstance(built, SGD):  # stays one: `higher` takes nothing else
            return replace(built, learning_rate=lambda step: setting_at(built.learning_rate, step + cut))
        return PerStep(lambda step: (built, step + cut))

    tail = replace(problem, state=middle, inner_batches=problem.inner_batches[cut:], optimizer=shifted)
    return estimator(tail)
