"""The learned loss over features (our reconstruction)."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from lkd.core.errors import UserError
from lkd.core.outputs import Outputs
from lkd.losses.functions import Stages, as_map, check_batch, full_precision, map_shape, pool
from lkd.losses.learned import networks
from lkd.losses.learned.networks import CONDITIONING, EntryNetwork, Perceptron
from lkd.losses.loss import DistillationLoss, Progress, Terms

# ----------------------------------------------------------------------------------------------------------------------
# How the features of two networks are made comparable, without parameters and whatever their shapes. Each comparison
# maps the stages of a network to [stages, B, entries] with entries of order 1, so that two networks can be subtracted
# stage from stage.

EPSILON = 1e-8


def attend_places(features: Sequence[Tensor], grid: int) -> Tensor:
    """Where a stage is active: mean squares over channels, on a grid × grid, of root mean square 1 over the grid.

    The attention map of Zagoruyko and Komodakis (ICLR 2017), averaged to one grid for all sizes (repeated if smaller).
    From features [B, c, h, w], or tokens [B, n, c], to [stages, B, grid²].
    """
    maps = [adaptive_avg_pool2d(as_map(f).square().mean(1, keepdim=True), (grid, grid)).flatten(1) for f in features]
    return scale_rows(torch.stack(maps), grid**2)


def relate_images(centred: Sequence[Tensor]) -> Tensor:
    """How alike two images are: cosines between their pooled features, centred over the batch, [stages, B, B].

    Similarity-preserving distillation (Tung, Mori, ICCV 2019) on centred, pooled features.
    """
    products = torch.stack([rows @ rows.T for rows in centred])
    scale = (products.diagonal(dim1=1, dim2=2) + EPSILON).rsqrt()
    return products * (scale.unsqueeze(1) * scale.unsqueeze(2))


def project_channels(centred: Sequence[Tensor], projections: Sequence[Tensor]) -> Tensor:
    """Which channels respond: pooled features, centred over the batch, projected by [m, c], of root mean square 1.

    [stages, B, m].
    """
    projected = torch.stack([rows @ p.to(rows).T for rows, p in zip(centred, projections, strict=True)])
    return projected.shape[2] ** 0.5 * scale_rows(projected, 1)


def centre_pooled(feature: Tensor) -> Tensor:
    """Global average less its mean over the batch, [B, c]."""
    pooled = pool(feature)
    return pooled - pooled.mean(0, keepdim=True)


def scale_rows(rows: Tensor, squares: int) -> Tensor:
    """Rows along the last dimension whose squares sum to `squares`; those under 1e-4 of it are left shorter."""
    return rows * (rows.square().sum(2, keepdim=True) / squares + EPSILON).rsqrt()


def draw_projection(channels: int, size: int, role: str) -> Tensor:
    """A random matrix [size, channels] with orthonormal rows, or columns if channels < size; the same on every call.

    Student and teacher, the roles, have each its own.
    """
    return torch.from_numpy(draw_orthonormal(channels, size, role))  # of the mode that asks, such as inference


@lru_cache
def draw_orthonormal(channels: int, size: int, role: str) -> NDArray[np.float32]:
    """The entries of `draw_projection`."""
    generator = np.random.default_rng([channels, size, role == "teacher"])
    q, r = np.linalg.qr(generator.standard_normal((max(channels, size), min(channels, size))))
    orthonormal = q * np.sign(np.diag(r))  # the one factor that every LAPACK agrees on
    return np.ascontiguousarray(orthonormal.T if size < channels else orthonormal, np.float32)


SEEN = ("progress", "state", "answer", "context")  # kinds of conditioning
COMPARISONS = ("places", "images", "channels")
WIDTH = 0.2  # of the Gaussian that the pairing starts at, in relative depth


class FeatureLoss(DistillationLoss):
    """Distillation over features: three comparisons of every pair of stages, weighed by networks that know no shapes.

    Stage i of the student and j of the teacher are compared in three ways: where they are active (attention maps on a
    grid), how alike they find the images of the batch (cosines), and which channels respond (pooled features,
    projected). The loss is the mean over i of Σ_j A_ij Σ_k w_ik · mean of g(d) · d² over the entries d of comparison k.
    A small network gives g in (1 / `maximal_factor`, `maximal_factor`) from the difference, the teacher's value, the
    comparison, the two depths and what is seen of the sample's logits; another w_ik in (0, `maximal_weight`) from the
    comparison, depth and progress; a third the pairing A, whose rows sum to 1, from the two depths. The loss is never
    negative, and zero with zero gradient where all entries agree.

    What is learned depends on relative depth (1 is a network's last stage) and on nothing else of the networks: not on
    channels, sizes, or the number of stages. So a loss learned at 28×28 runs at 224×224 and between other networks.
    To this end nothing with channels is learned: the channel comparison projects both to `channels` dimensions by fixed
    random orthogonal matrices. `attach` can put 1×1 adapters in place of the student's, to be trained along with the
    student; they are never saved with the loss. We could not read the paper's feature network; this form is ours.

    Args:
        hidden: Width of the hidden layers of all networks.
        initial_weight: w before any meta-training, in (0, `maximal_weight`).
        maximal_weight: Upper bound of w.
        maximal_factor: Upper bound of g, greater than 1.
        deepest: How many of each network's last stages take part.
        grid: Height and width to which attention maps are averaged.
        channels: Dimensions to which channels are projected.
        conditioning: What is seen besides the teacher's logits: some of progress, state, answer, context.
        lipschitz: Bound of each network's Lipschitz constant; 0 sets none.
    """

    def __init__(
        self,
        hidden: int = 8,
        initial_weight: float = 0.3,
        maximal_weight: float = 10.0,
        maximal_factor: float = 8.0,
        deepest: int = 3,
        grid: int = 4,
        channels: int = 16,
        conditioning: Sequence[str] = CONDITIONING,
        lipschitz: float = 0.0,
    ) -> None:
        options = networks.record_arguments(locals())
        super().__init__()
        if not 0 < initial_weight < maximal_weight:
            raise ValueError(f"initial_weight: {initial_weight} is not between 0 and maximal_weight {maximal_weight}")
        for name, value in (("deepest", deepest), ("grid", grid), ("channels", channels)):
            if value < 1:
                raise ValueError(f"{name}: {value} is not at least 1")
        self.conditioning = options["conditioning"] = networks.check_conditioning(conditioning, SEEN)
        self.architecture = options
        self.log_factor = networks.log_of_factor(maximal_factor)
        self.maximal_weight, self.deepest, self.grid, self.channels = maximal_weight, deepest, grid, channels
        kinds = len(COMPARISONS)
        networks.check_network_options(hidden, lipschitz)
        self.entries = EntryNetwork(2 + kinds, len(networks.name_sample_inputs(self.conditioning)), hidden, lipschitz)
        self.weights = Perceptron(1 + ("progress" in self.conditioning), hidden, kinds, lipschitz)
        nn.init.constant_(self.weights.head.bias, math.log(initial_weight / (maximal_weight - initial_weight)))
        self.pairing = Perceptron(3, hidden, 1, lipschitz)
        self.stages: tuple[list[str], list[str]] | None = None
        self.adapters = nn.ParameterList()

    def attach(self, student_stages: Stages, teacher_stages: Stages, adapters: bool = False) -> "FeatureLoss":
        """Fix the stages that are compared, so that the teacher need give no others; returns itself.

        Args:
            student_stages: Shape of each stage's feature for one image.
            teacher_stages: The same of the teacher.
            adapters: Whether the student's channels are adapted by 1×1 convolutions that are trained along; they start
                at the random projections.

        Raises:
            ValueError: If a network gives no features, or one that is neither map nor square grid of tokens.
        """
        networks = {"student": student_stages, "teacher": teacher_stages}
        last = {role: list(stages)[-self.deepest :] for role, stages in networks.items()}
        for role, names in last.items():
            if not names:
                given = "; ".join(f"{each}: {', '.join(stages) or 'none'}" for each, stages in last.items())
                raise ValueError(
                    f"it reads features, but the {role} gives none; it needs the last {self.deepest} stages of both "
                    f"networks ({given}): take another {role}, or a loss over logits"
                )
            for name in names:
                map_shape(networks[role][name])
        self.stages = list(student_stages), list(teacher_stages)
        self.teacher_stages = tuple(last["teacher"])
        self.adapters = nn.ParameterList(
            draw_projection(map_shape(student_stages[name])[0], self.channels, "student").clone()
            for name in (last["student"] if adapters else [])
        )
        return self

    def free_student(self) -> "FeatureLoss":
        """Keep the teacher's stages only, and of any student take the deepest that it gives; returns itself."""
        if self.stages:
            self.stages = [], self.stages[1]
        self.adapters = nn.ParameterList()
        return self

    def take_stages(self, number: int, outputs: Outputs) -> tuple[list[Tensor], Tensor]:
        """Features and relative depths of the stages of the student, 0, or the teacher, 1, that take part."""
        names = (self.stages[number] if self.stages else []) or list(outputs.features)
        last = names[-self.deepest :]
        missing = [name for name in last if name not in outputs.features]
        if not last or missing:
            what = f"lacks {', '.join(missing)}" if missing else "is empty"
            raise UserError(
                f"the learned loss reads features, but {('student', 'teacher')[number]}.features {what}; it needs the "
                f"last {self.deepest} stages of both networks: take one that gives them, or a loss over logits"
            )
        images = len(outputs.logits)
        if apart := [name for name in last if len(outputs.features[name]) != images]:
            raise UserError(
                f"the learned loss reads features, but {('student', 'teacher')[number]}.features[{apart[0]!r}] is of "
                f"{len(outputs.features[apart[0]])} images, its logits of {images}"
            )
        depths = torch.tensor(relative_depths(names, last), device=outputs.logits.device)
        return [outputs.features[name] for name in last], depths

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """The student's and the teacher's entries of every comparison, [S, B, E] and [T, B, E]."""
        ours, theirs = (
            [draw_projection(map_shape(tuple(f.shape[1:]))[0], self.channels, role) for f in features]
            for role, features in (("student", student), ("teacher", teacher))
        )
        centred = [[centre_pooled(feature) for feature in features] for features in (student, teacher)]
        return [
            (attend_places(student, self.grid), attend_places(teacher, self.grid)),
            (relate_images(centred[0]), relate_images(centred[1])),
            (project_channels(centred[0], list(self.adapters) or ours), project_channels(centred[1], theirs)),
        ]

    def weigh_stages(self, depths: Tensor, progress: Tensor) -> Tensor:
        """Weight of every comparison at these relative depths, [S, comparisons]."""
        columns = [depths, progress.expand(len(depths))] if "progress" in self.conditioning else [depths]
        return self.maximal_weight * self.weights(2 * torch.stack(columns, 1) - 1).sigmoid()

    def assign_stages(self, student_depths: Tensor, teacher_depths: Tensor) -> Tensor:
        """The pairing A, [S, T], each row of which sums to 1; it starts at a Gaussian of the depths' difference."""
        student, teacher = torch.broadcast_tensors(student_depths.unsqueeze(1), teacher_depths.unsqueeze(0))
        apart = student - teacher
        scores = self.pairing(torch.stack([student, teacher, apart], 2)).squeeze(2)
        return (scores - (apart / WIDTH).square() / 2).softmax(1)

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, progress: Progress = None) -> Terms:
        """Compute a term for every comparison: `places`, `images` and `channels`."""
        target = check_batch(student, teacher, target)
        ours, student_depths = self.take_stages(0, student)
        theirs, teacher_depths = self.take_stages(1, teacher)
        with full_precision(student.logits):
            logs = networks.read_logits(student.logits, teacher.logits, target, self.conditioning)
            samples = networks.sample_inputs(logs, progress, self.conditioning)
            weights = self.weigh_stages(student_depths, networks.as_progress(progress, logs.student))
            pairing = self.assign_stages(student_depths, teacher_depths)
            compared = self.compare(ours, [feature.detach() for feature in theirs])
            terms = {}
            for kind, (name, entries) in enumerate(zip(COMPARISONS, compared, strict=True)):
                distances = self.measure(*entries, kind, student_depths, teacher_depths, samples)
                terms[name] = (weights[:, kind] * (pairing * distances).sum(1)).mean()
            return terms

    def measure(
        self, ours: Tensor, theirs: Tensor, kind: int, student_depths: Tensor, teacher_depths: Tensor, samples: Tensor
    ) -> Tensor:
        """Mean of g(d) · d² over batch and entries of a kind of comparison, of every pair of stages, [S, T]."""
        difference = ours.unsqueeze(1) - theirs.unsqueeze(0)
        student, teacher = torch.broadcast_tensors(student_depths.unsqueeze(1), teacher_depths.unsqueeze(0))
        chosen = (torch.full_like(student, float(kind == other)) for other in range(len(COMPARISONS)))
        places = torch.stack([2 * student - 1, 2 * teacher - 1, *chosen], 2)
        factor = (self.log_factor * self.entries(difference, theirs, places, samples)).exp()
        return (factor * difference.square()).mean((2, 3))


def relative_depths(names: list[str], chosen: list[str]) -> list[float]:
    """Depth in (0, 1] of the chosen stages: 1 is a network's last."""
    return [(names.index(name) + 1) / len(names) for name in chosen]
