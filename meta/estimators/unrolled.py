"""The hypergradient by backpropagation through the whole rollout."""

from collections.abc import Sequence
from typing import Any

from meta.estimators.adjoint import adjoint
from meta.optim import OptimizerOrRecipe
from meta.types import Hypergradient, InnerLoss, OuterLoss, State, Tensors


def unrolled(
    inner_loss: InnerLoss,
    outer_loss: OuterLoss,
    state: State,
    hyper: Tensors,
    inner_batches: Sequence[Any],
    outer_batch: Any,
    optimizer: OptimizerOrRecipe,
) -> Hypergradient:
    """Differentiate the outer loss through every inner step with autograd.

    Exact, with buffers held constant (Maclaurin et al. 2015; Franceschi et al. 2017). Costs about three gradient
    evaluations a step and holds every step's activations at once: memory grows with K. Every operation of the inner
    loss needs a double backward.

    Raises:
        ValueError: The inputs make no bi-level problem; the message says why.
    """
    segment = max(1, len(inner_batches))
    return adjoint(inner_loss, outer_loss, state, hyper, inner_batches, outer_batch, optimizer, chunk=segment)
