"""A learned loss: its networks put together, built from a recipe, and replayed by progress."""

import inspect
import itertools
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, softmax

from lkd.core.errors import UserError, check_choice
from lkd.core.outputs import Outputs
from lkd.losses.functions import Stages, full_precision
from lkd.losses.learned.features import FeatureLoss
from lkd.losses.learned.forms import FORMS, LogitForm
from lkd.losses.learned.trust import OWN_ACCURACY, Trust, TrustFigures, measure_own_accuracy
from lkd.losses.logits import CrossEntropyLoss
from lkd.losses.loss import DistillationLoss, Progress, Terms, read_progress

# ----------------------------------------------------------------------------------------------------------------------
# A scale for a loss over logits that its own weights cannot change.

CONFIDENCES = (0.05, 0.2, 0.5, 0.8, 0.95)
NUM_CLASSES = 10


def reference_logits() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of student and teacher, [25, 10], and labels, [25], of five confidences of each.

    What is left of the label's probability falls off geometrically over the other classes, in another order for the
    student than for the teacher.
    """
    falling = 0.5 ** torch.arange(NUM_CLASSES - 1, dtype=torch.float64)
    rest = falling / falling.sum()
    rows = [
        (torch.cat([torch.tensor([s]), (1 - s) * rest.roll(3)]), torch.cat([torch.tensor([t]), (1 - t) * rest]))
        for s in CONFIDENCES
        for t in CONFIDENCES
    ]
    student, teacher = (torch.stack(column).log() for column in zip(*rows, strict=True))
    return student, teacher, torch.zeros(len(rows), dtype=torch.int64)


REFERENCE = reference_logits()


def gradient_scale(loss: nn.Module, progress: Progress) -> Tensor:
    """Norm of cross-entropy's gradient over that of the loss's, at the reference logits; a scalar.

    It depends on the loss's weights and on the progress, not on the student. So a loss times its scale is still a
    function of the student whose gradient is what autograd says and whose Hessian is symmetric, and it is
    differentiable in the weights. Dividing by the batch's own gradient norm would be neither (detached: the gradient of
    no function) nor cheap (attached: a third derivative of the student). What this costs: one gradient of the loss at
    25 × 10 logits a step; and it holds the norm on average over these states, so that a loss can still weigh some
    states more than others.
    """
    like = next(loss.parameters())
    student, teacher, target = (tensor.to(like.device) for tensor in REFERENCE)
    student, teacher = student.to(like.dtype), teacher.to(like.dtype)

    def total(logits: Tensor) -> Tensor:
        terms = loss(Outputs(logits, {}), Outputs(teacher, {}), target, progress)
        return torch.stack(list(terms.values())).sum()

    with full_precision(like):
        gradient = torch.func.grad(total)(student)
    plain = (softmax(student, 1) - one_hot(target, NUM_CLASSES)) / len(target)
    return plain.norm() * (gradient.square().sum() + 1e-12).rsqrt()


# ----------------------------------------------------------------------------------------------------------------------
# The sum of loss networks that is saved, loaded and trained with; and its course over a training.


class LearnedLoss(DistillationLoss):
    """A learned loss: the sum of named parts, each a loss network with all weights inside.

    Args:
        parts: Part name → loss network; each part's terms are named `part/term`.
        normalize_gradient: Whether each part over logits is scaled so that the norm of its gradient at reference logits
            is cross-entropy's, at every progress: then no weights of it act as a learning rate (see `gradient_scale`).
    """

    def __init__(self, parts: Mapping[str, DistillationLoss], normalize_gradient: bool = False) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(dict(parts))
        self.normalize_gradient = normalize_gradient
        self.looks: tuple[tuple[Tensor, Tensor], ...] = ()

    @property
    def teacher_stages(self) -> tuple[str, ...]:  # type: ignore[override]  # they are known once a part is attached
        """The teacher's stages that the parts read."""
        parts: Any = self.parts.values()
        return tuple(dict.fromkeys(stage for part in parts for stage in part.teacher_stages))

    @property
    def reads_trust(self) -> bool:  # type: ignore[override]
        return any(part.reads_trust for part in self.forms())

    def forms(self) -> list[LogitForm]:
        """The parts over logits that have weights."""
        return [part for part in self.parts.values() if isinstance(part, LogitForm)]

    def set_trust(self, trust: Trust) -> None:
        self.looks = trust.looks
        self.tell(trust.figures)

    def tell(self, figures: TrustFigures) -> None:
        """Give the parts these figures; where no labels are held out, training labels stand in for them.

        Of a student that learns wrong labels by heart the loss then believes that it has overtaken the teacher, and
        fades. Without its accuracy it would do so under no random teacher either, which costs more.
        """
        for name, value in figures._asdict().items():
            positive = name in ("temperature", "images_per_class")
            if value < 0 or (value in (0, math.inf) if positive else value > 1):
                raise UserError(f"trust: {name} {value} is not in {'(0, ∞)' if positive else '[0, 1]'}, nor NaN")
        if math.isnan(figures.validation_agreement):
            figures = figures._replace(validation_agreement=figures.training_agreement)
        with torch.inference_mode(False):  # what is made in it cannot be updated outside of it
            for part in self.forms():
                part.trust = torch.tensor(figures, device=next(part.parameters()).device)

    def update_trust(self, student: nn.Module) -> None:
        """Measure the student's own accuracy anew, on the meta-validation images of `set_trust`, if it is read."""
        if self.looks and self.reads_trust:
            self.tell_accuracy(measure_own_accuracy(student, self.looks))

    def tell_accuracy(self, accuracy: float) -> None:
        """Give the parts the student's own accuracy."""
        for part in self.forms():
            part.trust[OWN_ACCURACY] = accuracy

    def at(self, progress: Progress) -> "LearnedLoss":
        """The loss in charge at this progress: itself."""
        return self

    def leave_out_features(self) -> "LearnedLoss":
        """The sum of the parts that read no features."""
        parts: Any = self.parts.items()
        kept = {name: part for name, part in parts if not isinstance(part, FeatureLoss)}
        return LearnedLoss(kept, self.normalize_gradient)

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, progress: Progress = None) -> Terms:
        """Compute every part's terms, at progress 1 where it is not given.

        Raises:
            ValueError: If `progress` is not in [0, 1].
        """
        terms = {}
        for name, part in self.parts.items():
            # A part without weights, such as cross-entropy, has no scale of its own.
            scaled = (
                self.normalize_gradient and not isinstance(part, FeatureLoss) and any(True for _ in part.parameters())
            )
            scale = gradient_scale(part, progress) if scaled else 1.0
            for term, value in part(student, teacher, target, progress).items():
                terms[f"{name}/{term}"] = scale * value
        return terms


