"""What a learned loss does with a batch: who pulls at the student, and how much."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot, softmax

from lkd.core.outputs import Outputs
from lkd.losses.functions import widen
from lkd.losses.learned.loss import LearnedLoss
from lkd.losses.loss import DistillationLoss, Terms

# ----------------------------------------------------------------------------------------------------------------------
# What a loss does to a student: its gradient over the confidence of student and teacher.


def confident_logits(confidence: Tensor, num_classes: int) -> Tensor:
    """Logits whose softmax gives the target, class 0, this probability and shares the rest evenly; [N] → [N, C]."""
    rest = ((1 - confidence) / (num_classes - 1)).log().unsqueeze(1).expand(-1, num_classes - 1)
    return torch.cat([confidence.log().unsqueeze(1), rest], 1)


def confidence_grid(points: int) -> Tensor:
    """Probabilities of the target from 0.01 to 0.99."""
    return torch.linspace(0.01, 0.99, points)


def draw_grid(num_classes: int, points: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of student and teacher at every pair of confidences, [points², C], and the label, class 0."""
    grid = confidence_grid(points)
    teacher, student = (axis.flatten() for axis in torch.meshgrid(grid, grid, indexing="ij"))
    ours, theirs = (confident_logits(confidence, num_classes) for confidence in (student, teacher))
    return ours, theirs, torch.zeros(len(student), dtype=torch.int64)


def gradient_surface(loss: DistillationLoss, progress: float, num_classes: int = 10, points: int = 41) -> Tensor:
    """The loss's gradient with respect to the student's logit of the target.

    [points, points]: rows are the teacher's probability of the target, columns the student's, as in `confidence_grid`.
    """
    student, teacher, target = draw_grid(num_classes, points)
    logits = student.requires_grad_()
    terms = loss(Outputs(logits, {}), Outputs(teacher, {}), target, progress)
    (gradient,) = torch.autograd.grad(torch.stack(list(terms.values())).sum(), logits)
    return (gradient[:, 0] * len(logits)).view(points, points)  # the loss is a mean over samples


def balance_surface(
    loss: LearnedLoss, progress: float, num_classes: int = 10, points: int = 41
) -> tuple[Tensor, Tensor]:
    """The learned weight and temperature on the same grid, both [points, points]."""
    student, teacher, target = draw_grid(num_classes, points)
    part: Any = loss.parts["logits"]
    with torch.no_grad():
        weight, temperature = part.weights_and_temperatures(student, teacher, target, progress)
    return weight.view(points, points), temperature.view(points, points)


# ----------------------------------------------------------------------------------------------------------------------
# How much of the gradient each part of a loss has: for the log, and to see a loss network that has saturated.

SATURATED = 1e-4


def gradient_shares(
    loss: Callable[..., Terms], student: Outputs, teacher: Outputs | None, target: Tensor, progress: float | None = None
) -> dict[str, float]:
    """Share of each term in the gradient at the student's outputs.

    A term's share is the norm of its gradient with respect to the logits and all features together, each taken as a
    variable of its own, over the sum of the terms' norms, or over cross-entropy's norm if that is larger. So shares add
    up to 1 unless the whole loss is weaker than cross-entropy.

    Args:
        loss: Any loss.
        student: The student's outputs; their graph, if any, is not followed.
        teacher: The teacher's outputs for the same images; None where the loss needs none.
        target: Class indices [B] or distributions [B, C].
        progress: How far the training is, in [0, 1].

    Returns:
        Term name → share, in [0, 1].
    """
    with torch.enable_grad():
        logits = student.logits.detach().requires_grad_()
        features = {stage: feature.detach().requires_grad_() for stage, feature in student.features.items()}
        terms = loss(Outputs(logits, features), teacher, target, progress)
        norms = {name: measure_norm(term, [logits, *features.values()]) for name, term in terms.items()}
    probabilities = softmax(widen(logits.detach()), 1)
    dense = target if target.is_floating_point() else one_hot(target, probabilities.shape[1])
    plain = float((probabilities - dense).norm()) / len(dense)
    whole = max(sum(norms.values()), plain, torch.finfo(torch.float32).tiny)
    return {name: norm / whole for name, norm in norms.items()}


def measure_norm(term: Tensor, variables: list[Tensor]) -> float:
    """Norm of a term's gradient with respect to all variables together; 0 if it depends on none."""
    if not term.requires_grad:
        return 0.0
    gradients = torch.autograd.grad(term, variables, retain_graph=True, allow_unused=True)
    squares = [g.float().square().sum() for g in gradients if g is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0  # a term may depend on the loss's own alone


def find_saturated(shares: dict[str, float], threshold: float = SATURATED) -> list[str]:
    """Names of the parts whose every term has a share under the threshold: loss networks that no longer teach.

    Of what `gradient_shares` returns for a `LearnedLoss`, whose terms are named `part/term`.
    """
    largest: dict[str, float] = {}
    for name, share in shares.items():
        part = name.partition("/")[0]
        largest[part] = max(largest.get(part, 0.0), share)
    return [part for part, share in largest.items() if not share >= threshold]
