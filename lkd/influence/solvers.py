"""(H + damping)⁻¹ v at a network's weights, by several solvers, and the functions that they are made of."""

import copy
import itertools
import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from lkd.config.training import InfluenceSettings
from lkd.core.errors import UserError, explained
from lkd.core.outputs import Outputs
from lkd.core.random import seeded_generator
from lkd.data.images import Batch, ImageSet
from lkd.losses.functions import find_best_temperature, widen
from lkd.losses.loss import DistillationLoss
from lkd.models.teacher import TeacherFunction
from meta import Problem, State, Tensors
from meta.estimators import adjoint
from meta.linear_solvers import Vector, solve_conjugate_gradient, sum_neumann
from meta.optim import SGD

# ----------------------------------------------------------------------------------------------------------------------
# The functions of a network's parameters that influence is made of: gradients, curvature, and their products.


class InfluenceProblem:
    """A network in eval mode, its training loss, and the cross-entropy on meta-validation, at the network's weights.

    No per-example gradient is ever made. With z_i the logits of example i and g_i the gradient of its loss there,
    ⟨s, ∇L_i⟩ = ⟨J_i s, g_i⟩, and J_i s is one forward-mode pass for a whole batch. g_i is taken from the loss of the
    batch, B times its row: exact for every loss that is a mean over examples.

    Args:
        network: Returns `Outputs`; put it into eval mode first.
        loss: What it is trained with: `loss(student, teacher, target, progress) -> terms`, over logits.
        teacher: From a batch to the teacher's outputs; None where the loss needs no teacher.
        train: The examples whose influence is asked for.
        meta_validation: The images whose loss is to fall.
        device: Where the network is.
        progress: How far the training is, in [0, 1].
        parameters: Only those whose names begin so; "" is all of them.
        calibrated: Whether meta-validation is scored at its best temperature.
        batch_size: Images at a time.

    Raises:
        UserError: If no parameter begins so, the loss reads features, or meta-validation is empty.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: DistillationLoss,
        teacher: TeacherFunction | None,
        train: ImageSet,
        meta_validation: ImageSet,
        device: torch.device,
        progress: float = 1.0,
        parameters: str = "",
        calibrated: bool = False,
        batch_size: int = 500,
    ) -> None:
        if not len(meta_validation):
            raise UserError("influence: there are no meta-validation images; set data.meta_validation_size to some")
        if loss.teacher_stages or loss.needs_index:
            raise UserError("influence: the loss reads features or remembers images; take one over logits, such as kd")
        self.network, self.loss, self.teacher, self.progress = network, loss, teacher, progress
        self.train, self.meta_validation, self.device, self.batch_size = train, meta_validation, device, batch_size
        named = {name: tensor.detach() for name, tensor in network.named_parameters()}
        self.point = {name: tensor for name, tensor in named.items() if name.startswith(parameters)}
        if not self.point:
            raise UserError(
                f"influence.parameters: no parameter's name begins with {parameters!r}; there are {[*named]}"
            )
        self.everything = named | dict(network.named_buffers())
        self.temperature = self.find_temperature() if calibrated else 1.0

    @property
    def size(self) -> int:
        """How many numbers the parameters are."""
        return sum(tensor.numel() for tensor in self.point.values())

    def compute_logits(self, point: dict[str, Tensor], images: Tensor) -> Tensor:
        """Logits [B, C] at other parameters."""
        outputs: Outputs = functional_call(self.network, self.everything | point, (images,))
        return widen(outputs.logits)

    @torch.no_grad()
    def find_temperature(self) -> float:
        """The best temperature on meta-validation; by the envelope theorem gradients may take it for a constant."""
        rows = [(self.compute_logits({}, batch.images), batch.target) for batch in self.load(self.meta_validation)]
        logits, target = (torch.cat(column) for column in zip(*rows, strict=True))
        return find_best_temperature(logits, target)

    def score_validation(self, logits: Tensor, target: Tensor) -> Tensor:
        """The cross-entropy of meta-validation images, summed."""
        return cross_entropy(logits / self.temperature, target, reduction="sum")

    def compute_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The training loss of a batch, a mean over its examples."""
        teacher = None
        if self.teacher:
            teacher = Outputs(widen(self.teacher(batch).logits), {})
        return torch.stack(list(self.loss(Outputs(logits, {}), teacher, batch.target, self.progress).values())).sum()

    def load(self, images: ImageSet, positions: Tensor | None = None) -> Iterator[Batch]:
        """The images at these positions, or all, a batch at a time."""
        chosen = torch.arange(len(images)) if positions is None else positions
        return images.batches(chosen.split(self.batch_size), self.device)

    def differentiate_validation(self) -> Vector:
        """∇ of the mean cross-entropy on meta-validation."""
        total, count = [torch.zeros_like(tensor) for tensor in self.point.values()], 0
        for batch in self.load(self.meta_validation):
            leaves = {name: tensor.clone().requires_grad_() for name, tensor in self.point.items()}
            loss = self.score_validation(self.compute_logits(leaves, batch.images), batch.target)
            found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
            total = [old + new for old, new in zip(total, found, strict=True)]
            count += len(batch.target)
        return [entry / count for entry in total]

    def project_gradients(self, direction: Vector) -> tuple[Tensor, Tensor]:
        """⟨direction, ∇L_i⟩ of every training example.

        Returns:
            Each example's index, [N], and the products, [N]. Images that cannot be decoded are left out.
        """
        rows = []
        for batch in self.load(self.train):
            logits, change = self.push_forward(direction, batch)
            leaf = logits.requires_grad_()
            (gradient,) = torch.autograd.grad(self.compute_loss(leaf, batch), leaf)
            rows.append((batch.index, len(leaf) * (gradient * change).sum(1)))
        index, products = (torch.cat(column) for column in zip(*rows, strict=True))
        return index.cpu(), products.cpu()

    def push_forward(self, vector: Vector, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits of a batch, and how they change in a direction, [B, C] each."""
        tangents = dict(zip(self.point, vector, strict=True))
        with torch.no_grad():
            pushed: Any = jvp(lambda point: self.compute_logits(point, batch.images), (self.point,), (tangents,))
        logits, change = pushed
        return logits.detach(), change.detach()

    def multiply_gauss_newton(self, vector: Vector, batch: Batch) -> Vector:
        """Jᵀ (∂²L/∂z²) J · vector on a batch: the Hessian without the network's own curvature.

        It is never negative for a loss that is convex in the logits.
        """
        logits, change = self.push_forward(vector, batch)
        leaf = logits.requires_grad_()
        (gradient,) = torch.autograd.grad(self.compute_loss(leaf, batch), leaf, create_graph=True)
        (bent,) = torch.autograd.grad(gradient, leaf, change)
        pulled: Any = vjp(lambda point: self.compute_logits(point, batch.images), self.point)
        return [tensor.detach() for tensor in pulled[1](bent)[0].values()]

    def multiply_hessian(self, vector: Vector, batch: Batch) -> Vector:
        """The Hessian of a batch's training loss · vector."""
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in self.point.items()}
        loss = self.compute_loss(self.compute_logits(leaves, batch.images), batch)
        inputs = list(leaves.values())
        gradient = torch.autograd.grad(loss, inputs, create_graph=True, materialize_grads=True)
        return list(torch.autograd.grad(gradient, inputs, vector, materialize_grads=True))

    def multiply_mean(self, vector: Vector, batches: Sequence[Batch], curvature: str) -> Vector:
        """The product with the mean curvature over batches, `gauss_newton` or `hessian`."""
        multiply = self.multiply_hessian if curvature == "hessian" else self.multiply_gauss_newton
        count = sum(len(batch.target) for batch in batches)
        total = [torch.zeros_like(entry) for entry in vector]
        for batch in batches:
            share = len(batch.target) / count
            total = [old + share * new for old, new in zip(total, multiply(vector, batch), strict=True)]
        return total


