"""The functions of a network's parameters that influence is made of: gradients, curvature, and their products."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.nn.functional import cross_entropy

from lkd.calibration import find_best_temperature
from lkd.data import Batch, ImageSet
from lkd.errors import UserError
from lkd.losses.functions import widen
from lkd.outputs import Outputs
from lkd.teacher import TeacherFunction
from meta.linear_solvers import Vector


class Problem:
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
        loss: nn.Module,
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
        if getattr(loss, "teacher_stages", ()) or getattr(loss, "needs_index", False):
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
