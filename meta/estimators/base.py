"""The one signature of every estimator."""

from collections.abc import Sequence
from typing import Any, Protocol

from meta.optim import OptimizerOrRecipe
from meta.types import Hypergradient, InnerLoss, OuterLoss, State, Tensors

Problem = tuple[InnerLoss, OuterLoss, State, Tensors, Sequence[Any], Any, OptimizerOrRecipe]
"""The arguments of an estimator, in order."""


class Estimator(Protocol):
    """A function that returns d(outer loss after K inner steps) / d(outer parameters)."""

    def __call__(
        self,
        inner_loss: InnerLoss,
        outer_loss: OuterLoss,
        state: State,
        hyper: Tensors,
        inner_batches: Sequence[Any],
        outer_batch: Any,
        optimizer: OptimizerOrRecipe,
        /,
    ) -> Hypergradient:
        """Estimate the hypergradient. Random numbers are drawn as by the rollout alone.

        Args:
            inner_loss: `inner_loss(parameters, buffers, hyper, batch) -> (scalar, buffers)`.
            outer_loss: `outer_loss(parameters, buffers, batch) -> scalar`, at the end of the rollout.
            state: Where the rollout starts; it is not written to.
            hyper: The outer parameters.
            inner_batches: One batch a step.
            outer_batch: The outer loss's batch.
            optimizer: The inner optimiser, or a function of `hyper` that returns one.

        Raises:
            ValueError: The inputs make no bi-level problem; the message says why.
        """
        ...
