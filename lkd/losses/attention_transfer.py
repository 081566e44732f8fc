"""Attention transfer (Zagoruyko, Komodakis, ICLR 2017, arXiv 1612.03928, eq. 2)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lkd.losses.functions import check_options, cross_entropies
from lkd.losses.stages import Stages, as_map, choose_pairs, pair_equal_sizes, shrink_to_smaller
from lkd.outputs import Outputs


class AttentionTransferLoss(nn.Module):
    """task · CE + distillation · Σ over pairs of the mean over batch and places of (Q(student) − Q(teacher))².

    Q is the map of squared activations, averaged over the channels, flattened and scaled to unit length. This is the
    authors' code, and its weight 1000 that of their recipe and RepDistiller's. The paper's eq. 2 has the plain distance
    ‖·‖₂, with ½, in place of the mean of squares. Where sizes differ, both features are averaged down to the smaller.

    Args:
        student_stages: The student's stages.
        teacher_stages: The teacher's stages.
        task: Weight of cross-entropy.
        distillation: Weight of the distance of the attention maps.
        stages: Pairs [student stage, teacher stage]; by default the deepest of each spatial size that both have.

    Raises:
        ValueError: If a stage does not exist or a weight is negative.
    """

    def __init__(
        self,
        student_stages: Stages,
        teacher_stages: Stages,
        task: float = 1.0,
        distillation: float = 1000.0,
        stages: list[list[str]] | None = None,
    ) -> None:
        super().__init__()
        check_options(task=task, distillation=distillation)
        self.task = task
        self.distillation = distillation
        self.pairs = choose_pairs(stages, student_stages, teacher_stages, pair_equal_sizes)
        self.teacher_stages = tuple(name for _, name in self.pairs)

    def forward(
        self, student: Outputs, teacher: Outputs, target: Tensor, progress: float | None = None
    ) -> dict[str, Tensor]:
        """Compute the terms `task` and `distillation`.

        Args:
            student: The student's outputs.
            teacher: The teacher's outputs for the same images.
            target: Class indices [B] or distributions [B, C].
            progress: Ignored.
        """
        distances = []
        for s, t in self.pairs:
            ours, theirs = shrink_to_smaller(as_map(student.features[s]), as_map(teacher.features[t]))
            distances.append((attention(ours) - attention(theirs)).square().mean())
        return {
            "task": self.task * cross_entropies(student.logits, target).mean(),
            "distillation": self.distillation * torch.stack(distances).sum(),
        }


def attention(feature: Tensor) -> Tensor:
    """The attention map, [B, c, h, w] → [B, h · w], of unit length."""
    return normalize(feature.square().mean(1).flatten(1), dim=1)
