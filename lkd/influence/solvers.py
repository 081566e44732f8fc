"""(H + damping)⁻¹ v at a network's weights, by several solvers, and the functions that they are made of."""

import copy
import importlib.util
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from lkd.config.training import InfluenceSettings
from lkd.core.errors import UserError
from lkd.core.outputs import Outputs
from lkd.core.random import draw_seed, seeded_generator
from lkd.data.images import Batch, ImageSet
from lkd.losses.functions import cross_entropies, find_best_temperature, widen
from lkd.losses.loss import DistillationLoss
from lkd.models.teacher import TeacherFunction
from meta.linear_solvers import Vector, solve_conjugate_gradient

# ----------------------------------------------------------------------------------------------------------------------
# The functions of a network's parameters that influence is made of: gradients, curvature, and their products.


LAYERS = (nn.Linear, nn.Conv2d)  # of EK-FAC
GRADIENT_NUMBERS = 1 << 26  # of the queries' gradients that are in memory at a time


def check_settings(network: nn.Module, settings: InfluenceSettings) -> None:
    """Check that influence can be measured so of this network.

    Raises:
        UserError: If no parameter begins as asked, the method takes fewer or others, or its package is not installed.
    """
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    chosen = {name: size for name, size in sizes.items() if name.startswith(settings.parameters)}
    if not chosen:
        raise UserError(
            f"influence.parameters: no parameter's name begins with {settings.parameters!r}; there are {[*sizes]}"
        )
    if settings.method != "ekfac":
        return
    if importlib.util.find_spec("kronfluence") is None:
        raise UserError(
            "influence.method: ekfac needs kronfluence, which is not installed: pip install kronfluence, "
            "or take conjugate_gradient"
        )
    if not find_layers(network, settings.parameters):
        raise UserError(f"influence.parameters: {settings.parameters!r} names no linear or convolutional layer")


def find_layers(network: nn.Module, prefix: str) -> list[str]:
    """The linear and convolutional layers whose weights' names begin so: those that EK-FAC is over."""
    named = network.named_modules()
    return [name for name, module in named if isinstance(module, LAYERS) and f"{name}.weight".startswith(prefix)]


