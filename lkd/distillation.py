"""Train a network to the end: checkpoints, log, meta-validation after every epoch.

A teacher is a student of cross-entropy.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from lkd.assembly import (
    architecture_of,
    build_batches,
    introduce_network,
    introduce_teacher,
    prepare_images,
    prepare_loss,
    prepare_student,
    prepare_teacher,
    read_teacher_stages,
)
from lkd.checkpoint import load_checkpoint, save_checkpoint
from lkd.config import DataRecipe, DistillRecipe, ModelRecipe, TrainRecipe, TrainTeacherRecipe
from lkd.data import ImageSet
from lkd.evaluation import evaluate
from lkd.interrupt import Interrupted, StopRequest, deferred_interrupts
from lkd.losses import CrossEntropyLoss
from lkd.models.network_file import save_network
from lkd.processes import any_process, count_processes, is_main, own_rank, share_from_main
from lkd.run import Run
from lkd.throughput import Throughput, format_throughput
from lkd.training import TeacherFunction, Training

SECONDS_BETWEEN_REPORTS = 1.0
STEPS_BETWEEN_QUESTIONS = 10  # of all processes to each other whether one was asked to stop


def distill(recipe: DistillRecipe, run: Run) -> Path:
    """Train a student with any loss.

    Returns:
        The student's file; its provenance holds the meta-validation figures of the last and of the best epoch.
    """
    images = prepare_images(recipe.data)
    loss = prepare_loss(recipe.loss, recipe.student, recipe.teacher, images, recipe.seed)
    run.say(introduce_network("student", recipe.student, images, run.device))
    run.say(introduce_teacher(recipe.teacher, images, run.device))
    stages = read_teacher_stages(loss)
    teacher = prepare_teacher(recipe.teacher, recipe.data, images, run.device, stages, recipe.train)
    return train_to_the_end(recipe, recipe.student, images.train, images.meta_validation, loss, teacher, run, "student")


def train_teacher(recipe: TrainTeacherRecipe, run: Run) -> Path:
    """Train a teacher with cross-entropy.

    Returns:
        The teacher's file.
    """
    images = prepare_images(recipe.data)
    run.say(introduce_network("teacher", recipe.model, images, run.device))
    return train_to_the_end(
        recipe, recipe.model, images.train, images.meta_validation, CrossEntropyLoss(), None, run, "teacher"
    )


def train_to_the_end(
    recipe: DistillRecipe | TrainTeacherRecipe,
    model: ModelRecipe,
    train: ImageSet,
    meta_validation: ImageSet,
    loss: nn.Module,
    teacher: TeacherFunction | None,
    run: Run,
    role: str,
) -> Path:
    """Train, evaluating after every epoch; resume from the run's checkpoint if there is one.

    Raises:
        Interrupted: On Ctrl-C or SIGTERM, after saving a checkpoint.
    """
    training = start_training(model, train, loss, teacher, recipe.train, recipe.data, recipe.seed, run.device)
    checkpoint = run.path / "checkpoint.safetensors"
    history: list[dict[str, Any]] = []
    saved = share_from_main(load_checkpoint(checkpoint) if is_main() and checkpoint.exists() else None)
    if saved:
        training.load_state_dict(saved["training"])
        history = saved["history"]

    def save() -> None:
        state = {"training": training.state_dict(), "history": history}
        if is_main():
            save_checkpoint(checkpoint, state)

    lately, epoch = (Throughput(training.clock, training.batches.batch_size) for _ in range(2))
    shown = ""

    def report() -> None:
        bar.update()
        if lately.elapsed >= SECONDS_BETWEEN_REPORTS:
            figures = lately.read(training.step)
            bar.set_postfix_str(format_throughput(figures) + shown)
            run.tracker.log(training.step, **figures)
            lately.start(training.step)

    bar = tqdm(total=training.total_steps, initial=training.step, desc=role, unit="step", disable=run.hide_bars)
    with deferred_interrupts() as stop, bar:
        while training.step < training.total_steps:
            for measured in (lately, epoch):
                measured.start(training.step)
            terms = training.run_step()
            report()
            while training.step % training.batches.steps_per_epoch and not must_stop(stop, training):
                terms = training.run_step()
                report()
            if training.step % training.batches.steps_per_epoch or any_process(bool(stop), run.device):
                save()
                raise Interrupted(f"stopped at step {training.step} of {training.total_steps}")
            speed = epoch.read(training.step)
            figures = evaluate(training.result, meta_validation, run.device)
            history.append({"step": training.step, **figures})
            run.tracker.log(
                training.step,
                **{f"loss/{name}": float(value) for name, value in terms.items()},
                **{f"meta_validation/{name}": value for name, value in figures.items()},
                learning_rate=training.learning_rate,
                **speed,
            )
            shown = f", top1 {figures['top1']:.2f}, lr {training.learning_rate:.4f}"
            bar.set_postfix_str(format_throughput(speed) + shown)
            save()
    path = run.path / f"{role}.safetensors"
    results = {"last": history[-1], "best": max(history, key=lambda row: row["top1"])}
    if not is_main():
        return path
    provenance = run.provenance() | {"meta_validation": results, "image_shape": list(train.image_shape)}
    save_network(path, training.result, architecture_of(model, train), provenance)
    run.say(f"{path}: {results['last']['top1']:.2f} % on meta-validation (best epoch {results['best']['top1']:.2f} %)")
    return path


def must_stop(stop: StopRequest, training: Training) -> bool:
    """Whether to stop within an epoch; several processes agree on it every so many steps."""
    if count_processes() == 1:
        return bool(stop)
    return training.step % STEPS_BETWEEN_QUESTIONS == 0 and any_process(bool(stop), training.batches.device)


def start_training(
    model: ModelRecipe,
    train: ImageSet,
    loss: nn.Module,
    teacher: TeacherFunction | None,
    recipe: TrainRecipe,
    data: DataRecipe,
    seed: int,
    device: torch.device,
) -> Training:
    """A fresh training; equal seeds give equal initial weights and equal batches, whatever the loss."""
    student = prepare_student(model, train, seed, device)
    if own_rank():
        torch.manual_seed(seed * 1_000_003 + own_rank())  # else dropout would drop the same in every process
    batches = build_batches(train, recipe, data, seed, device, (own_rank(), count_processes()))
    return Training(student, loss, teacher, batches, recipe)