class ReplayedLoss(DistillationLoss):
    """The course of a learned loss: at each progress, the loss that was in charge there.

    *Our reconstruction* of the reuse of LKD's dynamic strategy. Steps, not interpolates: a student meets exactly the
    losses that the recorded students met.

    Args:
        losses: The losses, in order.
        starts: Progress from which each is in charge; the first is 0, and they increase.

    Raises:
        ValueError: If there is not one start for each loss, or they do not increase from 0.
    """

    def __init__(self, losses: Sequence[LearnedLoss], starts: Sequence[float]) -> None:
        super().__init__()
        increasing = all(a < b for a, b in itertools.pairwise(starts))
        if len(losses) != len(starts) or not starts or starts[0] != 0 or not increasing:
            raise ValueError(f"starts: {list(starts)} do not increase from 0, one for each of {len(losses)} losses")
        self.losses: Any = nn.ModuleList(losses)
        self.starts = [float(start) for start in starts]

    @property
    def teacher_stages(self) -> tuple[str, ...]:  # type: ignore[override]
        stages: tuple[str, ...] = self.losses[0].teacher_stages
        return stages

    @property
    def reads_trust(self) -> bool:  # type: ignore[override]
        return bool(self.losses[0].reads_trust)

    def set_trust(self, trust: Trust) -> None:
        for loss in self.losses:
            loss.set_trust(trust)

    def update_trust(self, student: nn.Module) -> None:
        """Measure the student's own accuracy anew, once for all losses."""
        if self.losses[0].looks and self.reads_trust:
            accuracy = measure_own_accuracy(student, self.losses[0].looks)
            for loss in self.losses:
                loss.tell_accuracy(accuracy)

    def at(self, progress: Progress) -> LearnedLoss:
        """The loss in charge at this progress; a `ValueError` if that is None or not in [0, 1]."""
        if progress is None:
            raise ValueError("progress: None; a replayed loss must be told how far the training is, in [0, 1]")
        loss: LearnedLoss = self.losses[bisect_right(self.starts, read_progress(float(progress))) - 1]
        return loss

    def leave_out_features(self) -> "ReplayedLoss":
        """The course of the parts that read no features."""
        return ReplayedLoss([loss.leave_out_features() for loss in self.losses], self.starts)

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, progress: Progress = None) -> Terms:
        """Compute the terms of the loss in charge; a `ValueError` if progress is None or not in [0, 1]."""
        return self.at(progress).forward(student, teacher, target, progress)


