"""The two divergences that every logit loss here is made of: float32, log space, one value a sample."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax


def widen(tensor: Tensor) -> Tensor:
    """At least float32, whatever the autocast state gave; float64 stays."""
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
