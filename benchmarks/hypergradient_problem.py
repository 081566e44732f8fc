"""The problem on which hypergradient engines are compared, and every engine's way to solve it."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meta import Problem, State, Tensors, call_module
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


class Benchmark:
    """K inner steps on a loss network (20→32→1, on student and teacher logits), the outer loss cross-entropy.

    Attributes:
        net: The student.
        problem: What an estimator is given: the loss network's weights as outer parameters, batches of random images.
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

        weights = {"hidden": draw(2 * CLASSES, 32) * 0.2, "bias": draw(32) * 0.1, "out": draw(32) * 0.3}
        hyper = {name: tensor.to(dtype) for name, tensor in weights.items()}
        batches = [draw_batch() for _ in range(steps)]
        parameters = {name: parameter.detach() for name, parameter in self.net.named_parameters()}
        state = State(parameters, dict(self.net.named_buffers()), {})
        sgd = SGD(LEARNING_RATE, momentum=MOMENTUM)
        self.problem = Problem(self.inner_loss, self.outer_loss, state, hyper, batches, draw_batch(), sgd)

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


def train_plainly(benchmark: Benchmark) -> None:
    """Take the K steps as anyone would, without a hypergradient: the floor."""
    optimizer = torch.optim.SGD(benchmark.net.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    for batch in benchmark.problem.inner_batches:
        optimizer.zero_grad()
        benchmark.loss(benchmark.net(batch[0]), benchmark.problem.hyper, batch).backward()
        optimizer.step()


def run_torchopt(benchmark: Benchmark) -> Tensors:
    """Differentiate through TorchOpt's MetaSGD."""
    import torchopt

    net, problem = benchmark.net, benchmark.problem
    hyper = {name: tensor.clone().requires_grad_() for name, tensor in problem.hyper.items()}
    optimizer = torchopt.MetaSGD(net, lr=LEARNING_RATE, momentum=MOMENTUM)
    before = torchopt.extract_state_dict(net, by="deepcopy")
    for batch in problem.inner_batches:
        optimizer.step(benchmark.loss(net(batch[0]), hyper, batch))
    outer = F.cross_entropy(net(problem.outer_batch[0]), problem.outer_batch[1])
    grads = torch.autograd.grad(outer, list(hyper.values()))
    torchopt.recover_state_dict(net, before)
    return dict(zip(hyper, grads, strict=True))


def run_betty(benchmark: Benchmark) -> dict[str, Tensor]:
    """Take K inner steps and one outer step with betty's DARTS, which sees the last inner step only.

    Returns:
        The outer gradient that its optimiser is given.
    """
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem

    logging.disable(logging.INFO)
    found: dict[str, Tensor] = {}

    class Student(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            return benchmark.loss(self.module(batch[0]), dict(self.outer.module.named_parameters()), batch)

    class Outer(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            return F.cross_entropy(self.student(batch[0]), batch[1])

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            found.update({name: tensor.grad for name, tensor in self.module.named_parameters()})

    steps = len(benchmark.problem.inner_batches)
    weights = nn.ParameterDict({name: tensor.clone() for name, tensor in benchmark.problem.hyper.items()})
    outer = Outer(
        name="outer",
        config=Config(first_order=True),
        module=weights,
        optimizer=torch.optim.SGD(weights.parameters(), lr=0.0),
        train_data_loader=[benchmark.problem.outer_batch],
        device="cpu",
    )
    student = Student(
        name="student",
        config=Config(type="darts", unroll_steps=steps),
        module=benchmark.net,
        optimizer=torch.optim.SGD(benchmark.net.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM),
        train_data_loader=benchmark.problem.inner_batches,
        device="cpu",
    )
    dependencies = {"u2l": {outer: [student]}, "l2u": {student: [outer]}}
    Engine(config=EngineConfig(train_iters=steps), problems=[outer, student], dependencies=dependencies).run()
    return found


def compile_problem(benchmark: Benchmark) -> float:
    """Compile the inner loss; return the seconds that the first hypergradient, which compiles, takes."""
    benchmark.problem = replace(benchmark.problem, inner_loss=torch.compile(benchmark.problem.inner_loss))
    start = time.perf_counter()
    first_order(benchmark.problem)
    return time.perf_counter() - start


ENGINES: dict[str, Callable[[Benchmark], Any]] = {
    "sgd": train_plainly,
    "higher": lambda benchmark: higher(benchmark.problem),
    "torchopt": run_torchopt,
    "adjoint": lambda benchmark: adjoint(benchmark.problem),
    "central": lambda benchmark: first_order(benchmark.problem, central=True),
    "central_bfloat16": lambda benchmark: first_order(benchmark.problem, central=True, storage="bfloat16"),
    "first_order": lambda benchmark: first_order(benchmark.problem),
}
if find_spec("betty"):
    ENGINES = {"betty": run_betty, **ENGINES}
"""Every engine under its name, betty where it is installed; `sgd` computes no hypergradient."""
