"""Batches that a loss is asked about, how they can be changed, and what the loss answers."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lkd.inspection.probes import draw_features, sum_terms
from lkd.outputs import Outputs

BATCH = 12
EXTREME = 1e4


class Problem(NamedTuple):
    """A batch that a loss is asked about."""

    student: Outputs
    teacher: Outputs
    target: Tensor


class Answer(NamedTuple):
    """A loss's value and its gradient at the student's logits and features; zeros where it does not depend on them."""

    value: Tensor
    logits: Tensor
    features: dict[str, Tensor]


def draw_problem(num_classes: int, seed: int) -> Problem:
    """A batch of logits of standard deviation 2 and of features, in float64."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        Outputs(
            2 * torch.randn(BATCH, num_classes, dtype=torch.float64, generator=generator),
            draw_features(BATCH, torch.zeros((), dtype=torch.float64), seed + role),
        )
        for role in (0, 1)
    )
    return Problem(student, teacher, torch.randint(num_classes, (BATCH,), generator=generator))


def ask(loss: nn.Module, problem: Problem, progress: float) -> Answer:
    """Value and gradient of a loss."""
    logits = problem.student.logits.detach().requires_grad_()
    features = {name: feature.detach().requires_grad_() for name, feature in problem.student.features.items()}
    value = sum_terms(loss(Outputs(logits, features), problem.teacher, problem.target, progress))
    variables = [logits, *features.values()]
    gradients = torch.autograd.grad(value, variables, allow_unused=True, materialize_grads=True)
    return Answer(value.detach(), gradients[0], dict(zip(features, gradients[1:], strict=True)))


def permute_classes(problem: Problem, order: Tensor) -> Problem:
    """Class `order[c]` becomes class c."""
    student, teacher = (
        outputs._replace(logits=outputs.logits[:, order]) for outputs in (problem.student, problem.teacher)
    )
    return Problem(student, teacher, order.argsort()[problem.target])


def take_samples(problem: Problem, index: Tensor) -> Problem:
    """A batch of some of the samples."""
    student, teacher = (
        Outputs(outputs.logits[index], {name: feature[index] for name, feature in outputs.features.items()})
        for outputs in (problem.student, problem.teacher)
    )
    return Problem(student, teacher, problem.target[index])


def take_gradients(answer: Answer, index: Tensor) -> Answer:
    """The gradients of some of the samples."""
    return Answer(answer.value, answer.logits[index], {n: g[index] for n, g in answer.features.items()})


def sum_copies(answer: Answer) -> Answer:
    """The gradients of the two copies of each sample together."""
    first, second = (take_gradients(answer, half) for half in torch.arange(2 * BATCH).chunk(2))
    features = {name: gradient + second.features[name] for name, gradient in first.features.items()}
    return Answer(answer.value, first.logits + second.logits, features)


def make_extreme(problem: Problem, generator: torch.Generator) -> Problem:
    """The same with logits of student and teacher that are plus or minus `EXTREME`."""
    student, teacher = (
        outputs._replace(
            logits=EXTREME * torch.randn(outputs.logits.shape, generator=generator, dtype=torch.float64).sign()
        )
        for outputs in (problem.student, problem.teacher)
    )
    return Problem(student, teacher, problem.target)


def as_type(problem: Problem, dtype: torch.dtype) -> Problem:
    """The same batch in another precision."""
    student, teacher = (
        Outputs(outputs.logits.to(dtype), {name: feature.to(dtype) for name, feature in outputs.features.items()})
        for outputs in (problem.student, problem.teacher)
    )
    return Problem(student, teacher, problem.target)


def flatten(answer: Answer) -> Tensor:
    """All its numbers."""
    return torch.cat([x.flatten() for x in (answer.value, answer.logits, *answer.features.values())])


def measure_difference(a: Answer, b: Answer) -> float:
    """Largest difference of the value, or of the gradient at the logits or a stage, relative to the largest there."""
    worst = 0.0
    for x, y in ((a.value, b.value), (a.logits, b.logits), *((a.features[n], b.features[n]) for n in a.features)):
        largest = max(float(x.abs().max()), float(y.abs().max()))
        worst = max(worst, float((x - y).abs().max()) / largest if largest else 0.0)
        if largest != largest:
            return math.nan
    return worst
