"""Small bi-level problems in float64 that the tests share."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meta import Problem, State, Tensors, call_module
from meta.optim import SGD, OptimizerOrRecipe

MOMENTUM_SGD = SGD(0.05, momentum=0.9, weight_decay=1e-3)


def learned_loss_problem(
    steps: int = 3, optimizer: OptimizerOrRecipe = MOMENTUM_SGD, carry_momentum: bool = True, seed: int = 0
) -> Problem:
    """A smooth convolutional net with BatchNorm in train mode, trained on a loss network over its logits."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Softplus(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16, 3),
        ).double()
    hyper = {"weight": draw(6, 5) * 0.5, "bias": draw(5) * 0.5, "out": draw(5) * 0.5, "constant": draw()}

    def inner_loss(parameters: Tensors, buffers: Tensors, hyper: Tensors, batch: Any) -> tuple[Tensor, Tensors]:
        images, targets = batch
        logits, buffers = call_module(net, parameters, buffers, images)
        pairs = torch.cat([logits, F.one_hot(targets, 3).to(logits)], dim=1)
        hidden = torch.tanh(pairs @ hyper["weight"] + hyper["bias"])
        return F.softplus(hidden @ hyper["out"] + hyper["constant"]).mean(), buffers

    def outer_loss(parameters: Tensors, buffers: Tensors, batch: Any) -> Tensor:
        images, targets = batch
        return F.cross_entropy(call_module(net, parameters, buffers, images)[0], targets)

    def draw_batch() -> tuple[Tensor, Tensor]:
        return draw(6, 2, 4, 4), torch.randint(3, (6,), generator=generator)

    parameters = {name: parameter.detach() for name, parameter in net.named_parameters()}
    slots = {"momentum_buffer": {name: 0.1 * draw(*tensor.shape) for name, tensor in parameters.items()}}
    state = State(parameters, dict(net.named_buffers()), slots if carry_momentum else {})
    return Problem(inner_loss, outer_loss, state, hyper, [draw_batch() for _ in range(steps)], draw_batch(), optimizer)


def relative_distance(first: Tensors, second: Tensors) -> float:
    """‖first − second‖ / ‖second‖, over all tensors."""
    flat_first, flat_second = (
        torch.cat([tensors[name].flatten() for name in sorted(second)]) for tensors in (first, second)
    )
    return ((flat_first - flat_second).norm() / flat_second.norm()).item()
