"""A bi-level problem, and what an estimator makes of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from meta.optim import OptimizerOrRecipe, evaluation_parameters
from meta.tensors import State, Tensors

InnerLoss = Callable[[Tensors, Tensors, Tensors, Any], tuple[Tensor, Tensors]]
"""`inner_loss(parameters, buffers, hyper, batch) -> (scalar loss, buffers after)`; it writes to none of these."""

OuterLoss = Callable[[Tensors, Tensors, Any], Tensor]
"""`outer_loss(parameters, buffers, batch) -> scalar loss`; pure. For `evolution` a number will do."""


@dataclass(frozen=True)
class Problem:
    """An inner training and what is asked of its end; `dataclasses.replace` makes variations.

    Attributes:
        inner_loss: The loss that is descended.
        outer_loss: The loss at the end of the rollout.
        state: Where the rollout starts; it is never written to.
        hyper: The outer parameters.
        inner_batches: One batch a step: a list, no iterator and no DataLoader, since steps are taken again.
        outer_batch: The outer loss's batch.
        optimizer: The inner optimiser, or a function of `hyper` that returns one: then its settings are learned too.
    """

    inner_loss: InnerLoss
    outer_loss: OuterLoss
    state: State
    hyper: Tensors
    inner_batches: Sequence[Any]
    outer_batch: Any
    optimizer: OptimizerOrRecipe

    def evaluate(self, end: State) -> Tensor:
        """Return the outer loss at the end of a rollout: of the averaged parameters, where there is an average."""
        return torch.as_tensor(self.outer_loss(evaluation_parameters(end), end.buffers, self.outer_batch))


class Hypergradient(NamedTuple):
    """What an estimator returns.

    Attributes:
        outer_value: The outer loss at the end of the rollout, a detached scalar.
        grads: d(outer loss)/d(hyper), by name, detached; the same names and shapes as `hyper`.
        final_state: The state that the rollout left, detached: the next window may continue from it.
        norm: The global 2-norm of `grads`, a detached scalar.
        adjoint_norms: For estimators that walk back: the norm of d(outer loss)/d(inner parameters) at every state of
            the walk, the last state first.
        fault: If something was not finite, the first such tensor, such as `inner step 4: gradient of 'conv.weight'`.
            Where there is none, the outer value and all of `grads` are finite.
    """

    outer_value: Tensor
    grads: Tensors
    final_state: State
    norm: Tensor
    adjoint_norms: Tensor | None = None
    fault: str | None = None


Estimator = Callable[[Problem], Hypergradient]
"""`estimator(problem) -> hypergradient`, d(outer loss after K inner steps) / d(outer parameters).

Random numbers are drawn as by the rollout alone. Of inputs that make no bi-level problem a ValueError says why."""


def call_module(
    module: nn.Module, parameters: Tensors, buffers: Tensors, *args: Any, **kwargs: Any
) -> tuple[Any, Tensors]:
    """Call `module` with other parameters and buffers; write to neither of them nor to the module.

    Args:
        module: The network. Its training mode is respected.
        parameters: Parameter name → tensor. Names that are left out keep the module's own values.
        buffers: Buffer name → tensor, as they are before the call.
        *args: Passed to the module's `forward`.
        **kwargs: Passed to the module's `forward`.

    Returns:
        The module's output, and the buffers after the call (BatchNorm moves its statistics in train mode).
    """
    # The clones are made here, inside the differentiated function: torch.func refuses writes to captured tensors.
    updated = {name: buffer.clone() for name, buffer in buffers.items()}
    output = functional_call(module, {**parameters, **updated}, args, kwargs)
    return output, updated
