"""What the losses here are made of: float32, log space, one value a sample."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, normalize

from lkd.errors import UserError


def widen(tensor: Tensor) -> Tensor:
    """At least float32, whatever the autocast state gave; float64 stays.

    Every loss widens its logits, so that all say the same of a batch of no images, whose mean is not a number.

    Raises:
        UserError: If the batch is empty.
    """
    if tensor.shape[:1] == (0,):
        raise UserError("loss: the batch is empty, and the mean of nothing is no number; give at least one image")
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def cross_entropies(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each sample, [B].

    Args:
        logits: [B, C].
        target: Class indices [B], or distributions [B, C].
    """
    logits = widen(logits)
    return cross_entropy(logits, target.to(logits.dtype) if target.is_floating_point() else target, reduction="none")


def kl_divergences(student_logits: Tensor, teacher_logits: Tensor, temperature: Tensor | float) -> Tensor:
    """KL(teacher ‖ student) of each sample at a temperature, without the factor τ², [B].

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C].
        temperature: A number, or one for each sample, [B, 1].
    """
    student = log_softmax(widen(student_logits) / temperature, 1)
    teacher = log_softmax(widen(teacher_logits) / temperature, 1)
    return (teacher.exp() * (teacher - student)).sum(1)


def label_of(target: Tensor) -> Tensor:
    """Class indices [B] of a target: itself, or the most probable class of distributions [B, C]."""
    return target.argmax(1) if target.is_floating_point() else target


def pearson_correlations(a: Tensor, b: Tensor, eps: float = 1e-8) -> Tensor:
    """Pearson's correlation of each row of `a` with that row of `b`, [N, M] → [N]; 0 where a row is constant."""
    a, b = (normalize(centre(x), dim=1, eps=eps) for x in (a, b))
    return (a * b).sum(1)


def centre(rows: Tensor) -> Tensor:
    """Rows less their mean, [N, M]; exactly 0 where a row is constant, whatever its mean is rounded to."""
    centred = rows - rows.mean(1, keepdim=True)
    rounding = 4 * torch.finfo(rows.dtype).eps * rows.abs().amax(1, keepdim=True)
    return centred * (centred.abs().amax(1, keepdim=True) > rounding)


def check_options(temperature: float | None = None, **weights: float) -> None:
    """Check a loss's options.

    Raises:
        ValueError: If the temperature is not positive or a weight is negative.
    """
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature: {temperature} is not positive")
    for name, weight in weights.items():
        if not weight >= 0:
            raise ValueError(f"{name}: {weight} is negative")
