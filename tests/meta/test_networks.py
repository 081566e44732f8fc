"""`first_order` works on any network; exact estimators work or say what is in the way."""

from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
from bilevel_problems import MOMENTUM_SGD, relative_distance
from torch import nn
from torch.nn import functional as F

from meta import Problem, State, audit, call_module, verify
from meta.estimators import adjoint, first_order, higher, unrolled
from meta.tensors import cosine_similarity

CLASSES = 3


def network_problem(
    net: nn.Module, size: int = 16, steps: int = 3, autocast=None, dtype=torch.float64, optimizer=MOMENTUM_SGD
) -> Problem:
    """A problem whose loss balances cross-entropy against agreement with a fixed target."""
    net = net.to(dtype)
    generator = torch.Generator().manual_seed(0)

    def inner_loss(parameters, buffers, hyper, batch):
        images, labels = batch
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            logits, buffers = call_module(net, parameters, buffers, images)
        logits = logits.to(hyper["weights"])
        losses = F.cross_entropy(logits * hyper["scale"].exp(), labels, reduction="none")
        return (hyper["weights"].exp() * losses).mean(), buffers

    def outer_loss(parameters, buffers, batch):
        images, labels = batch
        return F.cross_entropy(call_module(net, parameters, buffers, images)[0], labels)

    def draw_batch():
        images = torch.randn(4, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)
        return images, torch.randint(CLASSES, (4,), generator=generator)

    state = State({name: p.detach() for name, p in net.named_parameters()}, dict(net.named_buffers()), {})
    hyper = {"weights": torch.zeros(4, dtype=dtype), "scale": torch.tensor(0.2, dtype=dtype)}
    batches = [draw_batch() for _ in range(steps)]
    return Problem(inner_loss, outer_loss, state, hyper, batches, draw_batch(), optimizer)


class Tied(nn.Module):
    """Two layers that share their weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(768, 768), nn.Linear(768, 768), nn.Linear(768, CLASSES)
        self.second.weight = self.first.weight

    def forward(self, images):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(images.flatten(1))))))


def convolutions(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), *middle, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, CLASSES))


TWICE = {
    "GroupNorm and SiLU": lambda: convolutions(nn.GroupNorm(2, 8), nn.SiLU()),
    "weight norm": lambda: convolutions(nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)), nn.Tanh()),
    "in-place ReLU": lambda: convolutions(nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
    "channels last": lambda: convolutions(nn.BatchNorm2d(8), nn.Softplus()).to(memory_format=torch.channels_last),
    "tied": Tied,
    "ConvNeXt": lambda: timm.models.ConvNeXt(num_classes=CLASSES, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), patch_size=2),
}
ONCE = {
    "vision transformer with fused attention": lambda: timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=CLASSES
    ),
    "MobileNetV3": lambda: timm.create_model("mobilenetv3_small_050", num_classes=CLASSES).eval(),
}


def build(case: str) -> nn.Module:
    torch.manual_seed(0)
    return (TWICE | ONCE)[case]()


@pytest.mark.parametrize("case", TWICE)
def test_first_order_agrees_with_the_exact_walk(case):
    problem = network_problem(build(case), size=32 if case == "ConvNeXt" else 16)
    result, exact = first_order(problem, radius=1e-6, central=True), adjoint(problem)
    assert relative_distance(result.grads, exact.grads) < 1e-4
    assert relative_distance(unrolled(problem).grads, exact.grads) < 1e-8


@pytest.mark.parametrize("case", ONCE)
def test_first_order_needs_no_second_derivative(case):
    problem = network_problem(build(case), size=32 if case == "MobileNetV3" else 16, steps=2)
    assert verify(partial(first_order, radius=1e-6, central=True), problem, directions=2).relative_error < 1e-3


@pytest.mark.parametrize("case", ONCE)
@pytest.mark.parametrize("estimator", [higher, unrolled, adjoint])
def test_exact_estimators_say_which_operation_is_in_the_way(case, estimator):
    problem = network_problem(build(case), size=32 if case == "MobileNetV3" else 16)
    operation = "hardsigmoid_backward" if case == "MobileNetV3" else "scaled_dot_product"
    with pytest.raises(ValueError, match=f"cannot be differentiated twice.*{operation}.*first_order"):
        estimator(problem)


def test_a_compiled_loss_is_differentiated_once():
    problem = network_problem(build("GroupNorm and SiLU"))
    compiled = replace(problem, inner_loss=torch.compile(problem.inner_loss, backend="aot_eager"))
    assert relative_distance(first_order(compiled).grads, first_order(problem).grads) < 1e-6
    with pytest.raises(ValueError, match="compiled loss: pass it uncompiled"):
        adjoint(compiled)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_direction_by_the_large_perturbation_that_the_audit_chooses(precision):
    net = build("in-place ReLU")
    exact = adjoint(network_problem(net, dtype=torch.float32))
    problem = network_problem(net, dtype=torch.float32, autocast=precision)
    found = audit(problem, radii=(1e-5, 1e-4, 0.03))
    assert found.radius == 0.03
    assert found.cosine > 0.97
    cosines = {
        radius: cosine_similarity(first_order(problem, radius=radius, central=True).grads, exact.grads)
        for radius in (1e-4, 0.03)
    }
    assert cosines[0.03] > 0.99
    assert cosines[1e-4] < cosines[0.03]  # rounding over a small perturbation: why the radius is larger here


def test_frozen_parameters_stay_out_of_the_state():
    problem = network_problem(build("GroupNorm and SiLU"))
    trained = {name: tensor for name, tensor in problem.state.parameters.items() if not name.startswith("0.")}
    frozen = replace(problem, state=problem.state._replace(parameters=trained))
    result = adjoint(frozen)
    assert result.final_state.parameters.keys() == trained.keys()
    assert verify(adjoint, frozen).relative_error < 1e-5
