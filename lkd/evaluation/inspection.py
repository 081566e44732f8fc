"""What a loss does, found out without a training."""

import copy
import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lkd.core.outputs import Outputs
from lkd.losses.functions import Stages
from lkd.losses.learned.features import COMPARISONS, FeatureLoss, relative_depths
from lkd.losses.learned.forms import DecoupledLoss, LogitForm
from lkd.losses.learned.loss import LearnedLoss, ReplayedLoss
from lkd.losses.learned.networks import TRUST_CONDITIONING
from lkd.losses.learned.shares import confidence_grid, gradient_shares, gradient_surface
from lkd.losses.learned.trust import Trust, TrustFigures, agree
from lkd.losses.logits import CrossEntropyLoss, KDLoss
from lkd.losses.loss import DistillationLoss, Progress, Terms

# ----------------------------------------------------------------------------------------------------------------------
# Made-up answers of a student and a teacher, at which a loss is looked at: no image, no network.

CONFIDENCES = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
REPEATS = 6
FEW = 33  # samples that losses over features are asked about at once
SPARSE = 5  # every so many states: features of all of them take long; no divisor of the number of confidences
STAGES: Stages = {"stage1": (8, 16, 16), "stage2": (16, 8, 8), "stage3": (24, 4, 4), "stage4": (32, 2, 2)}
SPREAD = 1.5  # standard deviation of the logits of the classes other than the label


class States(NamedTuple):
    """Students and teachers of every pair of confidences: log-probabilities [N, C], labels, and probability of them."""

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
    ours, theirs = draw_features(len(student), student, seed), draw_features(len(teacher), teacher, seed + 1)
    return Outputs(student, ours), Outputs(teacher, theirs)


class LogitView(DistillationLoss):
    """A loss as a function of logits: networks over features are left out, else features are made up and fixed."""

    def __init__(self, loss: DistillationLoss, seed: int) -> None:
        super().__init__()
        self.loss = loss.leave_out_features() if isinstance(loss, LearnedLoss | ReplayedLoss) else loss
        self.seed = seed

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, progress: Progress = None) -> Terms:
        """The loss's terms; over features, of a few samples at a time: comparisons of images take much memory."""
        if not self.loss.teacher_stages:
            return self.loss(student, teacher, target, progress)
        terms: Terms = {}
        for ours, theirs, labels in zip(*(x.split(FEW) for x in (student.logits, teacher.logits, target)), strict=True):
            few = self.loss(*add_features(ours, theirs, self.seed), labels, progress)
            terms |= {name: terms.get(name, 0.0) + term * len(ours) / len(target) for name, term in few.items()}
        return terms


def logit_gradient(loss: DistillationLoss, states: States, progress: float) -> Tensor:
    """Gradient of each sample's loss with respect to its student's logits, [N, C]; the loss is a mean over samples."""
    logits = states.student.detach().requires_grad_()
    terms = loss(Outputs(logits, {}), Outputs(states.teacher, {}), states.target, progress)
    (gradient,) = torch.autograd.grad(torch.stack(list(terms.values())).sum(), logits)
    return gradient * len(logits)


def parts_at(loss: DistillationLoss, progress: float) -> dict[str, Any]:
    """The networks of a learned loss that are in charge at this progress, by name; none of a hand-made loss."""
    return dict(loss.at(progress).parts.items()) if isinstance(loss, LearnedLoss | ReplayedLoss) else {}


# ----------------------------------------------------------------------------------------------------------------------
# The gradient field over the confidence of teacher and student, beside those of KD and cross-entropy.

FIELD_PROGRESS = (0.0, 0.5, 1.0)
FIELD_POINTS = 33
DIGITS = 5  # after the point


