"""The plan of a distillation."""

from dataclasses import replace
from typing import Any

from lkd.balance.build import build_balance
from lkd.compressed_logits import bytes_of_answer, largest_top_k
from lkd.config import DistillRecipe, PlanRecipe
from lkd.errors import UserError
from lkd.plan.dry_run import DryStep, name_untrained, plan_loss, precision_of, run_dry_step
from lkd.plan.gpus import Gpu
from lkd.plan.images import PlannedImages

HOUR = 3600.0


def plan_distillation(recipe: DistillRecipe, settings: PlanRecipe, images: PlannedImages, gpu: Gpu) -> dict[str, Any]:
    """Plan a distillation.

    Raises:
        UserError: If the loss, a network or the batch is not good.
    """
    train, teacher = recipe.train, name_untrained(recipe.teacher)
    steps = count_steps(train.epochs, images.train_size, train.batch_size)
    loss, described = plan_loss(recipe.loss, recipe.student, teacher, images.stand_in)
    build_balance(recipe.balance, loss())
    share = replace(train, batch_size=train.batch_size // settings.gpus)
    step = run_dry_step(recipe.student, teacher, loss, share, images.stand_in, gpu)
    seconds = sum(work.seconds for work in step.parts.values()) / settings.efficiency
    hours = steps * seconds / HOUR
    return {
        "command": "distill",
        "teacher": teacher.name,
        "student": recipe.student.name,
        "loss": described,
        "precision": precision_of(train),
        "epochs": train.epochs,
        "batch_size": train.batch_size,
        "steps": steps,
        "parameters": step.parameters,
        "step": describe_step(step, share.batch_size),
        "memory_gigabytes": {"a step of training": step.peak / 1e9},
        "weights_gigabytes": step.weights / 1e9,
        "hours": {"training": hours},
        "gpu_hours": hours * settings.gpus,
        "images_per_second": train.batch_size / seconds,
        "cache": plan_cache(settings, images, step, hours),
    }


def count_steps(epochs: int, images: int, batch_size: int) -> int:
    """Steps of a training; an epoch's incomplete batch is dropped.

    Raises:
        UserError: If there is no whole batch.
    """
    if not 1 <= batch_size <= images:
        raise UserError(f"train.batch_size: {batch_size} is not between 1 and the {images} training images")
    return epochs * (images // batch_size)


def describe_step(step: DryStep, batch_size: int) -> dict[str, Any]:
    """Each part's work for an image, and its share of the time."""
    total = sum(work.seconds for work in step.parts.values())
    return {
        part: {
            "gflops_an_image": work.flops / batch_size / 1e9,
            "megabytes_an_image": work.bytes / batch_size / 1e6,
            "operations": work.operations,
            "share": work.seconds / total,
        }
        for part, work in step.parts.items()
    }


def plan_cache(settings: PlanRecipe, images: PlannedImages, step: DryStep, hours: float) -> dict[str, Any]:
    """Size of a cache of the teacher's answers (`lkd cache`), and when it pays.

    A cache holds the answers to N augmentations of every image. Filling it takes N epochs of the teacher, as a training
    of N epochs would: from the epoch after on it saves the teacher's work.
    """
    classes, seeds = images.stand_in.train.num_classes, settings.augmentation_seeds
    answers = images.train_size * seeds
    total = sum(work.seconds for work in step.parts.values())
    share = step.parts["teacher"].seconds / total if "teacher" in step.parts else 0.0
    saved = share * hours * max(0.0, 1 - seeds / settings.train.epochs)
    kept = min(settings.top_k, largest_top_k(classes))
    return {
        "augmentation_seeds": seeds,
        "gigabytes": answers * bytes_of_answer(classes, 0) / 1e9,
        "top_k": kept,
        "top_k_gigabytes": answers * bytes_of_answer(classes, kept) / 1e9,
        "break_even_epochs": seeds,
        "saved_hours": saved,
        "saved_hours_of_another_training": share * hours,
    }
