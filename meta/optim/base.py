"""What an estimator needs of an inner optimiser: its update rule and the adjoint of that rule."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from meta.tensors import State, Tensors

Setting = float | Tensor
"""A setting of an optimiser: a number, or a tensor that an outer parameter may stand behind.

It is zero-dimensional, or of a shape that broadcasts to that of every parameter, as a rate for each element."""

Schedule = Setting | Callable[[int], Setting]
"""A setting that may depend on the step within the rollout (0 … K-1)."""


class UpdateAdjoint(NamedTuple):
    """Cotangents of everything an update reads.

    Attributes:
        parameters: Of the parameters before the step, the gradients held fixed.
        gradients: Of the gradients; only for parameters that had one.
        optimizer: Of the optimiser state before the step.
        settings: Pairs of a tensor setting and its cotangent; numbers have none.
    """

    parameters: Tensors
    gradients: Tensors
    optimizer: dict[str, Tensors]
    settings: list[tuple[Tensor, Tensor]]


@runtime_checkable
class Optimizer(Protocol):
    """An inner optimiser as a pure function."""

    def update(self, before: State, gradients: Tensors, step: int) -> State:
        """Take one step; write to none of the arguments, and leave the buffers as they are.

        Args:
            before: The state before the step.
            gradients: Of the parameters. One whose name is missing stays as it is, as `torch.optim` does where `grad`
                is None.
            step: The step within the rollout, for schedules.
        """
        ...

    def adjoint(self, before: State, gradients: Tensors, step: int, cotangents: State) -> UpdateAdjoint:
        """Pull cotangents of the state after the step back to everything that `update` read.

        Args:
            before: The state before the step.
            gradients: The gradients that the step used.
            step: The step within the rollout.
            cotangents: Of the parameters and the optimiser state after the step. A missing slot or name counts as zero.
        """
        ...

    def reads_values(self, step: int) -> bool:
        """Whether `adjoint` reads the values of gradients and optimiser state at this step.

        Where the update is linear in them it only asks which there are; the trajectory then need not keep them.
        """
        ...


OptimizerOrRecipe = Optimizer | Callable[[Tensors], Optimizer]
"""An optimiser, or a function that builds one from the outer parameters: then its settings are learned too."""


def build_optimizer(optimizer: OptimizerOrRecipe, hyper: Tensors) -> Optimizer:
    """Return the optimiser that `optimizer` names for these outer parameters."""
    if not isinstance(optimizer, type | Optimizer) and callable(optimizer):
        optimizer = optimizer(hyper)
    return check_optimizer(optimizer)


def check_optimizer(optimizer: Any) -> Optimizer:
    """Return an optimiser as it is, and raise a ValueError where it is none."""
    if isinstance(optimizer, type):
        raise ValueError(f"inner optimiser {optimizer.__name__} is a class: give an object, as meta.optim.SGD(0.1)")
    if not isinstance(optimizer, Optimizer):
        raise ValueError(
            f"unsupported inner optimiser {type(optimizer).__name__}: pass one of meta.optim, or a function of the "
            "outer parameters that returns one"
        )
    return optimizer


def setting_at(schedule: Schedule, step: int) -> Setting:
    """Return the setting's value at a step of the rollout, with its graph to the outer parameters, if any."""
    with torch.enable_grad():
        return schedule(step) if callable(schedule) else schedule


def pair_settings(terms: list[tuple[Setting, list[Tensor]]]) -> list[tuple[Tensor, Tensor]]:
    """Pair every tensor setting with the sum of its cotangents; leave out numbers, and settings without an effect.

    `terms`: settings, and of each the products that broadcasting spread it over, one or more for every parameter.
    """
    return [
        (setting, torch.stack([product.sum_to_size(setting.shape) for product in products]).sum(0))
        for setting, products in terms
        if isinstance(setting, Tensor) and products
    ]


def is_active(setting: Setting) -> bool:
    """Whether a setting has an effect: a tensor always counts, since its derivative does."""
    return isinstance(setting, Tensor) or setting != 0
