"""Train a network to the end: checkpoints, log, meta-validation after every epoch."""

from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lkd.balance.balancing import build_balance
from lkd.config.parts import DataRecipe, ModelRecipe, TrainRecipe
from lkd.config.training import DistillRecipe, TrainTeacherRecipe
from lkd.core.distributed import count_processes, is_main, own_rank
from lkd.core.errors import UserError
from lkd.core.interrupt import deferred_interrupts
from lkd.core.outputs import Outputs
from lkd.core.random import seeded_generator
from lkd.data.images import Batch, ImageSet
from lkd.data.splits import interleave_classes
from lkd.losses.learned.shares import gradient_shares
from lkd.losses.logits import CrossEntropyLoss
from lkd.losses.loss import DistillationLoss
from lkd.models.files import save_network
from lkd.models.teacher import TeacherFunction
from lkd.tracking.run import Run
from lkd.training.build import (
    architecture_of,
    build_batches,
    introduce_network,
    introduce_teacher,
    prepare_images,
    prepare_loss,
    prepare_student,
    prepare_teacher,
)
from lkd.training.checkpoints import Checkpoints, run_steps
from lkd.training.evaluate import evaluate
from lkd.training.throughput import Throughput, format_throughput
from lkd.training.training import Training

# ----------------------------------------------------------------------------------------------------------------------
# What a training's log says of one batch: who pulls at the student, and does it answer as its teacher does.

SHARE = "share/"
Seen = tuple[Batch, Outputs | None, float]  # batch, teacher's outputs, progress


def describe_batch(training: Training, seen: Seen) -> dict[str, float]:
    """Figures of a batch that the student was just trained on, in its present state. Nothing of the training changes.

    Args:
        training: The training, after a step.
        seen: What `Training.run_step` told its `watch` in this step.

    Returns:
        `gradient_norm`: of the step, over all parameters; `train/agreement`: percent of the images that student and
        teacher give the same class; `share/TERM`: each term's share of the gradient at the student's outputs
        (`gradient_shares`), weighed as the balance does. A loss that remembers images is not asked for shares: asking
        would change its memory.
    """
    batch, teacher, progress = seen
    gradients = [p.grad for p in training.student.parameters() if p.grad is not None]
    figures = {"gradient_norm": float(torch.nn.utils.get_total_norm(gradients))}
    student = answer(training.student, batch.images)
    if teacher is not None:
        same = student.logits.argmax(1) == teacher.logits.argmax(1)
        figures["train/agreement"] = 100 * same.float().mean().item()
    if training.loss.needs_index:
        return figures

    def weighed(*arguments: Any) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = training.loss(*arguments)
        return training.balance.scale(terms) if training.balance else terms

    devices = [batch.images.device] if batch.images.is_cuda else []
    with torch.random.fork_rng(devices):  # a loss may draw
        shares = gradient_shares(weighed, student, teacher, batch.target, progress)
    return figures | {SHARE + name: share for name, share in shares.items()}


@torch.no_grad()
def answer(student: nn.Module, images: Tensor) -> Outputs:
    """The student's outputs in eval mode, in float32; its mode is restored."""
    training = student.training
    outputs: Outputs = student.eval()(images)
    student.train(training)
    return outputs


# ----------------------------------------------------------------------------------------------------------------------
# Semi-supervised distillation: the teacher's labels for the images whose own are not known. *Our reconstruction* of
# KD-AIF's semi-supervised form; its objective is not public.


def label_by_teacher(
    images: ImageSet, labelled_size: int, teacher: TeacherFunction, device: torch.device, seed: int
) -> ImageSet:
    """Keep the labels of some images and give the others the class that the teacher finds most probable.

    Args:
        images: The training images.
        labelled_size: How many keep theirs, as balanced over the classes as the images are; 0 for all.
        teacher: The teacher.
        device: Where it runs.
        seed: Of the choice.

    Raises:
        UserError: If there are not so many images.
    """
    if not 0 <= labelled_size <= len(images):
        raise UserError(f"labelled_size: {labelled_size} is not between 0 (all) and the {len(images)} training images")
    if not labelled_size:
        return images
    unlabelled = interleave_classes(images.labels, images.num_classes, seed)[labelled_size:]
    labels = images.labels.clone()
    positions = {int(index): place for place, index in zip(unlabelled, images.index[unlabelled], strict=True)}
    for batch in images.batches(unlabelled.split(500), device):
        found = [int(positions[int(index)]) for index in batch.index]
        labels[found] = teacher(batch).logits.argmax(1).cpu()
    return images.relabel(labels)


# ----------------------------------------------------------------------------------------------------------------------
# Train a network to the end: checkpoints, log, meta-validation after every epoch. A teacher is a student of cross-
# entropy.

FIRST_PAUSE = 1.0  # seconds between the first reports of how fast it goes
REPORTS = 1000  # after so many they are logged half as often


