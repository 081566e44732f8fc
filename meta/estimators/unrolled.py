"""The hypergradient by backpropagation through the whole rollout."""

from collections.abc import Sequence
from typing import Any

import torch

from meta.checks import check_inputs
from meta.estimators.parts import as_leaves, collect, differentiate_outer
from meta.optim import OptimizerOrRecipe, build_optimizer
from meta.rollout import unroll
from meta.types import Hypergradient, InnerLoss, OuterLoss, State, Tensors


@torch.enable_grad()
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
    check_inputs(state, hyper, inner_batches)
    leaves = as_leaves(hyper)
    start = State(as_leaves(state.parameters), state.buffers, state.optimizer)
    end, losses = unroll(inner_loss, start, leaves, inner_batches, build_optimizer(optimizer, leaves))
    value, grads = differentiate_outer(outer_loss, end, leaves, outer_batch)
    return collect(value, grads, leaves, end, losses)
