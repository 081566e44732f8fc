"""Influence of each training example on the meta-validation loss: I_i = −∇L_valᵀ (H + damping)⁻¹ ∇L_i."""

import logging
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lkd.config.training import InfluenceSettings
from lkd.core.errors import UserError
from lkd.core.outputs import evaluating
from lkd.data.images import ImageSet
from lkd.influence.solvers import InfluenceProblem, measure_with_ekfac, solve_iteratively
from lkd.losses.loss import DistillationLoss
from lkd.models.teacher import TeacherFunction

# ----------------------------------------------------------------------------------------------------------------------
# Influence of each training example on the meta-validation loss: I_i = −∇L_valᵀ (H + damping)⁻¹ ∇L_i. KD-AIF (Wu,
# Luo, Liu, Deng, *Statistics* 59(2), 2025, arXiv 2501.02705) weights the examples of distillation by it; the formula
# is Koh and Liang's (2017): negative is helpful, giving the example more weight lowers the validation loss. The
# paper's abstract and official code establish influence, weights of it and several update mechanisms. *Our
# reconstruction*: everything about meta-validation (the code queries test images), the solvers' settings, Gauss-
# Newton in the Hessian's place, and the objective (see `InfluenceSettings`). The code's LiSSA has recursion depth 1, so
# that its inverse is close to a scaled identity.

RESIDUAL_LIMIT = 0.1  # relative residual of conjugate gradients that is warned of above


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
        loss: What the examples teach; see `InfluenceProblem`.
        teacher: The teacher, where the loss needs one.
        train: The examples.
        meta_validation: The images whose objective is to fall; never test images.
        device: Where the network is.
        settings: How.
        progress: How far the training is, in [0, 1]; losses may read it.
        seed: Of the examples that the curvature is taken over, and of the labels that EK-FAC draws.

    Raises:
        UserError: If a setting is impossible or does not suit the network.
    """
    # Fused attention has no derivatives of derivatives.
    with evaluating(network), sdpa_kernel(SDPBackend.MATH):
        problem = InfluenceProblem(network, loss, teacher, train, meta_validation, device, settings, progress)
        if settings.method == "ekfac":
            return Influence(*measure_with_ekfac(problem, settings, seed), damping=math.nan)
        found = solve_iteratively(problem, problem.differentiate_validation(), settings, seed)
        if found.residual > RESIDUAL_LIMIT:
            logging.getLogger("lkd").warning(
                "warning: influence: relative residual %.2g after %d iterations of conjugate gradients: the system is "
                "not solved; raise influence.iterations or influence.damping",
                *(found.residual, settings.iterations),
            )
        index, products = problem.project_gradients(found.vector)
        if not bool(products.isfinite().all()):
            raise UserError("influence: it is not finite: check the images, the network and the loss")
        return Influence(index, -products, *found[1:])


INFLUENCE_WEIGHTED = "influence_weighted"