# ----------------------------------------------------------------------------------------------------------------------
# From a recipe's `meta.kind` and `meta.loss` to a learned loss.

KINDS = ("logits", "features", "both")


def build_learned_loss(
    kind: str, options: dict[str, Any], student_stages: Stages | None = None, teacher_stages: Stages | None = None
) -> LearnedLoss:
    """Build a learned loss with fresh weights.

    Args:
        kind: logits; features, which adds plain cross-entropy as the task; or both.
        options: `form` (one of `FORMS`), the options of that form, `normalize_gradient`, and `features`: the options of
            `FeatureLoss`.
        student_stages: Shape of each stage's feature for one image; needed by features and both.
        teacher_stages: The same of the teacher.
    """
    check_choice("meta.kind", kind, KINDS)
    remaining = dict(options)
    form = remaining.pop("form", "decoupled")
    normalize_gradient = remaining.pop("normalize_gradient", False)
    feature_options = remaining.pop("features", {})
    if not isinstance(normalize_gradient, bool):
        raise UserError(f"meta.loss.normalize_gradient: {normalize_gradient!r} is neither true nor false")
    if not isinstance(feature_options, dict):
        raise UserError(f"meta.loss.features: {feature_options!r} is not a mapping of options")
    if kind == "features" and options.keys() - {"features"}:
        unread = ", ".join(name for name in options if name != "features")
        raise UserError(f"meta.loss: kind features has no network over logits, which {unread} could be for")
    if kind == "logits" and feature_options:
        raise UserError("meta.loss.features: kind logits has no network over features; set meta.kind to both")
    parts: dict[str, DistillationLoss] = {}
    if kind == "features":
        parts["task"] = CrossEntropyLoss()
    else:
        check_choice("meta.loss.form", form, FORMS)
        parts["logits"] = build_part(FORMS[form], remaining, "meta.loss", f"form {form}")
    if kind != "logits":
        if student_stages is None or teacher_stages is None:
            raise UserError(f"meta.kind {kind}: give build_learned_loss the student's and the teacher's stages")
        part = build_part(FeatureLoss, feature_options, "meta.loss.features", "the network over features")
        try:
            parts["features"] = part.attach(student_stages, teacher_stages)
        except ValueError as error:
            raise UserError(f"meta.kind {kind}: {error}") from error
    return LearnedLoss(parts, normalize_gradient)


def build_part(network: type[DistillationLoss], options: dict[str, Any], field: str, described: str) -> Any:
    """Build one loss network; a `UserError` if it takes no such option, or not that value."""
    known = list(inspect.signature(network).parameters)
    for name in options:
        if name not in known:
            raise UserError(f"{field}: unknown option {name!r}; {described} takes {', '.join(known)}")
    try:
        return network(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{field}: {error}") from error