def describe_field(loss: DistillationLoss, kd: KDLoss, num_classes: int) -> dict[str, Any]:
    """The gradient at the student's logit of the label; what is left of each probability is shared evenly.

    Returns:
        `confidence`: the grid. `loss`, at three progresses, `kd` and `cross_entropy`: each with its `gradient` (rows
        are the teacher's confidence, columns the student's) and its `rest`: where the loss would leave the student, for
        each of the teacher's confidences (`find_rest`).
    """

    def describe(each: DistillationLoss, progress: float) -> dict[str, Any]:
        surface = gradient_surface(each, progress, num_classes, FIELD_POINTS)
        rounded = [[round(x, DIGITS) for x in row] for row in surface.tolist()]
        return {"gradient": rounded, "rest": [find_rest(row) for row in surface]}

    return {
        "confidence": confidence_grid(FIELD_POINTS).tolist(),
        "loss": [{"progress": progress, **describe(loss, progress)} for progress in FIELD_PROGRESS],
        "kd": describe(kd, 0.0),
        "cross_entropy": describe(CrossEntropyLoss(), 0.0),
    }


def find_rest(row: Tensor) -> float:
    """The student's probability at which the gradient changes from negative to positive; the last, if there are many.

    0 where it is positive throughout, 1 where it is negative throughout.
    """
    grid = confidence_grid(len(row)).tolist()
    rising = ((row[:-1] < 0) & (row[1:] >= 0)).nonzero().flatten().tolist()
    if not rising:
        return 1.0 if float(row[-1]) < 0 else 0.0
    low, high = row[rising[-1]].item(), row[rising[-1] + 1].item()
    start, end = grid[rising[-1]], grid[rising[-1] + 1]
    return start + (end - start) * -low / (high - low)


# ----------------------------------------------------------------------------------------------------------------------
# Which cross-entropy and which KD a gradient is most like: the balance that a loss implies.

FIT_PROGRESS = tuple(step / 10 for step in range(11))
TEMPERATURES = (0.5, 20.0)  # the effective temperature is sought between them
POINTS, ROUNDS = 21, 3  # of the search; each round looks between the neighbours of the best so far
NEGLIGIBLE = 0.1  # a teacher with less of the gradient's norm has no temperature
AS_GOOD = 0.01  # temperatures that explain at most this much less are as good


@dataclass(frozen=True)
class BalanceFit:
    """Least squares of a gradient on w_ce · CE's + w_kd · KD's at τ, the latter with its factor τ²; neither negative.

    What is as good are the least and the greatest that explain almost as much, each with its best weights.
    """

    task: float  # w_ce
    distillation: float  # w_kd
    share: float | None  # w_kd / (w_ce + w_kd); None where the gradient has nothing of either
    temperature: float | None  # τ; None where the teacher has no part in the gradient
    temperatures_as_good: tuple[float, float] | None
    shares_as_good: tuple[float, float] | None
    explained: float  # R²: the part of the gradient's squared norm that is explained, in [0, 1]


def fit_balance(gradient: Tensor, student: Tensor, teacher: Tensor, target: Tensor) -> BalanceFit:
    """Fit the gradient of each sample's loss at the student's logits, [N, C]; for each temperature in closed form."""
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
    temperatures, shares = [temperature, *good_temperatures], [share or 0.0, *good_shares]
    return BalanceFit(
        task=w_task,
        distillation=w_teacher,
        share=share,
        temperature=None if negligible else temperature,
        temperatures_as_good=None if negligible else (min(temperatures), max(temperatures)),
        shares_as_good=None if share is None else (min(shares), max(shares)),
        explained=min(1.0, max(0.0, 1 - float(residuals[best]) / whole)),
    )


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
    from scipy.optimize import nnls  # slow to import

    taught = distillation_gradients(student, teacher, temperatures)
    pairs = torch.stack([task.expand_as(taught), taught], -1).flatten(1, 2)
    weights, norms = zip(*(nnls(pair.numpy(), gradient.flatten().numpy()) for pair in pairs), strict=True)
    return torch.tensor(np.array(weights)), torch.tensor(norms).square()


