"""What meta-training cost, in units of one student training."""

import copy
import statistics
import time
from typing import Any

import torch

from lkd.assembly import Images
from lkd.config import MetaTrainRecipe, ModelRecipe
from lkd.distillation import start_training
from lkd.losses import LearnedLoss
from lkd.pools import list_students
from lkd.training import DivergedError, TeacherFunction

WARM_UP, TIMED = 3, 30


def read_clock(device: torch.device) -> float:
    """Seconds of work: on a CPU those of this process, which others do not disturb, else wall time."""
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def measure_training_seconds(
    recipe: MetaTrainRecipe, images: Images, teacher: TeacherFunction, loss: LearnedLoss, device: torch.device
) -> float:
    """Seconds by `read_clock` of one whole training with this loss, without evaluation; the architectures' mean.

    The median of a few steps, times their number: a training itself would take as long as it takes.
    """
    models = list_students(recipe)
    return sum(time_training(recipe, model, images, teacher, loss, device) for model in models) / len(models)


def time_training(
    recipe: MetaTrainRecipe,
    model: ModelRecipe,
    images: Images,
    teacher: TeacherFunction,
    loss: LearnedLoss,
    device: torch.device,
) -> float:
    """Seconds of one whole training of a student of this architecture."""
    frozen = copy.deepcopy(loss).requires_grad_(False)
    training = start_training(model, images.train, frozen, teacher, recipe.train, recipe.data, recipe.seed, device)
    seconds = []
    for _ in range(min(WARM_UP + TIMED, training.total_steps)):
        started = read_clock(device)
        try:
            training.run_step()  # asks whether the loss is finite: the device has done its work when it returns
        except DivergedError:  # its steps took no longer than another's
            break
        finally:
            seconds.append(read_clock(device) - started)
    return training.total_steps * statistics.median(seconds[WARM_UP:] or seconds)


def summarize_cost(
    pool_trainings: float, reuse_trainings: float, outer_seconds: float, training_seconds: float
) -> dict[str, Any]:
    """The entry `cost` of a learned loss's provenance.

    Args:
        pool_trainings: Of all pools, in trainings: a pool's students are trained a known part of their way.
        reuse_trainings: Of all looks at reuse, in trainings.
        outer_seconds: By `read_clock`, of the outer steps: rollouts, hypergradients, and the trainings that the loss
            alternated with.
        training_seconds: By `read_clock`, of one training.
    """
    outer = outer_seconds / training_seconds
    parts = {"pool": pool_trainings, "outer_steps": outer, "reuse": reuse_trainings}
    return {
        "cost_in_trainings": round(sum(parts.values()), 2),
        "parts_in_trainings": {name: round(value, 2) for name, value in parts.items()},
        "training_seconds": round(training_seconds, 2),
        "outer_seconds": round(outer_seconds, 2),
    }
