"""Outer objectives: what a student's answers on a meta-validation batch are worth; the loss networks descend it.

LKD takes cross-entropy; the others are ours.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from lkd.calibration import calibrated_cross_entropy


def brier_score(logits: Tensor, target: Tensor) -> Tensor:
    """Squared distance of the probabilities to the one-hot label, mean over samples (Brier, 1950), in [0, 2].

    Args:
        logits: [B, C].
        target: Class indices [B].
    """
    return (logits.softmax(1) - one_hot(target, logits.shape[1])).square().sum(1).mean()


def smoothed_error(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """The error rate with its step replaced by a sigmoid of the margin, in (0, 1).

    Mean of σ(−(z_y − max_{j≠y} z_j) / temperature): as the temperature goes to 0, the fraction of wrong answers.

    Args:
        logits: [B, C].
        target: Class indices [B].
        temperature: Width of the step, in units of the logits.
    """
    of_label = one_hot(target, logits.shape[1]).bool()
    rival = logits.masked_fill(of_label, float("-inf")).amax(1)
    own = logits.gather(1, target.unsqueeze(1)).squeeze(1)
    return ((rival - own) / temperature).sigmoid().mean()


OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": cross_entropy,
    "calibrated_cross_entropy": calibrated_cross_entropy,
    "brier": brier_score,
    "smoothed_error": smoothed_error,
}
