"""The words of the bi-level engine: what goes into an estimator and what comes out of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

Tensors = dict[str, Tensor]
"""Named tensors: parameters, buffers, gradients, or outer parameters."""

InnerLoss = Callable[[Tensors, Tensors, Tensors, Any], tuple[Tensor, Tensors]]
"""`inner_loss(parameters, buffers, hyper, batch) -> (scalar loss, buffers after)`; it writes to none of these."""

OuterLoss = Callable[[Tensors, Tensors, Any], Tensor]
"""`outer_loss(parameters, buffers, batch) -> scalar loss`; pure."""


class State(NamedTuple):
    """Everything an inner training needs to go on: what a rollout starts from and what it leaves.

    Attributes:
        parameters: The inner parameters, by name.
        buffers: Non-trained tensors such as BatchNorm statistics, by name.
        optimizer: The inner optimiser's state: slot name (say `momentum_buffer`) → parameter name → tensor. Empty
            before the first step.
    """

    parameters: Tensors
    buffers: Tensors
    optimizer: dict[str, Tensors]

    def detach(self) -> "State":
        """Copy the state, cut off from every graph and sharing no memory with the original."""

        def copy(tensors: Tensors) -> Tensors:
            return {name: tensor.detach().clone() for name, tensor in tensors.items()}

        return State(
            copy(self.parameters), copy(self.buffers), {slot: copy(tensors) for slot, tensors in self.optimizer.items()}
        )


class Hypergradient(NamedTuple):
    """What an estimator returns.

    Attributes:
        outer_value: The outer loss at the end of the rollout, a detached scalar.
        grads: d(outer loss)/d(hyper), by name, detached; the same names and shapes as `hyper`.
        final_state: The state that the rollout left, detached: the next window may continue from it.
        norm: The global 2-norm of `grads`, a detached scalar.
        adjoint_norms: For estimators that walk back: the norm of d(outer loss)/d(inner parameters) at every state of
            the walk, the last state first.
        truncated_at: The inner step that the walk went back to when the adjoint had grown past its bound, so that
            earlier steps were left out; None if the walk reached the start.
        fault: If something was not finite, the first such tensor, such as `inner step 4: gradient of 'conv.weight'`.
    """

    outer_value: Tensor
    grads: Tensors
    final_state: State
    norm: Tensor
    adjoint_norms: Tensor | None = None
    truncated_at: int | None = None
    fault: str | None = None
