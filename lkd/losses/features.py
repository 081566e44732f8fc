"""Hand-made losses over features: FitNets, attention transfer, similarity-preserving and relational distillation."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, smooth_l1_loss

from lkd.core.errors import UserError
from lkd.core.outputs import Outputs
from lkd.losses import functions
from lkd.losses.functions import Chosen, Pairing, Stages
from lkd.losses.loss import DistillationLoss, Progress, Terms

Maps = list[tuple[Tensor, Tensor]]  # of each pair of stages, the student's and the teacher's, [B, c, h, w]


class PairedLoss(DistillationLoss):
    """Cross-entropy and distances between the features of pairs of stages, chosen by the user or by default.

    A stage that does not exist and a negative weight are a `ValueError`.
    """

    reads_logits = False

    def __init__(
        self, student: Stages, teacher: Stages, chosen: Chosen, default: Pairing, task: float, **weights: float
    ) -> None:
        super().__init__()
        functions.check_options(task=task, **weights)
        self.task, self.weights = task, weights
        self.pairs = functions.choose_pairs(chosen, student, teacher, default)
        self.teacher_stages = tuple(name for _, name in self.pairs)

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, progress: Progress = None) -> Terms:
        """Compute the term `task` and one for each weight."""
        target = functions.check_target(student.logits, target)
        with functions.full_precision(student.logits):
            maps = [
                (functions.as_map(student.features[s]), functions.as_map(teacher.features[t])) for s, t in self.pairs
            ]
            if apart := [(len(ours), len(theirs)) for ours, theirs in maps if len(ours) != len(theirs)]:
                raise UserError(
                    f"loss: the student's features are of {apart[0][0]} images, the teacher's of {apart[0][1]}; both "
                    "have to see the same"
                )
            distances = self.measure(maps)
        terms = {"task": self.task * functions.cross_entropies(student.logits, target).mean()}
        return terms | {name: weight * distances[name] for name, weight in self.weights.items()}

    def measure(self, maps: Maps) -> Terms:
        """The distances, of all pairs together, from the feature maps of each, [B, c, h, w]."""
        raise NotImplementedError


class AttentionTransferLoss(PairedLoss):
    """Attention transfer (Zagoruyko, Komodakis, ICLR 2017, arXiv 1612.03928, eq. 2).

    task · CE + distillation · Σ over pairs of the mean over batch and places of (Q(student) − Q(teacher))².
    Q is the map of squared activations, averaged over the channels, flattened and scaled to unit length. This is the
    authors' code, and its weight 1000 that of their recipe and RepDistiller's. The paper's eq. 2 has the plain distance
    ‖·‖₂, with ½, in place of the mean of squares. Where sizes differ, both features are averaged down to the smaller.

    Args:
        student: The student's stages.
        teacher: The teacher's stages.
        task: Weight of cross-entropy.
        distillation: Weight of the distance of the attention maps.
        stages: Pairs [student stage, teacher stage]; by default the deepest of each spatial size that both have.
    """

    def __init__(
        self, student: Stages, teacher: Stages, task: float = 1.0, distillation: float = 1000.0, stages: Chosen = None
    ) -> None:
        super().__init__(student, teacher, stages, functions.pair_equal_sizes, task, distillation=distillation)

    def measure(self, maps: Maps) -> Terms:
        shrunk = [functions.shrink_to_smaller(ours, theirs) for ours, theirs in maps]
        distances = [(attention(ours) - attention(theirs)).square().mean() for ours, theirs in shrunk]
        return {"distillation": torch.stack(distances).sum()}


def attention(feature: Tensor) -> Tensor:
    """The attention map, [B, c, h, w] → [B, h · w], of unit length."""
    return normalize(feature.square().mean(1).flatten(1), dim=1)


class FitNetLoss(PairedLoss):
    """FitNets: hints (Romero, Ballas, Kahou, Chassang, Gatta, Bengio, ICLR 2015, arXiv 1412.6550, eq. 3).

    task · CE + distillation · mean over pairs of the mean squared error of r(student feature) from the teacher's.
    The paper trains the student up to the guided stage with ½‖·‖² alone, then the whole network with KD; here, as in
    RepDistiller, it is one training, the mean is taken, and its weight is 100. The regressor r is a 1×1 convolution;
    where sizes differ, both features are averaged down to the smaller (the paper's r is a larger convolution instead).

    Args:
        student: The student's stages.
        teacher: The teacher's stages.
        task: Weight of cross-entropy.
        distillation: Weight of the squared error.
        stages: Pairs [student stage, teacher stage]; by default the middle stages, as in the paper.
    """

    def __init__(
        self, student: Stages, teacher: Stages, task: float = 1.0, distillation: float = 100.0, stages: Chosen = None
    ) -> None:
        super().__init__(student, teacher, stages, functions.pair_middle, task, distillation=distillation)
        channels = [(functions.map_shape(student[s])[0], functions.map_shape(teacher[t])[0]) for s, t in self.pairs]
        self.regressors = nn.ModuleList(nn.Conv2d(ours, theirs, 1) for ours, theirs in channels)

    def measure(self, maps: Maps) -> Terms:
        errors = []
        for (student, teacher), regressor in zip(maps, self.regressors, strict=True):
            ours, theirs = functions.shrink_to_smaller(student, teacher)
            errors.append((regressor(ours) - theirs).square().mean())
        return {"distillation": torch.stack(errors).mean()}


class RKDLoss(PairedLoss):
    """Relational knowledge distillation (Park, Kim, Lu, Cho, CVPR 2019, arXiv 1904.05068).

    task · CE + distance · Huber(distances of pairs) + angle · Huber(angles of triplets).
    The features are averaged over places (the networks' embeddings). Distances are Euclidean, over the batch's mean
    distance; angles are cosines at each image between any two others; the gradient passes through the mean distance, as
    in the authors' code. The Huber means are over all B² and B³ entries, those with equal images included, as there.
    The weights 25 and 50 are RepDistiller's. A batch of one image is refused with `UserError`.

    Args:
        student: The student's stages.
        teacher: The teacher's stages.
        task: Weight of cross-entropy.
        distance: Weight of the distances.
        angle: Weight of the angles; takes memory in the cube of the batch.
        stages: One pair [student stage, teacher stage] or more; by default the last stages.
    """

    def __init__(
        self,
        student: Stages,
        teacher: Stages,
        task: float = 1.0,
        distance: float = 25.0,
        angle: float = 50.0,
        stages: Chosen = None,
    ) -> None:
        super().__init__(student, teacher, stages, functions.pair_last, task, distance=distance, angle=angle)

    def measure(self, maps: Maps) -> Terms:
        functions.check_several("rkd", len(maps[0][0]), 3)  # the distance of two images is its own mean
        pooled = [(functions.pool(ours), functions.pool(theirs)) for ours, theirs in maps]
        distance = torch.stack([smooth_l1_loss(distances(ours), distances(theirs)) for ours, theirs in pooled])
        angle = torch.stack([smooth_l1_loss(angles(ours), angles(theirs)) for ours, theirs in pooled])
        return {"distance": distance.sum(), "angle": angle.sum()}


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


class SimilarityPreservingLoss(PairedLoss):
    """Similarity-preserving distillation (Tung, Mori, ICCV 2019, arXiv 1907.09682).

    task · CE + distillation / B² · Σ over pairs of ‖G(teacher) − G(student)‖²_F.
    G = Q Qᵀ with rows scaled to unit length, Q being the flattened features of the batch, [B, c · h · w]: no shapes
    need agree. The weight 3000 is that of RepDistiller's recipe. A batch of one image is refused with `UserError`.

    Args:
        student: The student's stages.
        teacher: The teacher's stages.
        task: Weight of cross-entropy.
        distillation: Weight of the distance of the similarities.
        stages: Pairs [student stage, teacher stage]; by default the last stages.
    """

    def __init__(
        self, student: Stages, teacher: Stages, task: float = 1.0, distillation: float = 3000.0, stages: Chosen = None
    ) -> None:
        super().__init__(student, teacher, stages, functions.pair_last, task, distillation=distillation)

    def measure(self, maps: Maps) -> Terms:
        functions.check_several("sp", len(maps[0][0]))
        distances = [(similarities(ours) - similarities(theirs)).square().mean() for ours, theirs in maps]
        return {"distillation": torch.stack(distances).sum()}


def similarities(feature: Tensor) -> Tensor:
    """Products between the images of a batch, rows of unit length, [B, ...] → [B, B]."""
    flat = feature.flatten(1)
    return normalize(flat @ flat.T, dim=1)
