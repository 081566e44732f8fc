"""Relational knowledge distillation (Park, Kim, Lu, Cho, CVPR 2019, arXiv 1904.05068)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, smooth_l1_loss

from lkd.errors import UserError
from lkd.losses.functions import check_options, cross_entropies
from lkd.losses.stages import Stages, choose_pairs, pair_last, pool
from lkd.outputs import Outputs


class RKDLoss(nn.Module):
    """task · CE + distance · Huber(distances of pairs) + angle · Huber(angles of triplets).

    The features are averaged over places (the networks' embeddings). Distances are Euclidean, over the batch's mean
    distance; angles are cosines at each image between any two others; the gradient passes through the mean distance, as
    in the authors' code. The Huber means are over all B² and B³ entries, those with equal images included, as there.
    The weights 25 and 50 are RepDistiller's.

    Args:
        student_stages: The student's stages.
        teacher_stages: The teacher's stages.
        task: Weight of cross-entropy.
        distance: Weight of the distances.
        angle: Weight of the angles; takes memory in the cube of the batch.
        stages: One pair [student stage, teacher stage] or more; by default the last stages.

    Raises:
        ValueError: If a stage does not exist or a weight is negative.
    """

    def __init__(
        self,
        student_stages: Stages,
        teacher_stages: Stages,
        task: float = 1.0,
        distance: float = 25.0,
        angle: float = 50.0,
        stages: list[list[str]] | None = None,
    ) -> None:
        super().__init__()
        check_options(task=task, distance=distance, angle=angle)
        self.task = task
        self.distance = distance
        self.angle = angle
        self.pairs = choose_pairs(stages, student_stages, teacher_stages, pair_last)
        self.teacher_stages = tuple(name for _, name in self.pairs)

    def forward(
        self, student: Outputs, teacher: Outputs, target: Tensor, progress: float | None = None
    ) -> dict[str, Tensor]:
        """Compute the terms `task`, `distance` and `angle`.

        Args:
            student: The student's outputs.
            teacher: The teacher's outputs for the same images.
            target: Class indices [B] or distributions [B, C].
            progress: Ignored.

        Raises:
            UserError: If the batch holds one image.
        """
        if len(student.logits) < 2:
            raise UserError("loss 'rkd' compares images with each other: a batch of 1 has none; raise train.batch_size")
        with torch.autocast(student.logits.device.type, enabled=False):
            embeddings = [(pool(student.features[s]), pool(teacher.features[t])) for s, t in self.pairs]
            distance = torch.stack([smooth_l1_loss(distances(ours), distances(theirs)) for ours, theirs in embeddings])
            angle = torch.stack([smooth_l1_loss(angles(ours), angles(theirs)) for ours, theirs in embeddings])
        return {
            "task": self.task * cross_entropies(student.logits, target).mean(),
            "distance": self.distance * distance.sum(),
            "angle": self.angle * angle.sum(),
        }


def distances(embedding: Tensor, eps: float = 1e-12) -> Tensor:
    """Distances between the images of a batch over their mean, [B, d] → [B, B]."""
    squares = embedding.square().sum(1)
    apart = (squares.unsqueeze(1) + squares - 2 * embedding @ embedding.T).clamp_min(eps).sqrt()
    apart = apart * (1 - torch.eye(len(apart), dtype=apart.dtype, device=apart.device))
    return apart / (apart.sum() / (apart.numel() - len(apart)))


def angles(embedding: Tensor) -> Tensor:
    """Cosine at each image between the directions to any two others, [B, d] → [B, B, B]."""
    directions = normalize(embedding.unsqueeze(0) - embedding.unsqueeze(1), dim=2)
    return directions @ directions.transpose(1, 2)
