"""What leaves a loss as it is, checked with numbers."""

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lkd.core.outputs import Outputs
from lkd.evaluation.inspection.balance_fit import draw_features, sum_terms

# ----------------------------------------------------------------------------------------------------------------------
# Batches that a loss is asked about, how they can be changed, and what the loss answers.

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


# ----------------------------------------------------------------------------------------------------------------------
# What leaves a loss as it is, checked with numbers. A check that fails is a finding about the loss, not an error.

PROGRESS = (0.1, 0.5, 1.0)
CLASSES = (2, 3, 10, 100, 1000)
EXACT, ROUNDED = 1e-8, 1e-3  # tolerances: of an identity in float64, and of float32 against float64

# Check → what it means for whoever trains with the loss that it holds, and that it fails.
STATEMENTS = {
    "order of the classes": (
        "relabelling the classes changes nothing: it can be used on other data",
        "it treats classes differently: it is tied to the data set that it was made for",
    ),
    "constant on the student's logits": (
        "it reads the student's logits up to a constant, as softmax does",
        "it pulls at the level of the student's logits, which no probability depends on",
    ),
    "constant on the teacher's logits": (
        "it reads the teacher's logits up to a constant, as softmax does",
        "teachers of equal probabilities but other levels of logits teach differently",
    ),
    "order of the samples": (
        "shuffling a batch changes nothing",
        "the same batch in another order teaches differently",
    ),
    "batch twice over": (
        "a mean over the batch: its size does not act as a learning rate",
        "its size, or its gradient's, depends on the batch size: tune the learning rate anew when that changes",
    ),
    "number of classes": (
        f"value and gradient are finite for {', '.join(map(str, CLASSES))} classes",
        f"value or gradient is not finite for one of {', '.join(map(str, CLASSES))} classes",
    ),
    "extreme logits": (
        f"value and gradient are finite at logits of ±{EXTREME:,.0f} in float32",
        f"value or gradient is not finite at logits of ±{EXTREME:,.0f} in float32: trainings may diverge",
    ),
    "float32 for float64": (
        "float32 is precise enough",
        "float32 loses more than a thousandth of value or gradient",
    ),
}


@dataclass(frozen=True)
class Check:
    """What came of one check.

    Attributes:
        name: The invariance.
        holds: Whether the loss has it.
        difference: Largest difference of value or gradient, relative to the largest of either; None where there is
            nothing to compare, or no number came out.
        statement: What this means for whoever trains with the loss; or what it raised.
    """

    name: str
    holds: bool
    difference: float | None
    statement: str


def check_invariances(loss: nn.Module, num_classes: int, seed: int) -> list[dict[str, Any]]:
    """Check a loss at three progresses, each time taking the worst.

    Args:
        loss: Any loss; it is not changed.
        num_classes: Number of classes of the batch.
        seed: Of the batch.

    Returns:
        A `Check` as a dict for each invariance.
    """
    single, double = copy.deepcopy(loss).float(), copy.deepcopy(loss).double()
    problem = draw_problem(num_classes, seed)
    generator = torch.Generator().manual_seed(seed + 2)
    classes, samples = (torch.randperm(n, generator=generator) for n in (num_classes, BATCH))
    shift = 10 * torch.randn(BATCH, 1, dtype=torch.float64, generator=generator)

    def compare(name: str, changed: Problem, undo: Callable[[Answer], Answer] = lambda answer: answer) -> Check:
        differences = [measure_difference(ask(double, problem, p), undo(ask(double, changed, p))) for p in PROGRESS]
        return judge(name, max(differences), EXACT)

    student, teacher, _ = problem
    checks = [
        compare(
            "order of the classes",
            permute_classes(problem, classes),
            lambda answer: answer._replace(logits=answer.logits[:, classes.argsort()]),
        ),
        compare(
            "constant on the student's logits",
            problem._replace(student=student._replace(logits=student.logits + shift)),
        ),
        compare(
            "constant on the teacher's logits",
            problem._replace(teacher=teacher._replace(logits=teacher.logits + shift)),
        ),
        compare(
            "order of the samples",
            take_samples(problem, samples),
            lambda answer: take_gradients(answer, samples.argsort()),
        ),
        compare("batch twice over", take_samples(problem, torch.arange(BATCH).repeat(2)), sum_copies),
        check_finite("number of classes", single, [draw_problem(number, seed) for number in CLASSES]),
        check_finite("extreme logits", single, [make_extreme(problem, generator)]),
        check_precision(single, double, problem),
    ]
    return [asdict(check) for check in checks]


def judge(name: str, difference: float, tolerance: float) -> Check:
    """Whether a difference is small enough; one that is no number is not."""
    known = math.isfinite(difference)
    return conclude(name, known and difference <= tolerance, difference if known else None)


def conclude(name: str, holds: bool, difference: float | None = None) -> Check:
    """A check with the statement that belongs to its outcome."""
    return Check(name, holds, difference, STATEMENTS[name][not holds])


def check_finite(name: str, loss: nn.Module, problems: list[Problem]) -> Check:
    """Whether value and gradient are finite for all of these batches, in float32."""
    try:
        answers = [ask(loss, as_type(problem, torch.float32), p) for problem in problems for p in PROGRESS]
    except Exception as error:  # whatever the loss raises: that it does is the finding
        return Check(name, False, None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    return conclude(name, all(bool(flatten(answer).isfinite().all()) for answer in answers))


def check_precision(single: nn.Module, double: nn.Module, problem: Problem) -> Check:
    """Whether float32 gives what float64 gives."""
    narrow = as_type(problem, torch.float32)
    differences = [measure_difference(ask(double, problem, p), ask(single, narrow, p)) for p in PROGRESS]
    return judge("float32 for float64", max(differences), ROUNDED)
