"""SGD and the learning-rate schedule of a training."""

from typing import Any

import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor

from lkd.config.parts import TrainRecipe
from lkd.core.errors import UserError

FUSED_DEVICES = ("cpu", "cuda")


def build_optimizer(parameters: list[Tensor], recipe: TrainRecipe) -> torch.optim.Optimizer:
    """Build SGD, fused: one pass over the weights.

    Raises:
        UserError: If a setting is impossible.
    """
    try:
        return torch.optim.SGD(
            parameters,
            recipe.learning_rate,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=recipe.weight_decay,
            fused=all(parameter.device.type in FUSED_DEVICES for parameter in parameters),
        )
    except ValueError as error:
        raise UserError(f"train: {error}") from error


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimiser's state, laid out in memory as its parameters are: fused steps take that for granted.

    Raises:
        ValueError: If it is not that of an optimiser of its kind over such parameters.
    """
    options = list_kinds(optimizer)
    optimizer.load_state_dict(state)
    if list_kinds(optimizer) != options:
        raise ValueError("the optimiser's options are not those of its kind")
    for parameter, slots in optimizer.state.items():
        if slots.keys() != next(iter(optimizer.state.values())).keys():
            raise ValueError("the optimiser's parameters differ in what is kept of them")
        for name, value in slots.items():
            if name == "step":
                if not (isinstance(value, Tensor) and value.shape == () and value.is_floating_point() and value >= 0):
                    raise ValueError(f"the optimiser's step is {value}, not a number of steps")
            elif isinstance(value, Tensor) and value.shape == parameter.shape:
                slots[name] = torch.empty_like(parameter).copy_(value)
            elif value is not None:
                raise ValueError(f"the optimiser's {name} does not fit a parameter of shape {tuple(parameter.shape)}")


def list_kinds(optimizer: torch.optim.Optimizer) -> list[dict[str, type]]:
    """What kind of value each option of every group of parameters has; a number may be whole."""
    return [
        {name: float if type(value) is int else type(value) for name, value in group.items()}
        for group in optimizer.param_groups
    ]


def build_scheduler(optimizer: torch.optim.Optimizer, recipe: TrainRecipe, steps_per_epoch: int) -> Scheduler:
    """Build timm's scheduler, stepped every update.

    Raises:
        UserError: If timm knows no such schedule, or the milestones do not fit it.
    """
    check_milestones(recipe)
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=recipe.schedule,
            num_epochs=recipe.epochs,
            # timm decays one update before a milestone; half an update more puts it where torch's MultiStepLR has it.
            decay_milestones=[milestone + 0.5 / steps_per_epoch for milestone in recipe.milestones],
            decay_rate=recipe.decay_rate,
            warmup_epochs=recipe.warmup_epochs,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
        )
    except (AssertionError, ValueError) as error:
        raise UserError(f"train.schedule: {recipe.schedule!r} is not one of timm's ({error})") from error
    if scheduler is None:
        raise UserError(f"train.schedule: {recipe.schedule!r} is not one of timm's; cosine, step, multistep, poly, ...")
    return scheduler


def check_milestones(recipe: TrainRecipe) -> None:
    """Check the milestones of a multistep schedule."""
    if recipe.schedule != "multistep":
        if recipe.milestones:
            raise UserError(
                f"train.milestones: {recipe.milestones} belong to schedule multistep, not {recipe.schedule}"
            )
    elif not recipe.milestones or recipe.milestones != sorted({m for m in recipe.milestones if m > 0}):
        raise UserError(
            f"train.milestones: {recipe.milestones} are not increasing epochs, as in [150, 180, 210]; "
            "schedule multistep needs them"
        )
