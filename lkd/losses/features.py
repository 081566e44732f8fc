"""Hand-made losses over features: FitNets, attention transfer, similarity-preserving and relational distillation."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, smooth_l1_loss

from lkd.core.errors import UserError
from lkd.core.outputs import Outputs
from lkd.losses.functions import check_options, cross_entropies
from lkd.losses.loss import DistillationLoss, Progress
from lkd.losses.stages import (
    Stages,
    as_map,
    build_adapter,
    choose_pairs,
    pair_equal_sizes,
    pair_last,
    pair_middle,
    pool,
    shrink_to_smaller,
)

# ----------------------------------------------------------------------------------------------------------------------
# Attention transfer (Zagoruyko, Komodakis, ICLR 2017, arXiv 1612.03928, eq. 2).


class AttentionTransferLoss(DistillationLoss):
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
        self, student: Outputs, teacher: Outputs, target: Tensor, progress: Progress = None
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


# ----------------------------------------------------------------------------------------------------------------------
# FitNets: hints (Romero, Ballas, Kahou, Chassang, Gatta, Bengio, ICLR 2015, arXiv 1412.6550, eq. 3).


class FitNetLoss(DistillationLoss):
    """task · CE + distillation · mean over pairs of the mean squared error of r(student feature) from the teacher's.

    The paper trains the student up to the guided stage with ½‖·‖² alone, then the whole network with KD; here, as in
    RepDistiller, it is one training, the mean is taken, and its weight is 100. The regressor r is a 1×1 convolution;
    where sizes differ, both features are averaged down to the smaller (the paper's r is a larger convolution instead).

    Args:
        student_stages: The student's stages.
        teacher_stages: The teacher's stages.
        task: Weight of cross-entropy.
        distillation: Weight of the squared error.
        stages: Pairs [student stage, teacher stage]; by default the middle stages, as in the paper.

    Raises:
        ValueError: If a stage does not exist or a weight is negative.
    """

    def __init__(
        self,
        student_stages: Stages,
        teacher_stages: Stages,
        task: float = 1.0,
        distillation: float = 100.0,
        stages: list[list[str]] | None = None,
    ) -> None:
        super().__init__()
        check_options(task=task, distillation=distillation)
        self.task = task
        self.distillation = distillation
        self.pairs = choose_pairs(stages, student_stages, teacher_stages, pair_middle)
        self.teacher_stages = tuple(name for _, name in self.pairs)
        self.regressors = nn.ModuleList(build_adapter(student_stages[s], teacher_stages[t]) for s, t in self.pairs)

    def forward(
        self, student: Outputs, teacher: Outputs, target: Tensor, progress: Progress = None
    ) -> dict[str, Tensor]:
        """Compute the terms `task` and `distillation`.

        Args:
            student: The student's outputs.
            teacher: The teacher's outputs for the same images.
            target: Class indices [B] or distributions [B, C].
            progress: Ignored.
        """
        errors = []
        with torch.autocast(student.logits.device.type, enabled=False):
            for (s, t), regressor in zip(self.pairs, self.regressors, strict=True):
                ours, theirs = shrink_to_smaller(as_map(student.features[s]), as_map(teacher.features[t]))
                errors.append((regressor(ours) - theirs).square().mean())
        return {
            "task": self.task * cross_entropies(student.logits, target).mean(),
            "distillation": self.distillation * torch.stack(errors).mean(),
        }


# ----------------------------------------------------------------------------------------------------------------------
# Relational knowledge distillation (Park, Kim, Lu, Cho, CVPR 2019, arXiv 1904.05068).


class RKDLoss(DistillationLoss):
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
        self, student: Outputs, teacher: Outputs, target: Tensor, progress: Progress = None
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


# ----------------------------------------------------------------------------------------------------------------------
# Similarity-preserving distillation (Tung, Mori, ICCV 2019, arXiv 1907.09682).


class SimilarityPreservingLoss(DistillationLoss):
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
        self, student: Outputs, teacher: Outputs, target: Tensor, progress: Progress = None
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
