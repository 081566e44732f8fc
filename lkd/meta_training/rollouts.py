"""One rollout: what meta-training differentiates, and what ranking fidelity measures."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, one_hot

from lkd.config.parts import DataRecipe, TrainRecipe
from lkd.core.outputs import Outputs
from lkd.core.random import draw_positions, seeded_generator
from lkd.data.batches import Batches
from lkd.data.images import Batch, ImageSet
from lkd.losses.functions import calibrated_cross_entropy
from lkd.models.teacher import TeacherFunction
from lkd.training.build import build_batches
from lkd.training.optimizer import build_optimizer, check_differentiable
from lkd.training.training import keep_stages
from meta import Tensors, call_module
from meta.optim import Clipped, Optimizer, from_torch

# ----------------------------------------------------------------------------------------------------------------------
# Outer objectives: what a student's answers on a meta-validation batch are worth; the loss networks descend it. LKD
# takes cross-entropy; the others are ours.


def brier_score(logits: Tensor, target: Tensor) -> Tensor:
    """Squared distance of the probabilities to the one-hot label, mean over samples (Brier, 1950), in [0, 2].

    Args:
        logits: [B, C].
        target: Class indices [B].
    """
    return (logits.softmax(1) - one_hot(target, logits.shape[1])).square().sum(1).mean()


def smoothed_error(logits: Tensor, target: Tensor) -> Tensor:
    """The error rate with its step replaced by a sigmoid of the margin, in (0, 1).

    Mean of σ(−(z_y − max_{j≠y} z_j)): as the logits grow, the fraction of wrong answers.

    Args:
        logits: [B, C].
        target: Class indices [B].
    """
    of_label = one_hot(target, logits.shape[1]).bool()
    rival = logits.masked_fill(of_label, float("-inf")).amax(1)
    own = logits.gather(1, target.unsqueeze(1)).squeeze(1)
    return (rival - own).sigmoid().mean()


OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": cross_entropy,
    "calibrated_cross_entropy": calibrated_cross_entropy,
    "brier": brier_score,
    "smoothed_error": smoothed_error,
}


# ----------------------------------------------------------------------------------------------------------------------
# One rollout: what meta-training differentiates, and what ranking fidelity measures. *Our reconstruction* of LKD's
# inner loop: K steps of the student's own optimiser from a student of the pool.

InnerBatch = tuple[Batch, Outputs, float]
"""Images and labels, the teacher's outputs for them, and the progress that the loss is told."""


def half_cosine(progress: float) -> float:
    """From 1 at progress 0 to 0 at progress 1."""
    return (1 + math.cos(math.pi * progress)) / 2


def build_inner_optimizer(
    student: nn.Module, train: TrainRecipe, learning_rate: float, annealing: str, steps: int
) -> Optimizer:
    """The training's optimiser with its groups and clipping; the rate is constant, or annealed to zero (`cosine`)."""
    check_differentiable(train)
    optimizer = build_optimizer(student, train)
    for group in optimizer.param_groups:
        own = learning_rate * group.get("lr_scale", 1.0)
        group["lr"] = own if annealing == "constant" else partial(anneal, own, steps)
    functional = from_torch(optimizer, student)
    return Clipped(functional, train.clip_norm) if train.clip_norm else functional


def anneal(learning_rate: float, steps: int, step: int) -> float:
    """The rate of a step of a rollout of so many steps."""
    return learning_rate * half_cosine(step / steps)


def build_rollout_batches(
    images: ImageSet, train: TrainRecipe, steps: int, epochs: int, seed: int, data: DataRecipe, device: torch.device
) -> Batches:
    """The batches of one rollout, a function of the seed: of so many images that it sees each of them `epochs` times.

    A training sees its images again and again, and what a loss does against overfitting shows only then. A rollout
    over all images (one epoch) sees none twice, and so favours losses that learn fast.
    """
    if epochs > 1:
        count = min(len(images), max(1, round(steps / epochs)) * train.batch_size)
        images = images.select(draw_positions(len(images), count, seeded_generator(seed, 9)))
    return build_batches(images, train, data, seed, device, steps=steps)


def list_inner_batches(
    batches: Batches, teacher: TeacherFunction, age: float, steps: int, stages: tuple[str, ...]
) -> list[InnerBatch]:
    """The batches of a rollout; progress runs from the student's age to 1, so that it stands for a whole training.

    Of the teacher's features those of `stages` are kept: all batches are held at once.
    """
    inner_batches = []
    for step in range(steps):
        batch = batches.at(step)
        inner_batches.append((batch, keep_stages(teacher(batch), stages), age + (1 - age) * step / steps))
    return inner_batches


def compute_inner_loss(
    student: nn.Module, loss: nn.Module, parameters: Tensors, buffers: Tensors, hyper: Tensors, batch: InnerBatch
) -> tuple[Tensor, Tensors]:
    """The loss of one student step, and the student's buffers after it.

    `hyper`: parameters of the loss; those left out keep the module's own values.
    """
    images, teacher, progress = batch
    outputs, buffers = call_module(student, parameters, buffers, images.images)
    terms = functional_call(loss, hyper, (outputs, teacher, images.target, progress))
    return torch.stack(list(terms.values())).sum(), buffers


def compute_outer_logits(student: nn.Module, parameters: Tensors, buffers: Tensors, batch: Batch) -> Tensor:
    """The student's logits [B, C] of a meta-validation batch.

    In train mode BatchNorm uses the batch's own statistics: the running ones have no derivative.
    """
    outputs, _ = call_module(student, parameters, buffers, batch.images)
    return outputs.logits
