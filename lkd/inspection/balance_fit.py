"""Which cross-entropy and which KD a gradient is most like: the balance that a loss implies."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from lkd.inspection.probes import CONFIDENCES, States, logit_gradient

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
