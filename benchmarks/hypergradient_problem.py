"""The problem on which hypergradient engines are compared, and every engine's way to solve it."""

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from hypergradient_betty import run_betty
from torch import Tensor, nn
from torch.nn import functional as F

from meta import State, Tensors, call_module
from meta.estimators import adjoint, first_order, higher
from meta.optim import SGD

LEARNING_RATE, MOMENTUM, CLASSES = 0.05, 0.9, 10
Batch = tuple[Tensor, Tensor, Tensor]


class Block(nn.Module):
    """A residual block of a CIFAR ResNet."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width_in, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            convolution = nn.Conv2d(width_in, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(width))

    def forward(self, images: Tensor) -> Tensor:
        """Map [B, width_in, h, w] to [B, width, h / stride, w / stride]."""
        return F.relu(self.body(images) + self.shortcut(images))


def build_resnet(depth: int) -> nn.Sequential:
    """Build the CIFAR ResNet of the given depth (8, 20, …)."""
    blocks, width_in = [], 16
    for width in (16, 32, 64):
        for position in range((depth - 2) // 6):
            blocks.append(Block(width_in, width, 2 if position == 0 and width > 16 else 1))
            width_in = width
    stem = (nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))


class Problem:
    """K inner steps on a loss network (20→32→1, on student and teacher logits), the outer loss cross-entropy.

    Attributes:
        net: The student.
        hyper: The loss network's weights.
        inner_batches: K batches of random images.
        outer_batch: The outer loss's batch.
        arguments: The arguments of an estimator.
    """

    def __init__(
        self, depth: int = 8, steps: int = 5, seed: int = 0, distill: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.net = build_resnet(depth).to(dtype)
        self.distill = distill

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def draw_batch() -> Batch:
            labels = torch.randint(CLASSES, (32,), generator=generator)
            teacher = draw(32, CLASSES) + 3 * F.one_hot(labels, CLASSES)
            return draw(32, 3, 32, 32).to(dtype), labels, teacher.to(dtype)

        hyper = {"hidden": draw(2 * CLASSES, 32) * 0.2, "bias": draw(32) * 0.1, "out": draw(32) * 0.3}
        self.hyper = {name: tensor.to(dtype) for name, tensor in hyper.items()}
        self.inner_batches = [draw_batch() for _ in range(steps)]
        self.outer_batch = draw_batch()
        parameters = {name: parameter.detach() for name, parameter in self.net.named_parameters()}
        state = State(parameters, dict(self.net.named_buffers()), {})
        sgd = SGD(LEARNING_RATE, momentum=MOMENTUM)
        losses = (self.inner_loss, self.outer_loss)
        self.arguments: tuple[Any, ...] = (*losses, state, self.hyper, self.inner_batches, self.outer_batch, sgd)

    def loss(self, logits: Tensor, hyper: Tensors, batch: Batch) -> Tensor:
        """Return the learned loss; with `distill` on top of knowledge distillation."""
        _, labels, teacher = batch
        hidden = torch.tanh(torch.cat([logits, teacher], dim=1) @ hyper["hidden"] + hyper["bias"])
        learned = hidden @ hyper["out"]
        if not self.distill:
            return F.softplus(learned).mean()
        student, target = (F.log_softmax(source / 4, dim=1) for source in (logits, teacher))
        divergence = 16 * F.kl_div(student, target, log_target=True, reduction="batchmean")
        return learned.mean() + 0.9 * divergence + 0.1 * F.cross_entropy(logits, labels)

    def inner_loss(self, parameters: Tensors, buffers: Tensors, hyper: Tensors, batch: Batch) -> tuple[Tensor, Tensors]:
        """Return the learned loss of the student on a batch."""
        logits, buffers = call_module(self.net, parameters, buffers, batch[0])
        return self.loss(logits, hyper, batch), buffers

    def outer_loss(self, parameters: Tensors, buffers: Tensors, batch: Batch) -> Tensor:
        """Return the cross-entropy of the student on a batch."""
        return F.cross_entropy(call_module(self.net, parameters, buffers, batch[0])[0], batch[1])


def train_plainly(problem: Problem) -> None:
    """Take the K steps as anyone would, without a hypergradient: the floor."""
    optimizer = torch.optim.SGD(problem.net.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    for batch in problem.inner_batches:
        optimizer.zero_grad()
        problem.loss(problem.net(batch[0]), problem.hyper, batch).backward()
        optimizer.step()


def run_torchopt(problem: Problem) -> Tensors:
    """Differentiate through TorchOpt's MetaSGD."""
    import torchopt

    net = problem.net
    hyper = {name: tensor.clone().requires_grad_() for name, tensor in problem.hyper.items()}
    optimizer = torchopt.MetaSGD(net, lr=LEARNING_RATE, momentum=MOMENTUM)
    before = torchopt.extract_state_dict(net, by="deepcopy")
    for batch in problem.inner_batches:
        optimizer.step(problem.loss(net(batch[0]), hyper, batch))
    outer = F.cross_entropy(net(problem.outer_batch[0]), problem.outer_batch[1])
    grads = torch.autograd.grad(outer, list(hyper.values()))
    torchopt.recover_state_dict(net, before)
    return dict(zip(hyper, grads, strict=True))


def compile_problem(problem: Problem) -> float:
    """Compile the problem's inner loss; return the seconds that the first hypergradient, which compiles, takes."""
    inner_loss, *others = problem.arguments
    problem.arguments = (torch.compile(inner_loss), *others)
    start = time.perf_counter()
    first_order(*problem.arguments)
    return time.perf_counter() - start


ENGINES: dict[str, Callable[[Problem], Any]] = {
    "sgd": train_plainly,
    "higher": lambda problem: higher(*problem.arguments),
    "torchopt": run_torchopt,
    "adjoint": lambda problem: adjoint(*problem.arguments),
    "central": lambda problem: first_order(*problem.arguments, central=True),
    "central_bfloat16": lambda problem: first_order(*problem.arguments, central=True, storage="bfloat16"),
    "first_order": lambda problem: first_order(*problem.arguments),
}
if find_spec("betty"):
    ENGINES = {"betty": lambda problem: run_betty(problem, LEARNING_RATE, MOMENTUM), **ENGINES}
"""Every engine under its name, betty where it is installed; `sgd` computes no hypergradient."""
