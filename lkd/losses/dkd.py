"""Decoupled knowledge distillation (Zhao, Cui, Song, Qiu, Liang, CVPR 2022, arXiv 2203.08679)."""

import torch
from torch import Tensor, logsumexp
from torch.nn.functional import log_softmax

from lkd.core.outputs import Outputs
from lkd.losses.functions import check_batch, check_options, cross_entropies, label_of, widen
from lkd.losses.loss import DistillationLoss, Progress, Terms, read_progress


class DKDLoss(DistillationLoss):
    """task · CE + τ² · (alpha · TCKD + beta · NCKD).

    TCKD = KL(bᵀ ‖ bˢ), where b = (p_target, 1 − p_target); NCKD = KL(p̂ᵀ ‖ p̂ˢ), where p̂ is the softmax over the
    classes other than the target; both at temperature τ. (KD is TCKD + (1 − p_targetᵀ) · NCKD.) With two classes NCKD
    is 0. The authors' code takes the logarithm of a softmax, and masks the target with −1000, which overflow at logit
    gaps of about 100 τ; here the target is cut out and all is in log space. As in that code, the teacher's terms are
    ramped up linearly at the start of training: over 20 of 240 epochs on CIFAR-100 (the default), 1 of 100 on ImageNet;
    there in steps of an epoch, here of a batch.

    Args:
        task: Weight of cross-entropy.
        alpha: Weight of TCKD.
        beta: Weight of NCKD, tuned for each pair: 8 for many of CIFAR-100; 2, at τ = 1, for ResNet-50 → MobileNetV1 on
            ImageNet in the authors' recipes.
        temperature: τ.
        warmup: Part of the training over which the teacher's terms are ramped up from 0, in [0, 1]. Where `progress` is
            not given they have their full weight, as at 1.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self, task: float = 1.0, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, warmup: float = 1 / 12
    ) -> None:
        super().__init__()
        check_options(temperature, task=task, alpha=alpha, beta=beta, warmup=warmup)
        self.task, self.alpha, self.beta, self.temperature, self.warmup = task, alpha, beta, temperature, warmup

    def ramp(self, progress: Progress) -> float | Tensor:
        """The part of the teacher's terms that counts at this progress, in [0, 1]."""
        part = read_progress(progress)
        if not self.warmup:
            return 1.0
        part = part / self.warmup
        return part.clamp(max=1) if isinstance(part, Tensor) else min(part, 1.0)

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, progress: Progress = None) -> Terms:
        """Compute the terms `task`, `target_class` (TCKD) and `other_classes` (NCKD).

        Raises:
            ValueError: If `progress` is not in [0, 1].
        """
        target = check_batch(student, teacher, target)
        label = label_of(target)
        (binary_s, other_s), (binary_t, other_t) = (
            decouple(widen(outputs.logits) / self.temperature, label) for outputs in (student, teacher)
        )
        scale = self.ramp(progress) * self.temperature**2
        return {
            "task": self.task * cross_entropies(student.logits, target).mean(),
            "target_class": scale * self.alpha * (binary_t.exp() * (binary_t - binary_s)).sum(1).mean(),
            "other_classes": scale * self.beta * (other_t.exp() * (other_t - other_s)).sum(1).mean(),
        }


def decouple(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Split log-probabilities into target against rest, and among the rest.

    Args:
        logits: [B, C].
        label: [B].

    Returns:
        log (p_target, 1 − p_target), [B, 2], and the log-softmax over the other classes, [B, C − 1].
    """
    # By position, not by a mask: how many entries a mask has, a GPU would have to be asked.
    columns = torch.arange(logits.shape[1] - 1, device=logits.device)
    others = logits.gather(1, columns + (columns >= label.unsqueeze(1)))
    of_target = logits.gather(1, label.unsqueeze(1)).squeeze(1)
    binary = torch.stack([of_target, logsumexp(others, 1)], 1)
    return log_softmax(binary, 1), log_softmax(others, 1)
