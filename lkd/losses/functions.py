"""What the losses here are made of: float32, log space, one value a sample; and calibration."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, normalize

from lkd.core.errors import UserError

# ----------------------------------------------------------------------------------------------------------------------
# Temperature scaling and calibration (Guo et al., 2017).

GOLDEN = (5**0.5 - 1) / 2


@torch.no_grad()
def find_best_temperature(logits: Tensor, target: Tensor, lowest: float = 0.05, highest: float = 20.0) -> float:
    """The temperature at which cross-entropy is least.

    By golden-section search over log τ, where the function has one minimum.

    Args:
        logits: [B, C].
        target: Class indices [B].
        lowest: Lower bound.
        highest: Upper bound.
    """

    def value(log_temperature: float) -> float:
        return float(cross_entropy(logits / torch.tensor(log_temperature).exp(), target))

    left, right = float(torch.tensor(lowest).log()), float(torch.tensor(highest).log())
    a, b = right - GOLDEN * (right - left), left + GOLDEN * (right - left)
    value_a, value_b = value(a), value(b)
    for _ in range(30):
        if value_a < value_b:
            right, b, value_b = b, a, value_a
            a = right - GOLDEN * (right - left)
            value_a = value(a)
        else:
            left, a, value_a = a, b, value_b
            b = left + GOLDEN * (right - left)
            value_b = value(b)
    return float(torch.tensor((left + right) / 2).exp())


def calibrated_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy at its best temperature: what a student knows, whatever its confidence.

    The temperature is a minimiser, so its own derivative is zero there and the gradient is exact (envelope theorem).
    """
    return cross_entropy(logits / find_best_temperature(logits.detach(), target), target)


def expected_calibration_error(probabilities: Tensor, target: Tensor, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal-width confidence bins (Guo et al., 2017), in [0, 1].

    Args:
        probabilities: [N, C].
        target: Class indices [N].
        bins: Number of bins.
    """
    confidence, predicted = probabilities.max(1)
    bin_of = (confidence * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64)
    gaps.index_add_(0, bin_of.cpu(), (confidence.double() - (predicted == target).double()).cpu())
    return float(gaps.abs().sum() / len(target))


# ----------------------------------------------------------------------------------------------------------------------
# What the losses here are made of: float32, log space, one value a sample.


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
