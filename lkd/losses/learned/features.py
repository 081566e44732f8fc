"""The learned loss over features (our reconstruction)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lkd.errors import UserError
from lkd.losses.learned.class_network import log_of_factor
from lkd.losses.learned.comparisons import attend_places, draw_projection, project_channels, relate_images
from lkd.losses.learned.entries import EntryNetwork
from lkd.losses.learned.inputs import (
    CONDITIONING,
    Progress,
    as_progress,
    check_conditioning,
    name_sample_inputs,
    read_logits,
    sample_inputs,
)
from lkd.losses.learned.pairing import PairingNetwork, name_needs, relative_depths
from lkd.losses.learned.perceptron import Perceptron, check_network_options
from lkd.losses.stages import Stages, map_shape
from lkd.outputs import Outputs

COMPARISONS = ("places", "images", "channels")


class FeatureLoss(nn.Module):
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
    student; they are never saved with the loss. The paper's feature network is not public; this form is ours.

    Args:
        hidden: Width of the hidden layers of all networks.
        initial_weight: w before any meta-training, in (0, `maximal_weight`).
        maximal_weight: Upper bound of w.
        maximal_factor: Upper bound of g, greater than 1.
        deepest: How many of each network's last stages take part.
        grid: Height and width to which attention maps are averaged.
        channels: Dimensions to which channels are projected.
        conditioning: What is seen besides the teacher's logits: some of progress, state.
        lipschitz: Bound of each network's Lipschitz constant; 0 sets none.

    Raises:
        ValueError: If an option is out of range.
    """

    reads_features = True

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
        super().__init__()
        if not 0 < initial_weight < maximal_weight:
            raise ValueError(f"initial_weight: {initial_weight} is not between 0 and maximal_weight {maximal_weight}")
        for name, value in (("deepest", deepest), ("grid", grid), ("channels", channels)):
            if value < 1:
                raise ValueError(f"{name}: {value} is not at least 1")
        self.conditioning = check_conditioning(conditioning)
        self.log_factor = log_of_factor(maximal_factor)
        self.maximal_weight = maximal_weight
        self.deepest = deepest
        self.grid = grid
        self.channels = channels
        self.architecture = {
            "hidden": hidden,
            "initial_weight": initial_weight,
            "maximal_weight": maximal_weight,
            "maximal_factor": maximal_factor,
            "deepest": deepest,
            "grid": grid,
            "channels": channels,
            "conditioning": self.conditioning,
            "lipschitz": lipschitz,
        }
        kinds = len(COMPARISONS)
        check_network_options(hidden, lipschitz)
        self.entries = EntryNetwork(2 + kinds, len(name_sample_inputs(self.conditioning)), hidden, lipschitz)
        self.weights = Perceptron(1 + ("progress" in self.conditioning), hidden, kinds, lipschitz)
        nn.init.constant_(self.weights.head.bias, math.log(initial_weight / (maximal_weight - initial_weight)))
        self.pairing = PairingNetwork(hidden, lipschitz)
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
        for role, stages in (("student", student_stages), ("teacher", teacher_stages)):
            if not stages:
                raise ValueError(
                    f"it reads features, but the {role} gives none; it needs "
                    f"{name_needs(self.deepest, student_stages, teacher_stages)}: take another {role}, or a loss over "
                    "logits"
                )
            for name in list(stages)[-self.deepest :]:
                map_shape(stages[name])
        self.stages = list(student_stages), list(teacher_stages)
        self.adapters = nn.ParameterList(
            draw_projection(map_shape(student_stages[name])[0], self.channels, "student").clone()
            for name in (self.stages[0][-self.deepest :] if adapters else [])
        )
        return self

    def free_student(self) -> "FeatureLoss":
        """Keep the teacher's stages only, and of any student take the deepest that it gives; returns itself."""
        if self.stages:
            self.stages = [], self.stages[1]
        self.adapters = nn.ParameterList()
        return self

    @property
    def teacher_stages(self) -> tuple[str, ...]:
        """The teacher's stages that are read; none before `attach`: then the deepest that it gives."""
        return tuple(self.stages[1][-self.deepest :]) if self.stages else ()

    def pair_stages(self, student: Outputs, teacher: Outputs) -> tuple[list[str], list[str], Tensor, Tensor]:
        """Names and relative depths of the stages that take part.

        Raises:
            UserError: If a network gives no features, or not those that it was attached to.
        """
        chosen, depths = [], []
        for number, (role, outputs) in enumerate((("student", student), ("teacher", teacher))):
            names = (self.stages[number] if self.stages else []) or list(outputs.features)
            last = names[-self.deepest :]
            missing = [name for name in last if name not in outputs.features]
            if not last or missing:
                what = f"lacks {', '.join(missing)}" if missing else "is empty"
                raise UserError(
                    f"the learned loss reads features, but {role}.features {what}; it needs "
                    f"{name_needs(self.deepest, student.features, teacher.features)}: take a network that gives them, "
                    "or a loss over logits"
                )
            chosen.append(last)
            depths.append(torch.tensor(relative_depths(names, last), device=outputs.logits.device))
        return chosen[0], chosen[1], depths[0], depths[1]

    def compare(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """The student's and the teacher's entries of every comparison, [S, B, E] and [T, B, E]."""
        projections = [
            [draw_projection(map_shape(tuple(f.shape[1:]))[0], self.channels, role) for f in features]
            for role, features in (("student", student), ("teacher", teacher))
        ]
        for number, weight in enumerate(self.adapters):
            projections[0][number] = weight
        return [
            (attend_places(student, self.grid), attend_places(teacher, self.grid)),
            (relate_images(student), relate_images(teacher)),
            (project_channels(student, projections[0]), project_channels(teacher, projections[1])),
        ]

    def weigh_stages(self, depths: Tensor, progress: Tensor) -> Tensor:
        """Weight of every comparison at these relative depths, [S, comparisons]."""
        columns = [depths, progress.expand(len(depths))] if "progress" in self.conditioning else [depths]
        return self.maximal_weight * self.weights(2 * torch.stack(columns, 1) - 1).sigmoid()

    def forward(
        self, student: Outputs, teacher: Outputs, target: Tensor, progress: Progress = None
    ) -> dict[str, Tensor]:
        """Compute a term for every comparison: `places`, `images` and `channels`.

        Args:
            student: The student's outputs.
            teacher: The teacher's outputs for the same images.
            target: Class indices [B] or distributions [B, C].
            progress: How far the training is, in [0, 1].

        Raises:
            UserError: If a network gives no features, or not those that the loss was attached to.
        """
        student_names, teacher_names, student_depths, teacher_depths = self.pair_stages(student, teacher)
        with torch.autocast(student.logits.device.type, enabled=False):
            logs = read_logits(student.logits, teacher.logits, target)
            samples = sample_inputs(logs, progress, self.conditioning)
            weights = self.weigh_stages(student_depths, as_progress(progress, logs.student))
            pairing = self.pairing.assign(student_depths, teacher_depths)
            compared = self.compare(
                [student.features[name] for name in student_names],
                [teacher.features[name].detach() for name in teacher_names],
            )
            terms = {}
            for kind, (name, (ours, theirs)) in enumerate(zip(COMPARISONS, compared, strict=True)):
                distances = self.measure(ours, theirs, kind, student_depths, teacher_depths, samples)
                terms[name] = (weights[:, kind] * (pairing * distances).sum(1)).mean()
            return terms

    def measure(
        self, ours: Tensor, theirs: Tensor, kind: int, student_depths: Tensor, teacher_depths: Tensor, samples: Tensor
    ) -> Tensor:
        """Mean of g(d) · d² over batch and entries, of every pair of stages, [S, T].

        Args:
            ours: The student's entries, [S, B, E].
            theirs: The teacher's entries, [T, B, E].
            kind: Which comparison.
            student_depths: [S].
            teacher_depths: [T].
            samples: What is seen of each sample, [B, n].
        """
        difference = ours.unsqueeze(1) - theirs.unsqueeze(0)
        student, teacher = torch.broadcast_tensors(student_depths.unsqueeze(1), teacher_depths.unsqueeze(0))
        chosen = (torch.full_like(student, float(kind == other)) for other in range(len(COMPARISONS)))
        places = torch.stack([2 * student - 1, 2 * teacher - 1, *chosen], 2)
        factor = (self.log_factor * self.entries(difference, theirs, places, samples)).exp()
        return (factor * difference.square()).mean((2, 3))
