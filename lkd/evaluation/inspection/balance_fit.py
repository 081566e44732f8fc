"""Which cross-entropy and which KD a gradient is most like: the balance that a loss implies."""

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from lkd.core.outputs import Outputs
from lkd.losses.learned.features import FeatureLoss
from lkd.losses.learned.loss import LearnedLoss, ReplayedLoss
from lkd.losses.loss import DistillationLoss, Progress
from lkd.losses.functions import Stages

# ----------------------------------------------------------------------------------------------------------------------
# Made-up answers of a student and a teacher, at which a loss is looked at: no image, no network.

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


class LogitView(DistillationLoss):
    """A loss as a function of logits alone: networks over features are left out, else features are made up and fixed.

    Args:
        loss: The loss.
        seed: Of the features.
    """

    def __init__(self, loss: DistillationLoss, seed: int) -> None:
        super().__init__()
        self.loss = leave_out_features(loss)
        self.seed = seed

    def forward(
        self, student: Outputs, teacher: Outputs, target: Tensor, progress: Progress = None
    ) -> dict[str, Tensor]:
        """The loss's terms; see `LearnedLoss`."""
        if not self.loss.teacher_stages:
            return self.loss(student, teacher, target, progress)
        terms: dict[
            str, Tensor
        ] = {}  # a few samples at a time: comparisons of images take memory of their number cubed
        for ours, theirs, labels in zip(*(x.split(FEW) for x in (student.logits, teacher.logits, target)), strict=True):
            few = self.loss(*add_features(ours, theirs, self.seed), labels, progress)
            terms |= {name: terms.get(name, 0.0) + term * len(ours) / len(target) for name, term in few.items()}
        return terms


def leave_out_features(loss: DistillationLoss) -> DistillationLoss:
    """A learned loss without its networks over features; any other as it is."""
    if isinstance(loss, ReplayedLoss):
        return ReplayedLoss([strip(each) for each in loss.losses], loss.starts)
    return strip(loss) if isinstance(loss, LearnedLoss) else loss


def strip(loss: Any) -> LearnedLoss:
    """The parts of one learned loss that read no features."""
    kept = {name: part for name, part in loss.parts.items() if not isinstance(part, FeatureLoss)}
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


# ----------------------------------------------------------------------------------------------------------------------
# Which cross-entropy and which KD a gradient is most like: the balance that a loss implies.

PROGRESS = tuple(step / 10 for step in range(11))
TEMPERATURES = (0.5, 20.0)  # the effective temperature is sought between them
POINTS, ROUNDS = 21, 3  # of the search; each round looks between the neighbours of the best so far
NEGLIGIBLE = 0.1  # a teacher with less of the gradient's norm has no temperature
AS_GOOD = 0.01  # temperatures that explain at most this much less are as good


@dataclass(frozen=True)
class BalanceFit:
    """Least squares of a gradient on w_ce · CE's + w_kd · KD's at τ, the latter with its factor τ²; neither negative.

    Attributes:
        task: w_ce.
        distillation: w_kd.
        share: w_kd / (w_ce + w_kd); None where the gradient has nothing of either.
        temperature: τ, the effective temperature; None where the teacher has no part in the gradient.
        temperatures_as_good: Least and greatest temperature that explain almost as much, each with its best weights.
        shares_as_good: Least and greatest share of these.
        explained: R²: the part of the gradient's squared norm that is explained, in [0, 1].
    """

    task: float
    distillation: float
    share: float | None
    temperature: float | None
    temperatures_as_good: tuple[float, float] | None
    shares_as_good: tuple[float, float] | None
    explained: float


