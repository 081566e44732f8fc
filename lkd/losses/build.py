"""From a loss's name and options to a module."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lkd.core.errors import UserError, check_choice
from lkd.core.files import find_pretrained
from lkd.losses.dkd import DKDLoss
from lkd.losses.features import AttentionTransferLoss, FitNetLoss, PairedLoss, RKDLoss, SimilarityPreservingLoss
from lkd.losses.functions import Stages
from lkd.losses.learned.features import FeatureLoss
from lkd.losses.learned.file import PRETRAINED, load_loss
from lkd.losses.learned.loss import LearnedLoss, ReplayedLoss
from lkd.losses.logits import CrossEntropyLoss, DISTLoss, KDLoss, LogitMSELoss, LogitStandardizationLoss
from lkd.losses.loss import DistillationLoss

TEACHER_LOGIT_LOSSES: dict[str, type[DistillationLoss]] = {
    "kd": KDLoss, "logit_mse": LogitMSELoss, "dkd": DKDLoss, "dist": DISTLoss
}  # fmt: skip
FEATURE_LOSSES: dict[str, type[PairedLoss]] = {
    "fitnet": FitNetLoss, "at": AttentionTransferLoss, "sp": SimilarityPreservingLoss, "rkd": RKDLoss
}  # fmt: skip
LOSSES: dict[str, type[DistillationLoss]] = {
    "cross_entropy": CrossEntropyLoss,
    **TEACHER_LOGIT_LOSSES,
    "logit_standardization": LogitStandardizationLoss,
    **FEATURE_LOSSES,
}
TORCHDISTILL = "torchdistill/"


def build_loss(
    specification: str | dict[str, Any], student_stages: Stages | None = None, teacher_stages: Stages | None = None
) -> DistillationLoss:
    """Build a loss.

    Args:
        specification: A name in `LOSSES`, or `torchdistill/` and the name of a class there; the path of a learned-loss
            file; or a dict with `name` and the loss's own arguments.
        student_stages: Shape of each stage's feature for one image; needed by losses over features.
        teacher_stages: The same of the teacher.

    Raises:
        UserError: If the name, an argument, a stage or the file is not good.
    """
    options = dict(specification) if isinstance(specification, dict) else {"name": specification}
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise UserError(
            f"loss: {specification!r} has no `name`: --loss.name, a file or {', '.join([*PRETRAINED, *sorted(LOSSES)])}"
        )
    if is_learned(name):
        return attach_features(load_loss(name), name, options, student_stages, teacher_stages)
    if not name.startswith(TORCHDISTILL):
        check_choice("loss", name, [*PRETRAINED, *LOSSES])
    try:
        if name == "logit_standardization":
            return standardize_inner(options)
        if not reads_features(name):
            return LOSSES[name](**options)
        network = FEATURE_LOSSES.get(name) or import_torchdistill(name)
        return network(*check_stages(name, student_stages, teacher_stages), **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"loss {name!r}: {error}") from error


def reads_features(specification: str | dict[str, Any]) -> bool:
    """Whether `build_loss` needs the stages' shapes for this loss."""
    name = str(specification.get("name") if isinstance(specification, dict) else specification)
    if is_learned(name):
        return bool(find_feature_parts(load_loss(name)))
    return name in FEATURE_LOSSES or name.startswith(TORCHDISTILL)


def is_learned(name: str) -> bool:
    """Whether a loss's name is that of a learned-loss file, or of one that the package carries."""
    return name.endswith(".safetensors") or find_pretrained(name) is not None or Path(name).is_file()


def find_feature_parts(loss: DistillationLoss) -> list[FeatureLoss]:
    """The parts of a learned loss that read features: none, one, or one for each loss that is replayed."""
    return [part for part in loss.modules() if isinstance(part, FeatureLoss)]


def check_stages(name: str, student: Stages | None, teacher: Stages | None) -> tuple[Stages, Stages]:
    """The stages that a loss over features needs."""
    if student is None or teacher is None:
        raise UserError(f"loss {name!r} reads features: give build_loss the student's and the teacher's stages")
    return student, teacher


def attach_features(
    loss: LearnedLoss | ReplayedLoss,
    path: str | Path,
    options: dict[str, Any],
    student_stages: Stages | None = None,
    teacher_stages: Stages | None = None,
) -> LearnedLoss | ReplayedLoss:
    """Attach a learned loss to the networks' stages, if it reads features.

    Its option `adapters` says whether the student's channels are adapted by 1×1 convolutions that are trained along.
    """
    parts = find_feature_parts(loss)
    unknown = sorted(options.keys() - ({"adapters"} if parts else set()))
    if unknown:
        raise UserError(f"loss: {path} is a learned loss and takes no {', '.join(unknown)}")
    if not parts:
        return loss
    stages = check_stages(str(path), student_stages, teacher_stages)
    adapters = options.get("adapters", False)
    if not isinstance(adapters, bool):
        raise UserError(f"loss {str(path)!r}: adapters: {adapters!r} is neither true nor false")
    try:
        for part in parts:
            part.attach(*stages, adapters)
            part.adapters = parts[0].adapters  # a student has one set, whichever loss is in charge
    except ValueError as error:
        raise UserError(f"loss {str(path)!r}: {error}") from error
    return loss


def standardize_inner(options: dict[str, Any]) -> LogitStandardizationLoss:
    """Build logit standardisation around the loss over a teacher's logits that `options` names."""
    inner = options.pop("loss", {"name": "kd", "weight": 0.9, "temperature": 2.0})
    name = inner.get("name") if isinstance(inner, dict) else inner
    if name not in TEACHER_LOGIT_LOSSES:
        raise UserError(
            f"loss 'logit_standardization': its `loss` {name!r} is not one of {', '.join(TEACHER_LOGIT_LOSSES)}"
        )
    return LogitStandardizationLoss(build_loss(inner), **options)


def import_torchdistill(name: str) -> Callable[..., DistillationLoss]:
    """What builds this one of torchdistill's losses, if torchdistill is installed."""
    try:
        from lkd.losses.torchdistill import TorchdistillLoss
    except ModuleNotFoundError as error:
        raise UserError(
            f"loss: {name} needs a package that is not installed ({error.name}): pip install torchdistill"
        ) from error
    return partial(TorchdistillLoss, name.removeprefix(TORCHDISTILL))
