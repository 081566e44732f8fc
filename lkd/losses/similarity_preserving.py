"""Similarity-preserving distillation (Tung, Mori, ICCV 2019, arXiv 1907.09682)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lkd.losses.functions import check_options, cross_entropies
from lkd.losses.stages import Stages, as_map, choose_pairs, pair_last
from lkd.outputs import Outputs


class SimilarityPreservingLoss(nn.Module):
    """task · CE + distillation / B² · Σ over pairs of ‖G(teacher) − G(student)‖²_F.

    G = Q Qᵀ with rows scaled to unit length, Q being the flattened features of the batch, [B, c · h · w]: no shapes
    need agree. The weight 3000 is that of RepDistiller's recipe.

    Args:
        student_stages: The student's stages.
        teacher_stages: The teacher's stages.
        task: Weight of cross-entropy.
        distillation: Weight of the distance of the similarities.
        stages: Pairs [student stage, teacher stage]; by default the last stages.

    Raises:
        ValueError: If a stage does not exist or a weight is negative.
    """

    def __init__(
        self,
        student_stages: Stages,
        teacher_stages: Stages,
        task: float = 1.0,
        distillation: float = 3000.0,
        stages: list[list[str]] | None = None,
    ) -> None:
        super().__init__()
        check_options(task=task, distillation=distillation)
        self.task = task
        self.distillation = distillation
        self.pairs = choose_pairs(stages, student_stages, teacher_stages, pair_last)
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
        with torch.autocast(student.logits.device.type, enabled=False):
            distances = [
                (similarities(student.features[s]) - similarities(teacher.features[t])).square().mean()
                for s, t in self.pairs
            ]
        return {
            "task": self.task * cross_entropies(student.logits, target).mean(),
            "distillation": self.distillation * torch.stack(distances).sum(),
        }


def similarities(feature: Tensor) -> Tensor:
    """Products between the images of a batch, rows of unit length, [B, ...] → [B, B]."""
    flat = as_map(feature).flatten(1)
    return normalize(flat @ flat.T, dim=1)
