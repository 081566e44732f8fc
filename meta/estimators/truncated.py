"""The hypergradient of the last inner steps only."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from meta.checks import check_inputs
from meta.estimators.base import Estimator
from meta.estimators.first_order import first_order
from meta.optim import SGD, Optimizer, OptimizerOrRecipe, UpdateAdjoint, build_optimizer
from meta.optim.base import setting_at
from meta.rollout import rollout
from meta.types import Hypergradient, InnerLoss, OuterLoss, State, Tensors


def truncated(
    inner_loss: InnerLoss,
    outer_loss: OuterLoss,
    state: State,
    hyper: Tensors,
    inner_batches: Sequence[Any],
    outer_batch: Any,
    optimizer: OptimizerOrRecipe,
    *,
    steps: int = 5,
    estimator: Estimator = first_order,
) -> Hypergradient:
    """Roll out all K steps, but differentiate only through the last `steps` of them.

    Biased unless `steps` ≥ K: the influence of the outer parameters on earlier steps is left out, which is small where
    the inner
    training contracts (Shaban et al. 2019, truncated back-propagation). Costs K gradient evaluations and what
    `estimator` costs for `steps` steps; memory is that of `estimator`.

    Args (beside those of every `Estimator`):
        steps: How many steps to differentiate through.
        estimator: Any estimator, applied to the last steps.

    Raises:
        ValueError: The inputs make no bi-level problem; the message says why.
    """
    check_inputs(state, hyper, inner_batches)
    if steps < 1:
        raise ValueError(f"a hypergradient needs at least one step to go through, not {steps}")
    cut = max(0, len(inner_batches) - steps)
    if cut == 0:
        return estimator(inner_loss, outer_loss, state, hyper, inner_batches, outer_batch, optimizer)
    middle = rollout(inner_loss, state, hyper, inner_batches[:cut], optimizer)

    def recipe(hyper: Tensors) -> Optimizer:
        built = build_optimizer(optimizer, hyper)
        if isinstance(built, SGD):  # stays one: `higher` takes nothing else
            return replace(built, learning_rate=lambda step: setting_at(built.learning_rate, step + cut))
        return _Shifted(built, cut)

    result = estimator(inner_loss, outer_loss, middle, hyper, inner_batches[cut:], outer_batch, recipe)
    return result._replace(truncated_at=cut + (result.truncated_at or 0))


@dataclass(frozen=True)
class _Shifted:
    """An optimiser whose schedules go on from step `offset` of the whole rollout."""

    optimizer: Optimizer
    offset: int

    def update(
        self, parameters: Tensors, gradients: Tensors, optimizer_state: dict[str, Tensors], step: int
    ) -> tuple[Tensors, dict[str, Tensors]]:
        return self.optimizer.update(parameters, gradients, optimizer_state, step + self.offset)

    def adjoint(self, before: State, gradients: Tensors, step: int, cotangents: State) -> UpdateAdjoint:
        return self.optimizer.adjoint(before, gradients, step + self.offset, cotangents)

    def reads_values(self, step: int) -> bool:
        return self.optimizer.reads_values(step + self.offset)
