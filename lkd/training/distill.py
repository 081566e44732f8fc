"""Train a network to the end: checkpoints, log, meta-validation after every epoch if there is any."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lkd.balance.balancing import Balancing
from lkd.config.parts import TrainRecipe
from lkd.core.distributed import count_processes, is_main, own_rank
from lkd.core.errors import UserError
from lkd.core.interrupt import deferred_interrupts
from lkd.core.outputs import Outputs
from lkd.core.random import seeded_generator
from lkd.data.images import Batch
from lkd.data.splits import interleave_classes
from lkd.influence.weighted_loss import InfluenceWeightedLoss
from lkd.losses.learned.shares import gradient_shares
from lkd.losses.logits import CrossEntropyLoss
from lkd.losses.loss import DistillationLoss
from lkd.models.build import running_dry
from lkd.models.files import save_network
from lkd.models.teacher import TeacherFunction
from lkd.tracking.run import Run
from lkd.training.answers import check_same_images, measure_teacher, prepare_teacher
from lkd.training.build import Images, Parts, StudentBuilder, build_batches
from lkd.training.checkpoints import Checkpoints, run_steps
from lkd.training.evaluate import evaluate
from lkd.training.introduce import introduce_images, introduce_network, introduce_teacher
from lkd.training.throughput import Throughput, format_throughput
from lkd.training.training import Training, check_settings

FIRST_PAUSE = 1.0  # seconds between the first reports of how fast it goes
REPORTS = 1000  # after so many they are logged half as often
SHARE = "share/"
Seen = tuple[Batch, Outputs | None, float]  # batch, teacher's outputs, progress


def distill(
    parts: Parts, train: TrainRecipe, seed: int, run: Run, labelled_size: int = 0, report_test: bool = False
) -> Path:
    """Train a student with any loss.

    `labelled_size`: training images whose labels are known; 0 for all. `report_test`: whether the last weights are
    measured on the test split, once, at the end.

    Returns:
        The student's file, with the last weights; its provenance holds the meta-validation figures of the last and of
        the best epoch, or None, and trust where the loss reads it.
    """
    images, loss = parts.images, parts.loss
    if report_test and not len(images.test):
        raise UserError("report_test: images that are given from Python have no test split; evaluate the student there")
    check_same_images(images, run)
    run.say(introduce_images(images))
    batches = build_batches(images.train, train, images.settings, seed, run.device, (0, count_processes()))
    check_settings(train, batches, loss, parts.balance)  # before the teacher is asked about all images
    known = select_labelled(images, labelled_size)
    if labelled_size:
        parts.teacher.check_classes(images.train)
    run.say(introduce_network("student", parts.student, images, run.device, train, count_processes()))
    run.say(introduce_teacher(parts.teacher, images, run.device))
    run.say(f"loss: {parts.loss_title}")
    if isinstance(loss, InfluenceWeightedLoss) and not loss.known and loss.settings.first_epoch >= train.epochs:
        run.say(
            f"warning: loss 'influence_weighted': first_epoch: {loss.settings.first_epoch} never comes in "
            f"train.epochs, {train.epochs}, so that all weights stay 1"
        )
    teacher = None
    if loss.needs_teacher or labelled_size:
        teacher = prepare_teacher(parts.teacher, images, run.device, loss.teacher_stages, train)
    told = {}
    if loss.reads_trust:
        eager = None if train.compile else teacher  # else it would be compiled for batches of an evaluation
        trust = measure_teacher(parts.teacher, known, run.device, eager)
        loss.set_trust(trust)
        run.say(str(trust))
        told = {"trust": trust.figures.to_json()}
    labelled = label_by_teacher(images, labelled_size, teacher, run.device) if teacher else images
    asked = teacher if loss.needs_teacher else None
    training = start_training(
        parts.student, labelled, loss, asked, train, seed, run.device, shared=True, balance=parts.balance
    )
    return train_to_the_end(training, labelled, parts.student, run, "student", told, report_test)


def train_teacher(
    student: StudentBuilder, images: Images, train: TrainRecipe, seed: int, run: Run, report_test: bool = False
) -> Path:
    """Train a teacher, a student of cross-entropy; its file."""
    check_same_images(images, run)
    run.say(introduce_images(images))
    run.say(introduce_network("teacher", student, images, run.device, train, count_processes()))
    training = start_training(student, images, CrossEntropyLoss(), None, train, seed, run.device, shared=True)
    return train_to_the_end(training, images, student, run, "teacher", report_test=report_test)


def start_training(
    student: StudentBuilder,
    images: Images,
    loss: DistillationLoss,
    teacher: TeacherFunction | None,
    train: TrainRecipe,
    seed: int,
    device: torch.device,
    shared: bool = False,
    balance: Balancing | None = None,
) -> Training:
    """A fresh training; equal seeds give equal initial weights and equal batches, whatever the loss.

    `shared`: the processes that have met do it together, each with its part of every batch; else each for itself.
    """
    network = student.build(seed, device)
    part = (own_rank(), count_processes()) if shared else (0, 1)
    if part[0]:  # else dropout would drop the same in every process
        torch.manual_seed(seeded_generator(seed, 10, part[0]).initial_seed())
    batches = build_batches(images.train, train, images.settings, seed, device, part)
    return Training(network, loss, teacher, batches, train, balance)


def train_to_the_end(
    training: Training,
    images: Images,
    student: StudentBuilder,
    run: Run,
    role: str,
    known: Mapping[str, Any] = MappingProxyType({}),
    report_test: bool = False,
) -> Path:
    """Train, evaluating after every epoch if there is meta-validation; resume from the run's checkpoint if it has one.

    `known`: what else the file's provenance is to say. `report_test`: read the test split, once, at the end.

    Raises:
        Interrupted: On Ctrl-C or SIGTERM, after saving a checkpoint.
    """
    checkpoints = Checkpoints(run.path / "checkpoints", training.recipe, run.say)
    history: list[dict[str, Any]] = checkpoints.resume_training(training).get("history", [])
    kept: dict[str, Any] = {"history": history}
    steps, scored = training.batches.steps_per_epoch, len(images.meta_validation) > 0
    lately, epoch = (Throughput(training.clock, training.batches.batch_size) for _ in range(2))
    reports, shown = 0, ""
    seen: list[Seen] = []

    def watch(batch: Seen) -> None:
        if (training.step + 1) % steps == 0 and is_main():
            seen[:] = [batch]

    def weight() -> dict[str, float]:
        return {"balance": training.balance.weight} if training.balance else {}

    bar = tqdm(total=training.total_steps, initial=training.step, desc=role, unit="step", disable=run.hide_bars)
    with deferred_interrupts() as stop, bar:
        while training.step < training.total_steps:
            for measured in (lately, epoch):
                measured.start(training.step)
            end = training.step - training.step % steps + steps
            for terms in run_steps(training, end, stop, checkpoints, watch, **kept):  # noqa: B007
                bar.update()
                if lately.elapsed >= FIRST_PAUSE * 2 ** (max(reports - 1, 0) // REPORTS):
                    reports += 1
                    speed = lately.read(training.step)
                    bar.set_postfix_str(format_throughput(speed) + shown)
                    run.tracker.log(training.step, **speed, **weight())
                    lately.start(training.step)
            speed = epoch.read(training.step)
            looked = describe_batch(training, seen.pop()) if seen else {}
            figures = evaluate(training.result, images.meta_validation, run.device, shared=True) if scored else {}
            history.append({"step": training.step, **figures})
            run.tracker.log(
                training.step,
                **{f"loss/{name}": float(value) for name, value in terms.items()},
                **{f"meta_validation/{name}": value for name, value in figures.items()},
                learning_rate=training.learning_rate,
                **weight(),
                **looked,
                **speed,
            )
            reached = f", top1 {figures['top1']:.2f}" if scored else ""
            shown = f"{reached}, lr {training.learning_rate:.4f}"
            bar.set_postfix_str(format_throughput(speed) + shown)
            checkpoints.save_training(training, **kept)
    path = run.path / f"{role}.safetensors"
    results = {"last": history[-1], "best": max(history, key=lambda row: row["top1"])} if scored else None
    tested = evaluate(training.result, images.test, run.device, shared=True) if report_test else None
    if is_main():
        provenance = run.provenance() | {"meta_validation": results, "image_shape": list(images.train.image_shape)}
        provenance |= {"split": images.fingerprint, **known, **({"test": tested} if tested else {})}
        save_network(path, training.result, student.architecture, provenance, images.train)
        run.tracker.keep(role, path, **history[-1])
        if results:
            top1 = {name: row["top1"] for name, row in results.items()}
            run.say(f"{path}: {top1['last']:.2f} % on meta-validation (best epoch {top1['best']:.2f} %)")
        else:
            run.say(f"{path}: the last weights, not evaluated: data.meta_validation_size is 0")
        if tested:
            run.tracker.log(training.step, **{f"test/{name}": value for name, value in tested.items()})
            run.say(f"test split, read once: top1 {tested['top1']:.2f} %, cross-entropy {tested['cross_entropy']:.4f}")
    return path


def describe_batch(training: Training, seen: Seen) -> dict[str, float]:
    """Who pulls at the student: figures of a batch that it was just trained on. Nothing of the training changes.

    `seen`: what `Training.run_step` told its `watch` in the latest step.

    Returns:
        `gradient_norm`: of the step, of all that is trained, before clipping; `train/agreement`: percent of the images
        that student and teacher give the same class, where they have as many; `share/TERM`: each term's share of the
        gradient at the student's outputs (`gradient_shares`), weighed as the balance does. A loss that remembers images
        is not asked for shares: asking would change its memory.
    """
    batch, teacher, progress = seen
    trained = [parameter for group in training.optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    norm = training.norm_before_clipping if training.is_clipped else torch.nn.utils.get_total_norm(gradients)
    figures = {"gradient_norm": float(norm)}
    with running_dry(training.student):
        student: Outputs = training.student(batch.images)
    if teacher is not None and teacher.logits.shape == student.logits.shape:  # else its classes are others
        same = student.logits.argmax(1) == teacher.logits.argmax(1)
        figures["train/agreement"] = 100 * same.float().mean().item()
    if training.loss.needs_index:
        return figures

    def weighed(*arguments: Any) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = training.loss(*arguments)
        return training.balance.scale(terms) if training.balance else terms

    remembered = {name: buffer.clone() for name, buffer in training.loss.named_buffers()}
    with torch.random.fork_rng([batch.images.device] if batch.images.is_cuda else []):  # a loss may draw
        shares = gradient_shares(weighed, student, teacher, batch.target, progress)
    for name, buffer in training.loss.named_buffers():
        if name in remembered:
            buffer.data.copy_(remembered[name])
    return figures | {SHARE + name: share for name, share in shares.items()}


def order_labels(images: Images, labelled_size: int) -> Tensor:
    """Positions of the training images, those that keep their labels first, [N]."""
    train = images.train
    if labelled_size > len(train):
        raise UserError(f"labelled_size: {labelled_size} is not between 0 (all) and the {len(train)} training images")
    return interleave_classes(train.labels, train.num_classes, images.settings.split_seed)


def select_labelled(images: Images, labelled_size: int) -> Images:
    """Without the training images whose labels are not known; 0 where all are."""
    if not labelled_size:
        return images
    return replace(images, train=images.train.select(order_labels(images, labelled_size)[:labelled_size]))


def label_by_teacher(images: Images, labelled_size: int, teacher: TeacherFunction, device: torch.device) -> Images:
    """Semi-supervised: keep the labels of some training images, give the others the teacher's most probable class.

    *Our reconstruction* of KD-AIF's semi-supervised form; its objective we could not read.

    `images`: the images; which ones keep theirs is a function of the split's seed.
    `labelled_size`: how many keep theirs, as balanced over the classes as the images are; 0 for all.
    """
    train = images.train
    if not labelled_size:
        return images
    unlabelled = order_labels(images, labelled_size)[labelled_size:]
    labels = train.labels.clone()
    place_of = {int(index): place for place, index in zip(unlabelled.tolist(), train.index[unlabelled], strict=True)}
    for batch in train.batches(unlabelled.split(train.at_once), device):
        labels[[place_of[int(index)] for index in batch.index]] = teacher(batch).logits.argmax(1).cpu()
    return replace(images, train=train.relabel(labels))
