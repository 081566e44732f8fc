"""Influence of each training example on the meta-validation loss: I_i = −∇L_valᵀ (H + damping)⁻¹ ∇L_i.

KD-AIF (Wu, Luo, Liu, Deng, *Statistics* 59(2), 2025, arXiv 2501.02705) weights the examples of distillation by it; the
formula is Koh and Liang's (2017): negative is helpful, giving the example more weight lowers the validation loss. The
paper's abstract and official code establish influence, weights of it and several update mechanisms. *Our
reconstruction*: everything about meta-validation (the code queries test images), the solvers' settings, Gauss-Newton in
the Hessian's place, and meta-validation at its best temperature (plain cross-entropy also rewards examples that
merely change the network's confidence). The code's LiSSA has recursion depth 1, so that its
inverse is close to a scaled identity: that is `gradient_similarity` here.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lkd.balance.bilevel import measure_through_training
from lkd.balance.ekfac import measure_with_ekfac
from lkd.balance.problem import Problem
from lkd.config import InfluenceSettings
from lkd.data import Batch, ImageSet, seeded_generator
from lkd.errors import UserError
from lkd.teacher import TeacherFunction
from meta.linear_solvers import Vector, solve_conjugate_gradient, sum_neumann

DENSE_LIMIT = 2000  # parameters of the exact method
TOLERANCE = 1e-4  # relative residual at which conjugate gradients are done
RAISE = 10.0  # factor of the damping where the curvature is negative


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


class Inverse(NamedTuple):
    """(H + damping)⁻¹ v, and how it was got; see `Influence`."""

    vector: Vector
    damping: float
    least_curvature: float = math.nan
    residual: float = math.nan


def measure_influence(
    network: nn.Module,
    loss: nn.Module,
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


def skip_curvature(problem: Problem, start: Vector, settings: InfluenceSettings, seed: int) -> Inverse:
    """The identity in the place of the inverse."""
    return Inverse(start, math.nan)


def solve_dense(problem: Problem, start: Vector, settings: InfluenceSettings, seed: int) -> Inverse:
    """Invert the dense matrix, in float64."""
    if problem.size > DENSE_LIMIT:
        raise UserError(
            f"influence.method: exact inverts a dense matrix of at most {DENSE_LIMIT:,} parameters, not "
            f"{problem.size:,}; choose some with influence.parameters, or take conjugate_gradient"
        )
    batches = list(problem.load(problem.train, draw_examples(problem, settings, seed)))
    columns = []
    for unit in torch.eye(problem.size, dtype=start[0].dtype, device=start[0].device):
        product = problem.multiply_mean(split_like(unit, start), batches, settings.curvature)
        columns.append(join(product))
    matrix = torch.stack(columns).double()
    matrix = (matrix + matrix.T) / 2
    least = float(torch.linalg.eigvalsh(matrix)[0])
    damping = settings.damping
    while least + damping <= 0:
        damping = RAISE * max(damping, 1e-6)
    damped = matrix + damping * torch.eye(problem.size, dtype=torch.float64, device=matrix.device)
    solution = torch.linalg.solve(damped, join(start).double())
    return Inverse(split_like(solution.to(start[0].dtype), start), damping, least)


def solve_iteratively(problem: Problem, start: Vector, settings: InfluenceSettings, seed: int) -> Inverse:
    """Conjugate gradients; the damping is raised until no negative curvature is met."""
    batches = list(problem.load(problem.train, draw_examples(problem, settings, seed)))
    damping, least = settings.damping, math.inf
    while True:
        product = damp(lambda vector: problem.multiply_mean(vector, batches, settings.curvature), damping)
        found = solve_conjugate_gradient(product, start, settings.iterations, TOLERANCE)
        least = min(least, found.least_curvature - damping)
        if not found.least_curvature <= 0:
            return Inverse(found.vector, damping, least, found.residual)
        damping = RAISE * max(damping, 1e-6)


def sum_stochastically(problem: Problem, start: Vector, settings: InfluenceSettings, seed: int) -> Inverse:
    """LiSSA (Agarwal, Bullins, Hazan, 2017): a Neumann series, each term with the curvature of another batch."""
    batches = draw_batches(problem, settings, seed)
    product = damp(lambda vector: problem.multiply_mean(vector, [next(batches)], settings.curvature), settings.damping)
    return Inverse(sum_neumann(product, start, settings.iterations, settings.step_size), settings.damping)


SOLVERS: dict[str, Callable[[Problem, Vector, InfluenceSettings, int], Inverse]] = {
    "conjugate_gradient": solve_iteratively,
    "exact": solve_dense,
    "lissa": sum_stochastically,
    "gradient_similarity": skip_curvature,
}


def damp(product: Callable[[Vector], Vector], damping: float) -> Callable[[Vector], Vector]:
    """The product with H + damping."""
    return lambda vector: [new + damping * old for new, old in zip(product(vector), vector, strict=True)]


def draw_examples(problem: Problem, settings: InfluenceSettings, seed: int) -> Tensor:
    """Positions of the training images that the curvature is taken over."""
    order = torch.randperm(len(problem.train), generator=seeded_generator(seed, 11))
    return order[: settings.curvature_examples] if settings.curvature_examples else order


def draw_batches(problem: Problem, settings: InfluenceSettings, seed: int) -> Iterator[Batch]:
    """Shuffled batches of the training images, without end."""
    for epoch in itertools.count():
        order = torch.randperm(len(problem.train), generator=seeded_generator(seed, 12, epoch))
        yield from problem.load(problem.train, order)


def join(vector: Vector) -> Tensor:
    """A vector as one tensor, [P]."""
    return torch.cat([entry.flatten() for entry in vector])


def split_like(flat: Tensor, vector: Vector) -> Vector:
    """The inverse of `join`."""
    parts = flat.split([entry.numel() for entry in vector])
    return [part.view_as(entry) for part, entry in zip(parts, vector, strict=True)]