def imply_balance(loss: DistillationLoss, states: States) -> dict[str, Any]:
    """The implied balance over the training's progress and over what student and teacher think of the label.

    Returns:
        `over_progress`: at each progress, all states together, and `students`: those of each student's confidence;
        `over_student` and `over_teacher`: of each confidence, in the middle of training.
    """

    def fit(gradient: Tensor, chosen: Tensor | slice = slice(None)) -> dict[str, Any]:
        return asdict(fit_balance(*(x[chosen] for x in (gradient, states.student, states.teacher, states.target))))

    def fit_each(gradient: Tensor, confidence: Tensor) -> list[dict[str, Any]]:
        return [{"confidence": level, **fit(gradient, confidence == level)} for level in CONFIDENCES]

    rows = []
    for progress in FIT_PROGRESS:
        gradient = logit_gradient(loss, states, progress)
        rows.append({"progress": progress, **fit(gradient), "students": fit_each(gradient, states.student_confidence)})
    middle = logit_gradient(loss, states, 0.5)
    return {
        "over_progress": rows,
        "over_student": fit_each(middle, states.student_confidence),
        "over_teacher": fit_each(middle, states.teacher_confidence),
    }


@torch.no_grad()
def read_own_balance(loss: DistillationLoss, states: States, progress: float) -> dict[str, float]:
    """What a form sets itself, means over the states: `weight` α and `temperature` τ; empty where it has none.

    Of the decoupled form also `factor`, β of the other classes, and `ramp`, the part of the teacher's terms that counts
    at this progress.
    """
    part = parts_at(loss, progress).get("logits")
    if part is None:
        return {}
    own = set_own(part, states, progress)
    ramp = {"ramp": float(part.ramp(progress, own["weight"]))} if isinstance(part, DecoupledLoss) else {}
    return {name: float(values.mean()) for name, values in own.items()} | ramp


def set_own(part: LogitForm, states: "States | MadeUpBatch", progress: float) -> dict[str, Tensor]:
    """What a form sets of each sample: `weight`, `temperature` and, where it has one, `factor`, and κ, `calibration`.

    κ only where the teacher's best temperature is known.
    """
    logs = part.read(states.student, states.teacher, states.target)
    weight, temperature, *rest = part.set_balance(logs, progress)
    own = {"weight": weight, "temperature": temperature} | dict(zip(("factor",), rest, strict=False))
    best = part.trust[2].log()
    if isinstance(part, DecoupledLoss) and part.calibrates and best.isfinite() and best:
        own["calibration"] = rest[1].log() / best
    return own


# ----------------------------------------------------------------------------------------------------------------------
# What a form that is told trust, or sees the means over a batch, sets in made-up worlds.

SAMPLES, NUMBERS = 4000, 1_000_000  # at most, of a batch; of many classes 200 samples all the same
TYPICAL_TEMPERATURE = 2.0  # of a teacher that was trained to the end
TYPICAL_IMAGES = 400.0  # per class
CASES = {  # whether student and label agree, student and teacher, teacher and label
    "all agree": (True, True, True),
    "teacher = label, student not": (False, False, True),
    "student = label, teacher not": (True, False, False),
    "teacher = student, label not": (False, True, False),
    "all differ": (False, False, False),
}
# Share of wrong labels, and how often teacher and student are right.
TYPICAL_WORLD = (0.2, 0.8, 0.6)  # in which all cases are met
WORLDS = {
    "good": (0.0, 0.9, 0.6),
    "wrong labels": (0.4, 0.9, 0.6),
    "wrong teacher": (0.0, 0.5, 0.6),
}
TEACHER_ACCURACIES = tuple(step / 10 for step in range(2, 10))
OWN_ACCURACIES = (0.4, 0.8)
WRONG_LABELS = (0.0, 0.4)


class MadeUpBatch(NamedTuple):
    """Logits of student and teacher in a made-up world, [N, C], the labels, and what would be measured there."""

    student: Tensor
    teacher: Tensor
    target: Tensor
    figures: TrustFigures