class InfluenceProblem:
    """A network in eval mode, its training loss, and the objective on meta-validation, at the network's weights.

    No training example's gradient is ever made. With z_i the logits of example i and g_i the gradient of its loss
    there, ⟨s, ∇L_i⟩ = ⟨J_i s, g_i⟩, and J_i s is one forward-mode pass for a whole batch. g_i is taken from the loss of
    the batch, B times its row: exact for every loss that is a mean over examples.

    Args:
        network: Returns `Outputs`; put it into eval mode first.
        loss: What it is trained with: `loss(student, teacher, target, progress) -> terms`, over logits.
        teacher: From a batch to the teacher's outputs; None where the loss needs no teacher.
        train: The examples whose influence is asked for.
        meta_validation: The images whose objective is to fall.
        device: Where the network is.
        settings: Which objective, queries, gradient and parameters; images at a time.
        progress: How far the training is, in [0, 1].

    Raises:
        UserError: If a setting does not suit the network, the loss reads features, or meta-validation is empty.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: DistillationLoss,
        teacher: TeacherFunction | None,
        train: ImageSet,
        meta_validation: ImageSet,
        device: torch.device,
        settings: InfluenceSettings,
        progress: float = 1.0,
    ) -> None:
        if not len(meta_validation):
            raise UserError("influence: there are no meta-validation images; set data.meta_validation_size to some")
        if loss.teacher_stages or loss.needs_index:
            raise UserError("influence: the loss reads features or remembers images; take one over logits, such as kd")
        self.network, self.loss, self.teacher, self.progress = network, loss, teacher, progress
        self.train, self.meta_validation, self.device, self.settings = train, meta_validation, device, settings
        check_settings(network, settings)
        named = {name: tensor.detach() for name, tensor in network.named_parameters()}
        self.point = {name: tensor for name, tensor in named.items() if name.startswith(settings.parameters)}
        self.everything = named | dict(network.named_buffers())
        self.temperature = self.find_temperature()
        self.query_weight = torch.ones(int(meta_validation.index.max()) + 1, device=device)  # by the image's index
        if settings.queries == "unit":
            self.weigh_queries()

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
        """At which the objective is taken: the best on meta-validation, held constant; 1 for plain cross-entropy.

        Gradients of the calibrated cross-entropy may do so by the envelope theorem. The expected error takes 1 at
        least: below it the probabilities saturate, and images that the network is sure of would say nothing.
        """
        if self.settings.objective == "cross_entropy":
            return 1.0
        rows = [(self.compute_logits({}, batch.images), batch.target) for batch in self.load(self.meta_validation)]
        logits, target = (torch.cat(column) for column in zip(*rows, strict=True))
        found = find_best_temperature(logits, target)
        return max(found, 1.0) if self.settings.objective == "expected_error" else found

    def weigh_queries(self) -> None:
        """Give each meta-validation image the weight at which its gradient has norm 1; 0 where there is none."""

        def score_image(point: dict[str, Tensor], image: Tensor, target: Tensor) -> Tensor:
            return self.score_logits(self.compute_logits(point, image.unsqueeze(0)), target.unsqueeze(0)).sum()

        at_once = max(1, min(self.settings.batch_size, GRADIENT_NUMBERS // self.size))
        differentiate = vmap(grad(score_image), (None, 0, 0), chunk_size=at_once)
        for start in torch.arange(len(self.meta_validation)).split(at_once):
            for batch in self.load(self.meta_validation, start):
                found = differentiate(self.point, batch.images, batch.target)
                norm = sum(entry.flatten(1).square().sum(1) for entry in found.values()).sqrt()
                self.query_weight[batch.index] = torch.where(norm > 1e-12, 1 / norm, 0).to(self.query_weight)

    def score_logits(self, logits: Tensor, target: Tensor) -> Tensor:
        """The objective on each image, [B]."""
        if self.settings.objective == "expected_error":
            return 1 - (logits / self.temperature).softmax(1).gather(1, target.unsqueeze(1)).squeeze(1)
        return cross_entropies(logits / self.temperature, target)

    def score_validation(self, logits: Tensor, batch: Batch) -> Tensor:
        """The objective on meta-validation images, summed with the queries' weights."""
        return (self.query_weight[batch.index] * self.score_logits(logits, batch.target)).sum()

    def compute_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The training loss of a batch, a mean over its examples."""
        teacher = None
        if self.teacher:
            teacher = Outputs(widen(self.teacher(batch).logits), {})
        return torch.stack(list(self.loss(Outputs(logits, {}), teacher, batch.target, self.progress).values())).sum()

    def compute_taught(self, logits: Tensor, batch: Batch) -> Tensor:
        """What an example's gradient is taken of: the cross-entropy of its label, or the training loss; a mean."""
        if self.settings.gradient == "label":
            return cross_entropy(logits, batch.target)
        return self.compute_loss(logits, batch)

    def load(self, images: ImageSet, positions: Tensor | None = None) -> Iterator[Batch]:
        """The images at these positions, or all, a batch at a time."""
        chosen = torch.arange(len(images)) if positions is None else positions
        return images.batches(chosen.split(self.settings.batch_size), self.device)

    def differentiate_validation(self) -> Vector:
        """∇ of the mean objective on meta-validation."""
        total, count = [torch.zeros_like(tensor) for tensor in self.point.values()], 0
        for batch in self.load(self.meta_validation):
            leaves = {name: tensor.clone().requires_grad_() for name, tensor in self.point.items()}
            loss = self.score_validation(self.compute_logits(leaves, batch.images), batch)
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
            (gradient,) = torch.autograd.grad(self.compute_taught(leaf, batch), leaf)
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
# Influence by EK-FAC (George et al., 2018; Grosse et al., 2023), computed by kronfluence.


