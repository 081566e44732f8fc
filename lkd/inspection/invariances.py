"""What leaves a loss as it is, checked with numbers. A check that fails is a finding about the loss, not an error."""

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from lkd.inspection.problems import (
    BATCH,
    EXTREME,
    Answer,
    Problem,
    as_type,
    ask,
    draw_problem,
    flatten,
    make_extreme,
    measure_difference,
    permute_classes,
    sum_copies,
    take_gradients,
    take_samples,
)

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
