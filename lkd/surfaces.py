"""What a loss does to a student: its gradient over the confidence of student and teacher."""

from typing import Any

import torch
from torch import Tensor, nn

from lkd.losses import LearnedLoss
from lkd.outputs import Outputs


def confident_logits(confidence: Tensor, num_classes: int) -> Tensor:
    """Logits whose softmax gives the target, class 0, this probability and shares the rest evenly; [N] → [N, C]."""
    rest = ((1 - confidence) / (num_classes - 1)).log().unsqueeze(1).expand(-1, num_classes - 1)
    return torch.cat([confidence.log().unsqueeze(1), rest], 1)


def confidence_grid(points: int) -> Tensor:
    """Probabilities of the target from 0.01 to 0.99."""
    return torch.linspace(0.01, 0.99, points)


def gradient_surface(loss: nn.Module, progress: float, num_classes: int = 10, points: int = 41) -> Tensor:
    """The loss's gradient with respect to the student's logit of the target.

    Args:
        loss: Any loss over logits.
        progress: How far the training is.
        num_classes: Number of classes.
        points: Points along each axis of `confidence_grid`.

    Returns:
        [points, points]; rows are the teacher's probability of the target, columns the student's.
    """
    grid = confidence_grid(points)
    teacher, student = (axis.flatten() for axis in torch.meshgrid(grid, grid, indexing="ij"))
    logits = confident_logits(student, num_classes).requires_grad_()
    target = torch.zeros(len(logits), dtype=torch.int64)
    outputs = Outputs(confident_logits(teacher, num_classes), {})
    terms = loss(Outputs(logits, {}), outputs, target, progress)
    (gradient,) = torch.autograd.grad(torch.stack(list(terms.values())).sum(), logits)
    return (gradient[:, 0] * len(logits)).view(points, points)  # the loss is a mean over samples


def balance_surface(
    loss: LearnedLoss, progress: float, num_classes: int = 10, points: int = 41
) -> tuple[Tensor, Tensor]:
    """The learned weight and temperature on the same grid, both [points, points]."""
    grid = confidence_grid(points)
    teacher, student = (axis.flatten() for axis in torch.meshgrid(grid, grid, indexing="ij"))
    part: Any = loss.parts["logits"]
    with torch.no_grad():
        weight, temperature = part.weights_and_temperatures(
            confident_logits(student, num_classes),
            confident_logits(teacher, num_classes),
            torch.zeros(len(student), dtype=torch.int64),
            progress,
        )
    return weight.view(points, points), temperature.view(points, points)
