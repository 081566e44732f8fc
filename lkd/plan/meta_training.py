"""The plan of a meta-training."""

from dataclasses import replace
from typing import Any

import torch

from lkd.assembly import Images, prepare_learned_loss
from lkd.config import MetaTrainRecipe, PlanRecipe
from lkd.interleaving import alternation_start
from lkd.plan.distillation import HOUR, count_steps, describe_step
from lkd.plan.dry_rollout import plan_rollout
from lkd.plan.dry_run import name_untrained, plan_loss, precision_of, run_dry_step
from lkd.plan.gpus import Gpu
from lkd.plan.images import PlannedImages
from lkd.pools import list_students


def plan_meta_training(
    recipe: MetaTrainRecipe, settings: PlanRecipe, images: PlannedImages, gpu: Gpu
) -> dict[str, Any]:
    """Plan a meta-training: its pools, its outer steps, its looks at reuse.

    Raises:
        UserError: If a loss, a network or the batch is not good.
    """
    train, meta, teacher = recipe.train, recipe.meta, name_untrained(recipe.teacher)
    models = list_students(recipe)
    steps = count_steps(train.epochs, images.train_size, train.batch_size)
    losses = [plan_loss(recipe.pool.loss, model, teacher, images.stand_in)[0] for model in models]
    dry = [
        run_dry_step(model, teacher, loss, train, images.stand_in, gpu)
        for model, loss in zip(models, losses, strict=True)
    ]
    rollouts = [plan_rollout(recipe, model, teacher, images.stand_in, gpu) for model in models]
    training = steps * mean([sum(w.seconds for w in step.parts.values()) for step in dry]) / settings.efficiency / HOUR
    names = list(rollouts[0])
    outer = {
        name: meta.outer_steps
        * meta.students_per_step
        * mean([r[name].work.seconds for r in rollouts])
        / settings.efficiency
        / HOUR
        for name in names
    }
    loss_parameters = count_loss_parameters(replace(recipe, teacher=teacher), images.stand_in)
    trainings = count_trainings(recipe, len(models))
    hours = {"outer steps": outer[names[0]]} | {name: count * training for name, count in trainings.items()}
    largest = {name: max(r[name].peak for r in rollouts) / 1e9 for name in names}
    length = meta.rollout_steps * train.batch_size
    return {
        "command": "meta-train",
        "teacher": teacher.name,
        "student": ", ".join(model.name for model in models),
        "loss": f"learned: {meta.kind}, {meta.loss.get('form', 'decoupled')}",
        "precision": f"{precision_of(train)}; rollouts float32",
        "epochs": train.epochs,
        "batch_size": train.batch_size,
        "steps": steps,
        "parameters": dry[0].parameters | {"loss": loss_parameters},
        "step": describe_step(dry[0], train.batch_size),
        "rollout": {
            name: {
                "steps": meta.rollout_steps,
                "gflops": mean([r[name].work.flops for r in rollouts]) / 1e9,
                "seconds": mean([r[name].work.seconds for r in rollouts]) / settings.efficiency,
                "megabytes_a_step": mean([r[name].growth for r in rollouts]) / 1e6,
            }
            for name in names
        },
        "memory_gigabytes": {"a step of the pool's training": max(step.peak for step in dry) / 1e9}
        | {f"a hypergradient by {name}": size for name, size in largest.items()},
        "weights_gigabytes": max(step.weights for step in dry) / 1e9,
        "hours": hours,
        "hours_of_outer_steps_at_most": max(outer.values()),
        "hours_of_one_training": training,
        "gpu_hours": sum(hours.values()),
        "images_per_second": max(
            train.batch_size * steps / (training * HOUR), length / min(outer_seconds(rollouts, settings))
        ),
    }


def outer_seconds(rollouts: list[dict[str, Any]], settings: PlanRecipe) -> list[float]:
    """Seconds of one hypergradient, by estimator and network."""
    return [each.work.seconds / settings.efficiency for by_name in rollouts for each in by_name.values()]


def count_trainings(recipe: MetaTrainRecipe, architectures: int) -> dict[str, float]:
    """Whole trainings that the pools, the looks at reuse and the loop's own students come to."""
    meta, pool = recipe.meta, recipe.pool
    drawn = alternation_start(meta)
    built = 0 if recipe.pool_dir or not drawn else 1
    built += max(drawn - 1, 0) // pool.refresh_every if pool.sampling == "live" else 0
    looks = 0
    if meta.reuse_every:
        looks = 1 + -(-meta.outer_steps // meta.reuse_every)
    part = (meta.reuse_epochs or recipe.train.epochs) / recipe.train.epochs
    return {
        "pool": built * pool.students * pool.max_age * architectures,
        "reuse": looks * part * architectures,
        "own students": float(meta.students_per_step) if meta.interleaving != "before" else 0.0,
    }


def count_loss_parameters(recipe: MetaTrainRecipe, images: Images) -> int:
    """Parameters of the loss networks."""
    with torch.device("meta"):
        loss = prepare_learned_loss(recipe, images)
    return sum(parameter.numel() for parameter in loss.parameters())


def mean(values: list[float]) -> float:
    """The mean."""
    return sum(values) / len(values)
