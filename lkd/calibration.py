"""Temperature scaling and calibration (Guo et al., 2017)."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

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