def distill(recipe: DistillRecipe, run: Run) -> Path:
    """Train a student with any loss.

    Returns:
        The student's file; its provenance holds the meta-validation figures of the last and of the best epoch.
    """
    images = prepare_images(recipe.data)
    loss = prepare_loss(recipe.loss, recipe.student, recipe.teacher, images, recipe.seed)
    build_balance(recipe.balance, loss)  # a mistake shows before the teacher works
    run.say(introduce_network("student", recipe.student, images, run.device))
    run.say(introduce_teacher(recipe.teacher, images, run.device))
    stages = loss.teacher_stages
    teacher = prepare_teacher(recipe.teacher, recipe.data, images, run.device, stages, recipe.train)
    train = label_by_teacher(images.train, recipe.labelled_size, teacher, run.device, recipe.data.split_seed)
    return train_to_the_end(recipe, recipe.student, train, images.meta_validation, loss, teacher, run, "student")


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
    loss: DistillationLoss,
    teacher: TeacherFunction | None,
    run: Run,
    role: str,
) -> Path:
    """Train, evaluating after every epoch; resume from the run's checkpoint if there is one.

    Raises:
        Interrupted: On Ctrl-C or SIGTERM, after saving a checkpoint.
    """
    balance = recipe.balance if isinstance(recipe, DistillRecipe) else None
    training = start_training(
        model, train, loss, teacher, recipe.train, recipe.data, recipe.seed, run.device, shared=True, balance=balance
    )
    checkpoints = Checkpoints(run.path / "checkpoints", recipe.train, run.say)
    history: list[dict[str, Any]] = checkpoints.resume_training(training).get("history", [])
    lately, epoch = (Throughput(training.clock, training.batches.batch_size) for _ in range(2))
    shown = ""
    seen: list[Seen] = []

    def watch(batch: Seen) -> None:
        if training.step + 1 == epoch_end and is_main():
            seen[:] = [batch]

    reports, pause = count(), FIRST_PAUSE

    def report() -> None:
        nonlocal pause
        bar.update()
        if lately.elapsed >= pause:
            pause = FIRST_PAUSE * 2 ** (next(reports) // REPORTS)
            figures = lately.read(training.step)
            bar.set_postfix_str(format_throughput(figures) + shown)
            if training.balance:
                figures["balance"] = training.balance.weight
            run.tracker.log(training.step, **figures)
            lately.start(training.step)

    bar = tqdm(total=training.total_steps, initial=training.step, desc=role, unit="step", disable=run.hide_bars)
    with deferred_interrupts() as stop, bar:
        while training.step < training.total_steps:
            for measured in (lately, epoch):
                measured.start(training.step)
            epoch_end = (
                training.step - training.step % training.batches.steps_per_epoch + training.batches.steps_per_epoch
            )
            for terms in run_steps(training, epoch_end, stop, checkpoints, watch, history=history):  # noqa: B007
                report()
            speed = epoch.read(training.step)
            looked = describe_batch(training, seen.pop()) if seen else {}
            figures = evaluate(training.result, meta_validation, run.device, shared=True)
            history.append({"step": training.step, **figures})
            run.tracker.log(
                training.step,
                **{f"loss/{name}": float(value) for name, value in terms.items()},
                **{f"meta_validation/{name}": value for name, value in figures.items()},
                learning_rate=training.learning_rate,
                **({"balance": training.balance.weight} if training.balance else {}),
                **looked,
                **speed,
            )
            shown = f", top1 {figures['top1']:.2f}, lr {training.learning_rate:.4f}"
            bar.set_postfix_str(format_throughput(speed) + shown)
            checkpoints.save_training(training, history=history)
    path = run.path / f"{role}.safetensors"
    results = {"last": history[-1], "best": max(history, key=lambda row: row["top1"])}
    if not is_main():
        return path
    provenance = run.provenance() | {"meta_validation": results, "image_shape": list(train.image_shape)}
    save_network(path, training.result, architecture_of(model, train), provenance)
    run.tracker.keep(role, path, **results["last"])
    run.say(f"{path}: {results['last']['top1']:.2f} % on meta-validation (best epoch {results['best']['top1']:.2f} %)")
    return path


def start_training(
    model: ModelRecipe,
    train: ImageSet,
    loss: DistillationLoss,
    teacher: TeacherFunction | None,
    recipe: TrainRecipe,
    data: DataRecipe,
    seed: int,
    device: torch.device,
    shared: bool = False,
    balance: dict[str, Any] | str | None = None,
) -> Training:
    """A fresh training; equal seeds give equal initial weights and equal batches, whatever the loss.

    `shared`: the processes that have met do it together, each with its part of every batch; else each for itself.
    `balance`: what `build_balance` takes.
    """
    student = prepare_student(model, train, seed, device)
    part = (own_rank(), count_processes()) if shared else (0, 1)
    if part[0]:  # else dropout would drop the same in every process
        torch.manual_seed(seeded_generator(seed, 10, part[0]).initial_seed())
    batches = build_batches(train, recipe, data, seed, device, part)
    return Training(student, loss, teacher, batches, recipe, build_balance(balance, loss))
