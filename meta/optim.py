"""Inner optimisers as pure functions, step for step equal to `torch.optim`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from meta.types import Tensors

Setting = float | Tensor
"""A setting of an optimiser: a number, or a zero-dimensional tensor that an outer parameter may stand behind."""

Schedule = Setting | Callable[[int], Setting]
"""A setting that may depend on the step within the rollout (0 … K-1)."""


class Optimizer(Protocol):
    """What an estimator needs of an inner optimiser."""

    def update(
        self, parameters: Tensors, gradients: Tensors, optimizer_state: dict[str, Tensors], step: int
    ) -> tuple[Tensors, dict[str, Tensors]]:
        """Take one step; write to none of the arguments.

        Args:
            parameters: The parameters, by name.
            gradients: Their gradients. A parameter whose name is missing stays as it is, as `torch.optim` does where
                `grad` is None.
            optimizer_state: Slot name → parameter name → tensor; empty before the first step.
            step: The step within the rollout, for schedules.

        Returns:
            The new parameters and the new optimiser state.
        """
        ...


OptimizerOrRecipe = Optimizer | Callable[[Tensors], Optimizer]
"""An optimiser, or a function that builds one from the outer parameters: then its settings are learned too."""


def build_optimizer(optimizer: OptimizerOrRecipe, hyper: Tensors) -> Optimizer:
    """Return the optimiser that `optimizer` names for these outer parameters.

    Raises:
        ValueError: It is neither one of this module's optimisers nor a function that returns one.
    """
    built = optimizer(hyper) if callable(optimizer) and not hasattr(optimizer, "update") else optimizer
    if not hasattr(built, "update"):
        raise ValueError(
            f"unsupported inner optimiser {type(built).__name__}: pass one of meta.optim, or a function of the outer "
            "parameters that returns one"
        )
    return built


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent, equal to `torch.optim.SGD`.

    Attributes:
        learning_rate: A number, a zero-dimensional tensor, or a function of the step within the rollout.
        momentum: Factor of the momentum buffer.
        dampening: Fraction of the gradient kept out of the momentum buffer.
        nesterov: Whether to look ahead along the momentum.
        weight_decay: L2 penalty, added to the gradient.
    """

    learning_rate: Schedule
    momentum: Setting = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: Setting = 0.0

    def __post_init__(self) -> None:
        if self.nesterov and (not self._has_momentum or self.dampening != 0):
            raise ValueError("Nesterov momentum needs a momentum and no dampening")

    @property
    def _has_momentum(self) -> bool:
        return isinstance(self.momentum, Tensor) or self.momentum != 0

    def update(
        self, parameters: Tensors, gradients: Tensors, optimizer_state: dict[str, Tensors], step: int
    ) -> tuple[Tensors, dict[str, Tensors]]:
        """Take one step; see `Optimizer.update`. The one slot, where there is momentum, is `momentum_buffer`."""
        learning_rate = self.learning_rate(step) if callable(self.learning_rate) else self.learning_rate
        decays = isinstance(self.weight_decay, Tensor) or self.weight_decay != 0
        old_buffers = optimizer_state.get("momentum_buffer", {})
        new_parameters, new_buffers = dict(parameters), dict(old_buffers)
        for name, gradient in gradients.items():
            parameter = parameters[name]
            direction = gradient + self.weight_decay * parameter if decays else gradient
            if self._has_momentum:
                if name in old_buffers:
                    buffer = self.momentum * old_buffers[name] + (1 - self.dampening) * direction
                else:
                    buffer = direction
                direction = direction + self.momentum * buffer if self.nesterov else buffer
                new_buffers[name] = buffer
            new_parameters[name] = parameter - learning_rate * direction
        return new_parameters, {"momentum_buffer": new_buffers} if self._has_momentum else {}