def fit_balance(gradient: Tensor, student: Tensor, teacher: Tensor, target: Tensor) -> BalanceFit:
    """Fit a gradient at the student's logits; for each temperature in closed form.

    Args:
        gradient: Of each sample's loss, [N, C].
        student: Logits, [N, C].
        teacher: Logits, [N, C].
        target: Class indices, [N].
    """
    gradient, student, teacher = (x.double() for x in (gradient, student, teacher))
    task = student.softmax(1) - one_hot(target, student.shape[1])
    whole = float(gradient.square().sum())
    if whole == 0:
        return BalanceFit(0.0, 0.0, None, None, None, None, 0.0)
    grid = space(*TEMPERATURES)
    weights, residuals = solve(gradient, task, student, teacher, grid)
    good = residuals <= residuals.min() + AS_GOOD * whole
    good_temperatures = grid[good].tolist()
    good_shares = (weights[good, 1] / weights[good].sum(1)).tolist()
    for _ in range(ROUNDS):
        best = int(residuals.argmin())
        grid = space(float(grid[max(best - 1, 0)]), float(grid[min(best + 1, POINTS - 1)]))
        weights, residuals = solve(gradient, task, student, teacher, grid)
    best = int(residuals.argmin())
    (w_task, w_teacher), temperature = weights[best].tolist(), float(grid[best])
    taught = w_teacher * distillation_gradients(student, teacher, grid[best : best + 1])[0]
    negligible = float(taught.square().sum()) < NEGLIGIBLE**2 * whole
    share = w_teacher / (w_task + w_teacher) if w_task + w_teacher > 0 else None
    return BalanceFit(
        task=w_task,
        distillation=w_teacher,
        share=share,
        temperature=None if negligible else temperature,
        temperatures_as_good=None if negligible else span([temperature, *good_temperatures]),
        shares_as_good=None if share is None else span([share, *good_shares]),
        explained=min(1.0, max(0.0, 1 - float(residuals[best]) / whole)),
    )


def span(values: list[float]) -> tuple[float, float]:
    """Least and greatest."""
    return min(values), max(values)


def space(low: float, high: float) -> Tensor:
    """`POINTS` temperatures, each the same factor above the one before."""
    return torch.linspace(math.log(low), math.log(high), POINTS, dtype=torch.float64).exp()


def distillation_gradients(student: Tensor, teacher: Tensor, temperatures: Tensor) -> Tensor:
    """Gradient of τ² · KL(teacher_τ ‖ student_τ) at the student's logits, [T, N, C]."""
    scale = temperatures[:, None, None]
    return scale * ((student / scale).softmax(2) - (teacher / scale).softmax(2))


def solve(
    gradient: Tensor, task: Tensor, student: Tensor, teacher: Tensor, temperatures: Tensor
) -> tuple[Tensor, Tensor]:
    """Both weights, neither negative, [T, 2], and the squared norm of what is left, [T], at each temperature."""
    taught = distillation_gradients(student, teacher, temperatures)
    task_task, task_taught = task.square().sum(), (task * taught).sum((1, 2))
    taught_taught = taught.square().sum((1, 2))
    gram = torch.stack([task_task.expand_as(task_taught), task_taught, task_taught, taught_taught], 1).view(-1, 2, 2)
    projections = torch.stack([(task * gradient).sum().expand_as(task_taught), (taught * gradient).sum((1, 2))], 1)
    both = (torch.linalg.pinv(gram, hermitian=True) @ projections.unsqueeze(2)).squeeze(2)
    alone = projections.clamp_min(0) / gram.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(gram.dtype).tiny)
    candidates = torch.stack([torch.zeros_like(both), *torch.diag_embed(alone).unbind(1), both])
    saved = (
        2 * (candidates * projections).sum(2) - (candidates.unsqueeze(2) @ gram @ candidates.unsqueeze(3))[..., 0, 0]
    )
    allowed = (candidates >= 0).all(2)
    best = saved.where(allowed, -torch.inf).argmax(0)
    rows = torch.arange(len(best))
    return candidates[best, rows], gradient.square().sum() - saved[best, rows]


def imply_balance(loss: nn.Module, states: States) -> dict[str, Any]:
    """The implied balance over the training's progress and over what student and teacher think of the label.

    Args:
        loss: A loss over logits.
        states: Where it is looked at.

    Returns:
        `over_progress`: at each progress, all states together, and `students`: those of each student's confidence;
        `over_student` and `over_teacher`: of each confidence, in the middle of training.
    """
    rows = []
    for progress in PROGRESS:
        gradient = logit_gradient(loss, states, progress)
        students = fit_each(gradient, states, states.student_confidence)
        rows.append({"progress": progress, **fit_chosen(gradient, states), "students": students})
    middle = logit_gradient(loss, states, 0.5)
    return {
        "over_progress": rows,
        "over_student": fit_each(middle, states, states.student_confidence),
        "over_teacher": fit_each(middle, states, states.teacher_confidence),
    }


def fit_each(gradient: Tensor, states: States, confidence: Tensor) -> list[dict[str, Any]]:
    """A fit for the states of each confidence."""
    return [{"confidence": level, **fit_chosen(gradient, states, confidence == level)} for level in CONFIDENCES]


def fit_chosen(gradient: Tensor, states: States, chosen: Tensor | slice = slice(None)) -> dict[str, Any]:
    """The fit of some of the states."""
    return asdict(fit_balance(gradient[chosen], states.student[chosen], states.teacher[chosen], states.target[chosen]))
