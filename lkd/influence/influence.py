"""Influence of each training example on the meta-validation loss: I_i = −∇L_valᵀ (H + damping)⁻¹ ∇L_i."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from lkd.config.training import InfluenceSettings, InfluenceWeightedLossSettings
from lkd.core.errors import UserError, check_choice
from lkd.data.images import ImageSet
from lkd.influence.solvers import SOLVERS, Problem, measure_through_training, measure_with_ekfac
from lkd.losses.loss import DistillationLoss
from lkd.models.teacher import TeacherFunction

# ----------------------------------------------------------------------------------------------------------------------
# Influence of each training example on the meta-validation loss: I_i = −∇L_valᵀ (H + damping)⁻¹ ∇L_i. KD-AIF (Wu,
# Luo, Liu, Deng, *Statistics* 59(2), 2025, arXiv 2501.02705) weights the examples of distillation by it; the formula
# is Koh and Liang's (2017): negative is helpful, giving the example more weight lowers the validation loss. The
# paper's abstract and official code establish influence, weights of it and several update mechanisms. *Our
# reconstruction*: everything about meta-validation (the code queries test images), the solvers' settings, Gauss-
# Newton in the Hessian's place, and meta-validation at its best temperature (plain cross-entropy also rewards
# examples that merely change the network's confidence). The code's LiSSA has recursion depth 1, so that its inverse
# is close to a scaled identity: that is `gradient_similarity` here.


class Influence(NamedTuple):
    """What was found.

    Attributes:
        index: Identity of each example, [N].
        scores: Its influence, [N]; negative is helpful.
        damping: What was added to the curvature in the end.
        least_curvature: The least curvature seen, before damping; negative if the Hessian is not positive definite;
            NaN where the method does not see it.
        residual: Relative residual of the linear system; NaN where there is none.
    """

    index: Tensor  # type: ignore[assignment]  # a field hides tuple.index
    scores: Tensor
    damping: float
    least_curvature: float = math.nan
    residual: float = math.nan


def measure_influence(
    network: nn.Module,
    loss: DistillationLoss,
    teacher: TeacherFunction | None,
    train: ImageSet,
    meta_validation: ImageSet,
    device: torch.device,
    settings: InfluenceSettings,
    progress: float = 1.0,
    seed: int = 0,
) -> Influence:
    """Measure it, with the network in eval mode (its mode is restored) and the images as they are, not augmented.

    Args:
        network: Returns `Outputs`.
        loss: What the examples teach; see `Problem`.
        teacher: The teacher, where the loss needs one.
        train: The examples.
        meta_validation: The images whose cross-entropy is to fall; never test images.
        device: Where the network is.
        settings: How.
        progress: How far the training is, in [0, 1]; losses may read it.
        seed: Of the examples that the curvature is taken over.

    Raises:
        UserError: If a setting is impossible or does not suit the network, or a solver diverges.
    """
    check_settings(settings)
    modes = {module: module.training for module in network.modules()}
    try:
        problem = Problem(
            network.eval(),
            loss,
            teacher,
            train,
            meta_validation,
            device,
            progress,
            settings.parameters,
            settings.objective == "calibrated_cross_entropy",
            settings.batch_size,
        )
        if settings.method == "ekfac":
            return Influence(*measure_with_ekfac(problem, settings), damping=math.nan)
        if settings.method == "bilevel":
            return Influence(*measure_through_training(problem, settings, seed), damping=0.0)
        found = SOLVERS[settings.method](problem, problem.differentiate_validation(), settings, seed)
        if not all(torch.isfinite(entry).all() for entry in found.vector):
            raise UserError(
                f"influence: {settings.method} diverged at step size {settings.step_size:g} and damping "
                f"{found.damping:g}; lower influence.step_size or raise influence.damping"
            )
        index, products = problem.project_gradients(found.vector)
        return Influence(index, -products, *found[1:])
    finally:
        for module, mode in modes.items():
            module.training = mode


def check_settings(settings: InfluenceSettings) -> None:
    """Check the numbers.

    Raises:
        UserError: If one is out of range.
    """
    for name, least in (("damping", 0.0), ("curvature_examples", 0), ("iterations", 1), ("batch_size", 1)):
        if not getattr(settings, name) >= least:
            raise UserError(f"influence.{name}: {getattr(settings, name)} is not at least {least}")
    for name in ("step_size", "sharpness"):
        if not 0 < getattr(settings, name) < math.inf:
            raise UserError(f"influence.{name}: {getattr(settings, name)} is not positive")


# ----------------------------------------------------------------------------------------------------------------------
# Options of the loss influence_weighted, from a recipe's mapping to a dataclass.

INFLUENCE_WEIGHTED = "influence_weighted"
Settings = TypeVar("Settings", InfluenceSettings, InfluenceWeightedLossSettings)


def read_weighted_loss(specification: dict[str, Any]) -> InfluenceWeightedLossSettings:
    """Read {name: influence_weighted, ...}.

    Raises:
        UserError: If an option is unknown or of the wrong type.
    """
    where = f"loss '{INFLUENCE_WEIGHTED}'"
    options = {name: value for name, value in specification.items() if name != "name"}
    if not isinstance(options.get("influence", {}), dict):
        raise UserError(f"{where}: influence: {options['influence']!r} is not a mapping, such as {{method: lissa}}")
    influence = read_settings(f"{where}: influence", InfluenceSettings, options.pop("influence", {}))
    return dataclasses.replace(read_settings(where, InfluenceWeightedLossSettings, options), influence=influence)


def read_settings(where: str, kind: type[Settings], values: dict[str, Any]) -> Settings:
    """Make a dataclass of plain values.

    Raises:
        UserError: If a name is unknown or a value is not of its field's type.
    """
    hints = get_type_hints(kind)
    for name, value in values.items():
        check_choice(where, name, hints)
        hint = hints[name]
        if get_origin(hint) is Literal:
            check_choice(f"{where}: {name}", str(value), get_args(hint))
        elif hint in (int, float) and (
            isinstance(value, bool) or not isinstance(value, int if hint is int else (int, float))
        ):
            raise UserError(f"{where}: {name}: {value!r} is not of type {hint.__name__}")
    return kind(**values)
