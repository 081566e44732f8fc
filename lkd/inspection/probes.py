"""Made-up answers of a student and a teacher, at which a loss is looked at: no image, no network."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lkd.losses.learned import LearnedLoss
from lkd.losses.replayed import ReplayedLoss
from lkd.losses.stages import Stages
from lkd.outputs import Outputs

CONFIDENCES = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
REPEATS = 6
FEW = 33  # samples that losses over features are asked about at once
STAGES: Stages = {"stage1": (8, 16, 16), "stage2": (16, 8, 8), "stage3": (24, 4, 4), "stage4": (32, 2, 2)}
SPREAD = 1.5  # standard deviation of the logits of the classes other than the label


class States(NamedTuple):
    """Students and teachers of every pair of confidences, N in all.

    Attributes:
        student: Log-probabilities, [N, C].
        teacher: Log-probabilities, [N, C].
        target: Class indices, [N].
        student_confidence: The student's probability of the label, [N].
        teacher_confidence: The teacher's probability of the label, [N].
    """

    student: Tensor
    teacher: Tensor
    target: Tensor
    student_confidence: Tensor
    teacher_confidence: Tensor


def draw_states(num_classes: int, seed: int) -> States:
    """Draw states in float64: the label at random, the rest of the probability spread at random over the others."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.tensor(CONFIDENCES, dtype=torch.float64)
    student, teacher = (axis.flatten().repeat(REPEATS) for axis in torch.meshgrid(levels, levels, indexing="ij"))
    target = torch.randint(num_classes, (len(student),), generator=generator)

    def spread(confidence: Tensor) -> Tensor:
        others = SPREAD * torch.randn(len(target), num_classes, dtype=torch.float64, generator=generator)
        label = target.unsqueeze(1)
        others = others.scatter(1, label, float("-inf")).log_softmax(1) + torch.log1p(-confidence).unsqueeze(1)
        return others.scatter(1, label, confidence.log().unsqueeze(1))

    return States(spread(student), spread(teacher), target, student, teacher)


def draw_features(batch: int, like: Tensor, seed: int) -> dict[str, Tensor]:
    """Non-negative features of `STAGES` for a batch, as those after a ReLU, of the type of `like`."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(batch, *shape, generator=generator).relu().to(like) for name, shape in STAGES.items()}


def add_features(student: Tensor, teacher: Tensor, seed: int) -> tuple[Outputs, Outputs]:
    """Outputs with these logits and made-up features."""
    return (
        Outputs(student, draw_features(len(student), student, seed)),
        Outputs(teacher, draw_features(len(teacher), teacher, seed + 1)),
    )


def parts_at(loss: nn.Module, progress: float) -> dict[str, nn.Module]:
    """The networks of a learned loss that are in charge at this progress, by name; none of a hand-made loss."""
    current = loss.at(progress) if isinstance(loss, ReplayedLoss) else loss
    return dict(current.parts.items()) if isinstance(current, LearnedLoss) else {}


class LogitView(nn.Module):
    """A loss as a function of logits alone: networks over features are left out, else features are made up and fixed.

    Args:
        loss: The loss.
        seed: Of the features.
    """

    def __init__(self, loss: nn.Module, seed: int) -> None:
        super().__init__()
        self.loss = leave_out_features(loss)
        self.seed = seed

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, progress: float) -> dict[str, Tensor]:
        """The loss's terms; see `LearnedLoss`."""
        if not getattr(self.loss, "teacher_stages", ()):
            return self.loss(student, teacher, target, progress)
        terms: dict[
            str, Tensor
        ] = {}  # a few samples at a time: comparisons of images take memory of their number cubed
        for ours, theirs, labels in zip(*(x.split(FEW) for x in (student.logits, teacher.logits, target)), strict=True):
            few = self.loss(*add_features(ours, theirs, self.seed), labels, progress)
            terms |= {name: terms.get(name, 0.0) + term * len(ours) / len(target) for name, term in few.items()}
        return terms


def leave_out_features(loss: nn.Module) -> nn.Module:
    """A learned loss without its networks over features; any other as it is."""
    if isinstance(loss, ReplayedLoss):
        return ReplayedLoss([strip(each) for each in loss.losses], loss.starts)
    return strip(loss) if isinstance(loss, LearnedLoss) else loss


def strip(loss: Any) -> LearnedLoss:
    """The parts of one learned loss that read no features."""
    kept = {name: part for name, part in loss.parts.items() if not getattr(part, "reads_features", False)}
    return LearnedLoss(kept, loss.normalize_gradient)


def sum_terms(terms: dict[str, Tensor]) -> Tensor:
    """The loss's value."""
    return torch.stack(list(terms.values())).sum()


def logit_gradient(loss: nn.Module, states: States, progress: float) -> Tensor:
    """Gradient of each sample's loss with respect to its student's logits, [N, C]; the loss is a mean over samples."""
    logits = states.student.detach().requires_grad_()
    value = sum_terms(loss(Outputs(logits, {}), Outputs(states.teacher, {}), states.target, progress))
    (gradient,) = torch.autograd.grad(value, logits)
    return gradient * len(logits)