# ----------------------------------------------------------------------------------------------------------------------
# Influence by the bi-level engine: example weights are outer parameters, and training steps are differentiated.


def measure_through_training(
    problem: InfluenceProblem, settings: InfluenceSettings, seed: int
) -> tuple[Tensor, Tensor]:
    """N · ∂(meta-validation loss)/∂w_i at w = 1, after `iterations` steps of SGD on weighted batches.

    At a stationary point, and with steps over all examples, this tends to I_i without damping as the steps increase;
    elsewhere it is the influence of these very steps. Examples in no batch have none.

    Returns:
        Index and influence of each example, [N] each.
    """
    rows = torch.full((int(problem.train.index.max()) + 1,), -1, device=problem.device)
    rows[problem.train.index.to(problem.device)] = torch.arange(len(problem.train), device=problem.device)

    def inner_loss(point: Tensors, buffers: Tensors, hyper: Tensors, batch: Batch) -> tuple[Tensor, Tensors]:
        logits = problem.compute_logits(point, batch.images)
        weight = hyper["weight"][rows[batch.index]].unsqueeze(1)
        # Value, gradient and curvature are the plain loss's at w = 1, and ∂²/∂w_i∂θ is example i's gradient.
        return problem.compute_loss(weight * logits + (1 - weight) * logits.detach(), batch), buffers

    def outer_loss(point: Tensors, buffers: Tensors, batch: None) -> Tensor:
        losses = [
            problem.score_validation(problem.compute_logits(point, part.images), part.target)
            for part in problem.load(problem.meta_validation)
        ]
        return torch.stack(losses).sum() / len(problem.meta_validation)

    size = min(settings.batch_size, len(problem.train))
    per_epoch = len(problem.train) // size
    batches = []
    for step in range(settings.iterations):
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(problem.train), generator=seeded_generator(seed, 12, epoch))
        batches.append(problem.train.batch(order[place * size : (place + 1) * size], problem.device))
    weights = {"weight": torch.ones(len(problem.train), device=problem.device, requires_grad=True)}
    state = State(dict(problem.point), {}, {})
    with explained("influence"):
        found = adjoint(Problem(inner_loss, outer_loss, state, weights, batches, None, SGD(settings.step_size)))
    return problem.train.index, len(problem.train) * found.grads["weight"].cpu()


