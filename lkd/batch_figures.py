"""What a training's log says of one batch: who pulls at the student, and does it answer as its teacher does."""

from typing import Any

import torch
from torch import Tensor, nn

from lkd.data import Batch
from lkd.losses.learned import gradient_shares
from lkd.outputs import Outputs
from lkd.training import Training

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
    if training.needs_index:
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
