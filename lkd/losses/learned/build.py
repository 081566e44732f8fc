"""From a recipe's `meta.kind` and `meta.loss` to a learned loss."""

import inspect
from typing import Any

from torch import nn

from lkd.errors import UserError, check_choice
from lkd.losses.cross_entropy import CrossEntropyLoss
from lkd.losses.learned.balance import BalanceLoss
from lkd.losses.learned.decoupled import DecoupledLoss
from lkd.losses.learned.features import FeatureLoss
from lkd.losses.learned.generic import GenericLoss
from lkd.losses.learned.learned_loss import LearnedLoss
from lkd.losses.learned.residual import ResidualLoss
from lkd.losses.learned.target import TargetLoss
from lkd.losses.stages import Stages

FORMS: dict[str, type[nn.Module]] = {
    "balance": BalanceLoss,
    "decoupled": DecoupledLoss,
    "generic": GenericLoss,
    "residual": ResidualLoss,
    "target": TargetLoss,
}
KINDS = ("logits", "features", "both")


def build_learned_loss(
    kind: str,
    options: dict[str, Any],
    student_stages: Stages | None = None,
    teacher_stages: Stages | None = None,
) -> LearnedLoss:
    """Build a learned loss with fresh weights.

    Args:
        kind: logits; features, which adds plain cross-entropy as the task; or both.
        options: `form` (one of `FORMS`), the options of that form, `normalize_gradient`, and `features`: the options of
            `FeatureLoss`.
        student_stages: Shape of each stage's feature for one image; needed by features and both.
        teacher_stages: The same of the teacher.

    Raises:
        UserError: If an option or the kind is not good, or a network gives no features.
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
    if kind == "features" and set(options) - {"features"}:
        unread = ", ".join(name for name in options if name != "features")
        raise UserError(f"meta.loss: kind features has no network over logits, which {unread} could be for")
    parts: dict[str, nn.Module] = {}
    if kind == "features":
        parts["task"] = CrossEntropyLoss()
    else:
        check_choice("meta.loss.form", form, FORMS)
        parts["logits"] = build_part(FORMS[form], remaining, "meta.loss", f"form {form}")
    if kind == "logits":
        if feature_options:
            raise UserError("meta.loss.features: kind logits has no network over features; set meta.kind to both")
        return LearnedLoss(parts, normalize_gradient)
    part = build_part(FeatureLoss, feature_options, "meta.loss.features", "the network over features")
    parts["features"] = part
    if student_stages is None or teacher_stages is None:
        raise UserError(f"meta.kind {kind}: give build_learned_loss the student's and the teacher's stages")
    try:
        part.attach(student_stages, teacher_stages)
    except ValueError as error:
        raise UserError(f"meta.kind {kind}: {error}") from error
    return LearnedLoss(parts, normalize_gradient)


def build_part(network: type[nn.Module], options: dict[str, Any], field: str, described: str) -> Any:
    """Build one loss network.

    Raises:
        UserError: If it takes no such option, or not that value.
    """
    known = list(inspect.signature(network.__init__).parameters)[1:]
    for name in options:
        if name not in known:
            raise UserError(f"{field}: unknown option {name!r}; {described} takes {', '.join(known)}")
    try:
        return network(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{field}: {error}") from error
