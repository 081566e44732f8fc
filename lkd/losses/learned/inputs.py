"""What the loss networks see: of each sample, and of each class of each sample.

Nothing here depends on the order or the number of the classes, nor on a constant added to all logits.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, one_hot

from lkd.losses.functions import widen
from lkd.losses.loss import Progress

CONDITIONING = ("progress", "state")
# Input → the kind of conditioning that it belongs to; the teacher's are always seen.
SAMPLE_INPUTS: dict[str, str | None] = {
    "student target probability": "state",
    "teacher target probability": None,
    "student entropy": "state",
    "teacher entropy": None,
    "KL": "state",
    "progress": "progress",
}
CLASS_INPUTS = (
    "student standardised logit",
    "teacher standardised logit",
    "student log-probability",
    "teacher log-probability",
    "student probability",
    "teacher probability",
    "label",
)


class LogProbabilities(NamedTuple):
    """Logits in log space, and the target as a distribution; all [B, C], at least float32."""

    student: Tensor
    teacher: Tensor
    target: Tensor


def read_logits(student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> LogProbabilities:
    """Bring logits and target to one form.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C]; no gradient reaches them.
        target: Class indices [B] or distributions [B, C].
    """
    student = log_softmax(widen(student_logits), 1)
    dense = target if target.is_floating_point() else one_hot(target, student.shape[1])
    return LogProbabilities(student, log_softmax(widen(teacher_logits.detach()), 1), dense.to(student.dtype))


def check_conditioning(conditioning: Sequence[str]) -> list[str]:
    """The kinds of conditioning, in the order of `CONDITIONING`.

    Raises:
        ValueError: If one is unknown.
    """
    unknown = [kind for kind in conditioning if kind not in CONDITIONING]
    if isinstance(conditioning, str) or unknown:
        raise ValueError(f"conditioning: {conditioning!r} is not a list of some of {', '.join(CONDITIONING)}")
    return [kind for kind in CONDITIONING if kind in conditioning]


def name_sample_inputs(conditioning: Sequence[str]) -> list[str]:
    """Names of the columns of `sample_inputs`."""
    return [name for name, kind in SAMPLE_INPUTS.items() if kind is None or kind in conditioning]


def sample_inputs(logs: LogProbabilities, progress: Progress, conditioning: Sequence[str]) -> Tensor:
    """What is seen of each sample, in [−1, 1], [B, inputs].

    The teacher's probability of the target and its entropy over log C; with `state` also the student's, and the
    squashed KL divergence between the two; with `progress` how far the training is.

    Args:
        logs: The batch.
        progress: In [0, 1]; none is taken as 0.
        conditioning: Some of `CONDITIONING`.
    """
    student, teacher, target = logs
    columns = [
        (target * student.exp()).sum(1),
        (target * teacher.exp()).sum(1),
        -(student.exp() * student).sum(1) / math.log(student.shape[1]),
        -(teacher.exp() * teacher).sum(1) / math.log(student.shape[1]),
        squashed_divergence(student, teacher),
        as_progress(progress, student).expand(student.shape[0]),
    ]
    chosen = name_sample_inputs(conditioning)
    return 2 * torch.stack([c for name, c in zip(SAMPLE_INPUTS, columns, strict=True) if name in chosen], 1) - 1


def class_inputs(logs: LogProbabilities) -> Tensor:
    """What is seen of each class of each sample, in [−1, 1], [B, C, len(CLASS_INPUTS)]."""
    student, teacher, target = logs
    columns = [
        squash(standardize(student)),
        squash(standardize(teacher)),
        squash(student / 4),
        squash(teacher / 4),
        2 * student.exp() - 1,
        2 * teacher.exp() - 1,
        2 * target - 1,
    ]
    return torch.stack(columns, 2)


def as_progress(progress: Progress, like: Tensor) -> Tensor:
    """Progress as a scalar tensor."""
    return torch.as_tensor(0.0 if progress is None else progress, dtype=like.dtype, device=like.device)


def squashed_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL / (1 + KL) between teacher and student, from log-probabilities [B, C], [B]."""
    divergence = (teacher.exp() * (teacher - student)).sum(1)
    return divergence / (1 + divergence)


def squash(x: Tensor) -> Tensor:
    """Map x to x / √(1 + x²): smooth, in (−1, 1), and so flat far out that x times its slope vanishes there."""
    return x * (1 + x.square()).rsqrt()


def standardize(logits: Tensor) -> Tensor:
    """Logits of mean 0 over the classes, over √(1 + their variance), [B, C]."""
    centred = logits - logits.mean(1, keepdim=True)
    return centred * (1 + centred.square().mean(1, keepdim=True)).rsqrt()