class Examples(Dataset[tuple[Tensor, ...]]):
    """An image set as kronfluence's loaders read it: the columns of `Batch`.

    Attributes:
        seen: The index of each image that was read, in order; damaged ones are left out.
    """

    def __init__(self, images: ImageSet, device: torch.device) -> None:
        self.images, self.device = images, device
        self.seen: list[int] = []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> tuple[Tensor, ...]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[tuple[Tensor, ...]]:
        batch = self.images.batch(torch.tensor(positions), self.device)
        self.seen += batch.index.tolist()
        return list(zip(*batch, strict=True))


def measure_with_ekfac(problem: InfluenceProblem, settings: InfluenceSettings, seed: int) -> tuple[Tensor, Tensor]:
    """Influence over the weights of linear and convolutional layers, those of normalisation held fixed.

    The Fisher's labels are drawn from the network. kronfluence's own damping: a tenth of a layer's mean eigenvalue.

    Returns:
        Index and influence of each example, [N] each.
    """
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import ScoreArguments
    from kronfluence.task import Task

    layers = find_layers(problem.network, settings.parameters)

    class Distillation(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits = model(batch[0]).logits
            if sample:
                drawn = torch.multinomial(logits.detach().softmax(1), 1).squeeze(1)
                return cross_entropy(logits, drawn, reduction="sum")
            return len(logits) * problem.compute_taught(logits, Batch(*batch))

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return problem.score_validation(model(batch[0]).logits, Batch(*batch))

        def get_influence_tracked_modules(self) -> list[str]:
            return layers

    task = Distillation()
    logging.getLogger("kronfluence").setLevel(logging.WARNING)
    own_gpu = [problem.device] if problem.device.type == "cuda" else []
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(own_gpu):
        torch.manual_seed(draw_seed(seed, 15))  # of the labels
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
        chosen = Examples(problem.train.select(draw_examples(problem, settings, seed)), problem.device)
        analyzer.fit_all_factors("ekfac", chosen, min(size, len(chosen)))
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
    return torch.tensor(train.seen), -scores["all_modules"][0].cpu() / len(queries)


# ----------------------------------------------------------------------------------------------------------------------
# (H + damping)⁻¹ v at a network's weights, by several solvers.

TOLERANCE = 1e-4  # relative residual at which conjugate gradients are done
RAISE = 10.0  # factor of the damping where the curvature is negative


class Inverse(NamedTuple):
    """(H + damping)⁻¹ v, and how it was got; see `lkd.influence.influence.Influence`."""

    vector: Vector
    damping: float
    least_curvature: float = math.nan
    residual: float = math.nan


def solve_iteratively(problem: InfluenceProblem, start: Vector, settings: InfluenceSettings, seed: int) -> Inverse:
    """Conjugate gradients; the damping is raised until no negative curvature is met."""
    batches = list(problem.load(problem.train, draw_examples(problem, settings, seed)))
    damping, least = settings.damping, math.inf
    while True:

        def multiply(vector: Vector, damping: float = damping) -> Vector:
            product = problem.multiply_mean(vector, batches, settings.curvature)
            return [new + damping * old for new, old in zip(product, vector, strict=True)]

        found = solve_conjugate_gradient(multiply, start, settings.iterations, TOLERANCE)
        if found.iterations and math.isnan(found.least_curvature):
            raise UserError("influence: the curvature is not a number: check the images, the network and the loss")
        least = min(least, found.least_curvature - damping)
        if found.least_curvature > 0 or not found.iterations:
            return Inverse(found.vector, damping, least, found.residual)
        damping = RAISE * max(damping, 1e-6)


def draw_examples(problem: InfluenceProblem, settings: InfluenceSettings, seed: int) -> Tensor:
    """Positions of the training images that the curvature is taken over."""
    order = torch.randperm(len(problem.train), generator=seeded_generator(seed, 11))
    return order[: settings.curvature_examples] if settings.curvature_examples else order
