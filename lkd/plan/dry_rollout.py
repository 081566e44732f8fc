"""One hypergradient of a recipe on tensors without contents: what its estimator computes, moves and holds."""

import dataclasses
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from lkd.assembly import Images, architecture_of, prepare_learned_loss, read_teacher_stages
from lkd.config import MetaTrainRecipe, ModelRecipe, TeacherRecipe
from lkd.data import Batch
from lkd.meta_checks import AUDITED
from lkd.models import build
from lkd.outer_objectives import OBJECTIVES
from lkd.plan.counting import OperationCounter, Work
from lkd.plan.dry_run import DryBatches, build_untrained_teacher
from lkd.plan.gpus import Gpu
from lkd.rollouts import build_inner_optimizer, compute_inner_loss, compute_outer_logits, list_inner_batches
from lkd.teacher import Teacher
from meta import ESTIMATORS, State
from meta.types import Tensors

LENGTHS = (2, 3)  # inner steps that are run; longer rollouts lie on the line through both


class DryRollout(NamedTuple):
    """One hypergradient.

    Attributes:
        work: Of the teacher's answers, the rollout and the walk back.
        peak: Bytes that are alive at once at most.
        growth: Of them, bytes that each further inner step adds.
    """

    work: Work
    peak: float
    growth: float


def plan_rollout(
    recipe: MetaTrainRecipe, student: ModelRecipe, teacher: TeacherRecipe, images: Images, gpu: Gpu
) -> dict[str, DryRollout]:
    """Plan one hypergradient with the recipe's estimator.

    Returns:
        Estimator → `DryRollout`. An audited estimator is first_order as long as that is right, and else adjoint: both
        are there.
    """
    names = ("first_order", "adjoint") if recipe.meta.estimator == AUDITED else (recipe.meta.estimator,)
    return {name: extrapolate(recipe, student, teacher, images, gpu, name) for name in names}


def extrapolate(
    recipe: MetaTrainRecipe, student: ModelRecipe, teacher: TeacherRecipe, images: Images, gpu: Gpu, estimator: str
) -> DryRollout:
    """Run short rollouts, and follow the line through them to the recipe's length."""
    length = recipe.meta.rollout_steps
    short, long = (min(length, each) for each in LENGTHS)
    first, second = (run_dry_rollout(recipe, student, teacher, images, gpu, estimator, k) for k in (short, long))
    if short == long:
        return DryRollout(first[0], max(first[1]), 0.0)
    steps = (length - long) / (long - short)

    def follow(before: float, after: float) -> float:
        return after + (after - before) * steps

    work = Work(*map(follow, dataclasses.astuple(first[0]), dataclasses.astuple(second[0])))
    peaks = [(follow(*each), (each[1] - each[0]) / (long - short)) for each in zip(first[1], second[1], strict=True)]
    return DryRollout(work, *max(peaks))


def run_dry_rollout(
    recipe: MetaTrainRecipe,
    student: ModelRecipe,
    teacher: TeacherRecipe,
    images: Images,
    gpu: Gpu,
    estimator: str,
    length: int,
) -> tuple[Work, tuple[int, int]]:
    """One hypergradient over so many inner steps, in float32: its work, and the peaks of teacher and estimator, bytes.

    The two grow with the steps each in its own way.
    """
    counter = OperationCounter(gpu.rate("float32"), gpu.bandwidth * 1e9)
    settings, train = recipe.meta, recipe.train
    without_autocast = patch.object(torch, "autocast", lambda *_, **__: nullcontext())  # the meta device has none
    with torch.device("meta"), without_autocast, counter:
        taught_by = Teacher(build_untrained_teacher(teacher, images))
        model = dataclasses.replace(student, pretrained=False)
        network = build(**architecture_of(model, images.train)).train()
        loss = prepare_learned_loss(dataclasses.replace(recipe, teacher=teacher), images)
        parameters = {name: p.detach() for name, p in network.named_parameters()}
        buffers = dict(network.named_buffers())
        momentum = {name: torch.zeros_like(p) for name, p in parameters.items()}
        state = State(parameters, buffers, {"momentum_buffer": momentum})
        outer_batch = DryBatches(images, settings.outer_batch_size, "meta").at(0)
        batches = DryBatches(images, train.batch_size, "meta")
        counter.reset()
        counter.start()

        def outer_loss(parameters: Tensors, buffers: Tensors, batch: Batch) -> Tensor:
            return OBJECTIVES[settings.objective](
                compute_outer_logits(network, parameters, buffers, batch), batch.target
            )

        inner_batches = list_inner_batches(batches, taught_by, 0.0, length, read_teacher_stages(loss))
        teacher_peak = counter.take_peak()
        ESTIMATORS[estimator](
            partial(compute_inner_loss, network, loss),
            outer_loss,
            state,
            {name: p.detach() for name, p in loss.named_parameters()},
            inner_batches,
            outer_batch,
            build_inner_optimizer(train, train.learning_rate, settings.annealing, length),
        )
        counter.lap("hypergradient")
    return counter.parts["hypergradient"], (teacher_peak, counter.take_peak())