# ----------------------------------------------------------------------------------------------------------------------
# Influence by EK-FAC (George et al., 2018; Grosse et al., 2023), computed by kronfluence.

LAYERS = (nn.Linear, nn.Conv2d)


class Examples(Dataset[tuple[Tensor, ...]]):
    """An image set as kronfluence's loaders read it: the columns of `Batch`."""

    def __init__(self, images: ImageSet, device: torch.device) -> None:
        self.images, self.device = images, device

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> tuple[Tensor, ...]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[tuple[Tensor, ...]]:
        return list(zip(*self.images.batch(torch.tensor(positions), self.device), strict=True))


def measure_with_ekfac(problem: InfluenceProblem, settings: InfluenceSettings) -> tuple[Tensor, Tensor]:
    """Influence over the weights of linear and convolutional layers, those of normalisation held fixed.

    The Fisher's labels are drawn from the network. kronfluence's own damping: a tenth of a layer's mean eigenvalue.

    Returns:
        Index and influence of each example, [N] each.

    Raises:
        UserError: If kronfluence is not installed, or no such layer is chosen.
    """
    try:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
        from kronfluence.task import Task
    except ModuleNotFoundError as error:
        raise UserError(
            f"influence.method: ekfac needs a package that is not installed ({error.name}); "
            'pip install "lkd[influence]", or take conjugate_gradient'
        ) from error
    layers = [
        name
        for name, module in problem.network.named_modules()
        if isinstance(module, LAYERS) and f"{name}.weight".startswith(settings.parameters)
    ]
    if not layers:
        raise UserError(f"influence.parameters: {settings.parameters!r} names no linear or convolutional layer")

    class Distillation(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits = model(batch[0]).logits
            if sample:
                drawn = torch.multinomial(logits.detach().softmax(1), 1).squeeze(1)
                return cross_entropy(logits, drawn, reduction="sum")
            return len(logits) * problem.compute_loss(logits, Batch(*batch))

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return problem.score_validation(model(batch[0]).logits, batch[1])

        def get_influence_tracked_modules(self) -> list[str]:
            return layers

    task = Distillation()
    logging.getLogger("kronfluence").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        model = prepare_model(copy.deepcopy(problem.network), task)
        analyzer = Analyzer(
            "influence",
            model,
            task,
            problem.device.type == "cpu",
            logging.WARNING,
            disable_tqdm=True,
            output_dir=folder,
        )
        train, queries = (Examples(images, problem.device) for images in (problem.train, problem.meta_validation))
        size = min(settings.batch_size, len(train))
        most = settings.curvature_examples or None
        analyzer.fit_all_factors(
            "ekfac", train, size, factor_args=FactorArguments(covariance_max_examples=most, lambda_max_examples=most)
        )
        analyzer.compute_pairwise_scores(
            "scores",
            "ekfac",
            queries,
            train,
            per_device_query_batch_size=min(settings.batch_size, len(queries)),
            per_device_train_batch_size=size,
            score_args=ScoreArguments(damping_factor=None, aggregate_query_gradients=True),
        )
        scores = analyzer.load_pairwise_scores("scores")
    return problem.train.index, -scores["all_modules"][0].cpu() / len(queries)


# ----------------------------------------------------------------------------------------------------------------------
# (H + damping)⁻¹ v at a network's weights, by several solvers.

DENSE_LIMIT = 2000  # parameters of the exact method
TOLERANCE = 1e-4  # relative residual at which conjugate gradients are done
RAISE = 10.0  # factor of the damping where the curvature is negative


class Inverse(NamedTuple):
    """(H + damping)⁻¹ v, and how it was got; see `lkd.influence.influence.Influence`."""

    vector: Vector
    damping: float
    least_curvature: float = math.nan
    residual: float = math.nan


def skip_curvature(problem: InfluenceProblem, start: Vector, settings: InfluenceSettings, seed: int) -> Inverse:
    """The identity in the place of the inverse."""
    return Inverse(start, math.nan)


def solve_dense(problem: InfluenceProblem, start: Vector, settings: InfluenceSettings, seed: int) -> Inverse:
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


def solve_iteratively(problem: InfluenceProblem, start: Vector, settings: InfluenceSettings, seed: int) -> Inverse:
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


def sum_stochastically(problem: InfluenceProblem, start: Vector, settings: InfluenceSettings, seed: int) -> Inverse:
    """LiSSA (Agarwal, Bullins, Hazan, 2017): a Neumann series, each term with the curvature of another batch."""
    batches = draw_batches(problem, settings, seed)
    product = damp(lambda vector: problem.multiply_mean(vector, [next(batches)], settings.curvature), settings.damping)
    return Inverse(sum_neumann(product, start, settings.iterations, settings.step_size), settings.damping)


SOLVERS: dict[str, Callable[[InfluenceProblem, Vector, InfluenceSettings, int], Inverse]] = {
    "conjugate_gradient": solve_iteratively,
    "exact": solve_dense,
    "lissa": sum_stochastically,
    "gradient_similarity": skip_curvature,
}


def damp(product: Callable[[Vector], Vector], damping: float) -> Callable[[Vector], Vector]:
    """The product with H + damping."""
    return lambda vector: [new + damping * old for new, old in zip(product(vector), vector, strict=True)]


def draw_examples(problem: InfluenceProblem, settings: InfluenceSettings, seed: int) -> Tensor:
    """Positions of the training images that the curvature is taken over."""
    order = torch.randperm(len(problem.train), generator=seeded_generator(seed, 11))
    return order[: settings.curvature_examples] if settings.curvature_examples else order


def draw_batches(problem: InfluenceProblem, settings: InfluenceSettings, seed: int) -> Iterator[Batch]:
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