def draw_batch(
    wrong_labels: float, teacher_accuracy: float, student_accuracy: float, num_classes: int, seed: int
) -> MadeUpBatch:
    """Draw a batch, in float64, of a world with such a share of wrong labels and such a teacher and student.

    Each network sees the true class through normal noise of its own, just weak enough for its accuracy, and answers
    with the probabilities that follow: it is sure where it may be. The teacher's logits are then
    `TYPICAL_TEMPERATURE` times as large. Wrong labels are random.
    """
    generator, count = torch.Generator().manual_seed(seed), max(200, min(SAMPLES, NUMBERS // num_classes))
    truth = torch.randint(num_classes, (count, 1), generator=generator)

    def answer(accuracy: float) -> Tensor:
        noise = torch.randn(count, num_classes, dtype=torch.float64, generator=generator)
        needed = noise.scatter(1, truth, -math.inf).amax(1, keepdim=True) - noise.gather(1, truth)
        signal = needed.quantile(accuracy).clamp_min(0.1)
        return signal * noise.scatter_add(1, truth, signal.expand(count, 1))

    student, teacher = answer(student_accuracy), TYPICAL_TEMPERATURE * answer(teacher_accuracy)
    wrong = torch.rand(count, 1, generator=generator) < wrong_labels
    others = truth + torch.randint(1, num_classes, (count, 1), generator=generator)
    true, target = truth.squeeze(1), truth.where(~wrong, others % num_classes).squeeze(1)
    agreements = agree(teacher, true), agree(teacher, target)
    figures = TrustFigures(*agreements, TYPICAL_TEMPERATURE, TYPICAL_IMAGES, agree(student, true))
    return MadeUpBatch(student, teacher, target, figures)


@torch.no_grad()
def describe_choices(loss: DistillationLoss, num_classes: int, seed: int) -> dict[str, Any]:
    """What a form sets in made-up worlds: means over their samples of what `set_own` gives.

    Returns:
        `agreement`, in `TYPICAL_WORLD` at three progresses, and `context`, in each of `WORLDS` halfway, told what would
        be measured there and not: for each of `CASES` the means, None where it is not met. `trust`, of a form that
        reads it: over `TEACHER_ACCURACIES`, for each share of wrong labels and accuracy of the student, told and not.
    """

    def set_means(batch: MadeUpBatch, told: bool, progress: float = 0.5) -> dict[str, dict[str, float | None]]:
        loss.set_trust(Trust(batch.figures if told else TrustFigures()))
        own = set_own(parts_at(loss, progress)["logits"], batch, progress)
        answers, advice = batch.student.argmax(1), batch.teacher.argmax(1)
        compared = torch.stack([answers == batch.target, answers == advice, advice == batch.target], 1)
        chosen = {case: (compared == torch.tensor(pairs)).all(1) for case, pairs in CASES.items()}
        chosen["the whole batch"] = torch.ones_like(batch.target, dtype=torch.bool)
        return {
            case: {name: float(values[rows].mean()) if rows.any() else None for name, values in own.items()}
            for case, rows in chosen.items()
        }

    reads_trust = loss.reads_trust
    tellings = {"told": True, "not told": False} if reads_trust else {"": False}
    typical = draw_batch(*TYPICAL_WORLD, num_classes, seed)
    worlds = {name: draw_batch(*world, num_classes, seed) for name, world in WORLDS.items()}
    lines = []
    for wrong_labels, own_accuracy in itertools.product(WRONG_LABELS, OWN_ACCURACIES) if reads_trust else ():
        batches = [draw_batch(wrong_labels, teacher, own_accuracy, num_classes, seed) for teacher in TEACHER_ACCURACIES]
        for told in (True, False):
            means = [set_means(batch, told)["the whole batch"] for batch in batches]
            lines.append({"wrong_labels": wrong_labels, "own_accuracy": own_accuracy, "told": told, "means": means})
    return {
        "agreement": {f"progress {p:g}": set_means(typical, reads_trust, p) for p in FIELD_PROGRESS},
        "context": {
            f"{name}, {telling}".rstrip(", "): set_means(batch, told)
            for name, batch in worlds.items()
            for telling, told in tellings.items()
        },
        "trust": {"teacher_accuracies": TEACHER_ACCURACIES, "lines": lines} if reads_trust else None,
    }


# ----------------------------------------------------------------------------------------------------------------------
# Which stages of a student learn from which of a teacher.


def describe_pairing(loss: DistillationLoss) -> list[dict[str, Any]] | None:
    """How a learned loss pairs stages, at three progresses; None if it has no network over features.

    Returns:
        `student` and `teacher`, the stages' names and relative depths; `assignment`, [student stage, teacher stage],
        rows of sum 1; `weights`, each comparison's weight at each of the student's stages. They are those of networks
        of as many stages as `STAGES`.
    """
    if any(isinstance(part, FeatureLoss) for part in parts_at(loss, 0.0).values()):
        return [describe_learned(loss, progress) for progress in FIELD_PROGRESS]
    return None


@torch.no_grad()
def describe_learned(loss: DistillationLoss, progress: float) -> dict[str, Any]:
    """The pairing of the network over features that is in charge at this progress."""
    (part,) = (part for part in parts_at(loss, progress).values() if isinstance(part, FeatureLoss))
    chosen = list(STAGES)[-part.deepest :]
    depths = torch.tensor(relative_depths(list(STAGES), chosen))
    weights = part.weigh_stages(depths, torch.tensor(progress))
    named = dict(zip(chosen, depths.tolist(), strict=True))
    return {
        "progress": progress,
        "student": named,
        "teacher": named,
        "assignment": part.assign_stages(depths, depths).tolist(),
        "weights": {name: weights[:, kind].tolist() for kind, name in enumerate(COMPARISONS)},
    }


# ----------------------------------------------------------------------------------------------------------------------
# All that is found out about a loss.


def inspect_loss(
    loss: DistillationLoss, kd: KDLoss | None = None, num_classes: int = 10, seed: int = 0
) -> dict[str, Any]:
    """Find out what a loss does, without training anything.

    The loss is asked about made-up logits (of students and teachers of every confidence) and, if it reads features,
    made-up features of four stages, `STAGES`; nothing is read, written or changed.

    Args:
        loss: A learned loss or any other.
        kd: KD to compare with; by default of weight 0.5 and temperature 4.
        num_classes: Number of classes, at least 2.
        seed: Of what is made up.

    Returns:
        A tree that JSON can hold: `parts`, `parameters`, `kd`, `num_classes`, and what these say: `describe_field` and
        `imply_balance` (None for a loss that only reads features), `read_own_balance`, `describe_choices` (None for one
        that reads neither trust nor the context of a batch), `gradient_shares` and `describe_pairing`.
    """
    kd = kd or KDLoss()
    loss = copy.deepcopy(loss).eval().requires_grad_(False)
    precise = copy.deepcopy(loss).double()
    states = draw_states(num_classes, seed)
    view = LogitView(loss, seed)
    over_logits = bool(parts_at(view.loss, 0.0)) or not parts_at(loss, 0.0)
    own = [{"progress": p, **read_own_balance(precise, states, p)} for p in FIT_PROGRESS] if over_logits else []
    student, teacher, target = (x[::SPARSE] for x in states[:3])
    outputs = add_features(student, teacher, seed)
    conditioning = getattr(parts_at(loss, 0.0).get("logits"), "conditioning", ())
    sees_worlds = not {"context", *TRUST_CONDITIONING}.isdisjoint(conditioning)
    return {
        "parts": {
            name: {"form": type(part).__name__, "options": getattr(part, "architecture", {})}
            for name, part in (parts_at(loss, 0.0) or {"loss": loss}).items()
        },
        "parameters": sum(parameter.numel() for parameter in loss.parameters()),
        "num_classes": num_classes,
        "kd": {"weight": kd.weight, "temperature": kd.temperature},
        "field": describe_field(view, kd, num_classes) if over_logits else None,
        "balance": imply_balance(LogitView(precise, seed), states) if over_logits else None,
        "own_balance": [row for row in own if len(row) > 1],
        "shares": [{"progress": p, "shares": gradient_shares(precise, *outputs, target, p)} for p in FIELD_PROGRESS],
        "choices": describe_choices(copy.deepcopy(precise), num_classes, seed) if sees_worlds else None,
        "pairing": describe_pairing(loss),
    }
