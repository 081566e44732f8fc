from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

from meta import State
from meta.optim import SGD, Adam, AdamW, Averaged, Clipped, Grouped, build_optimizer

TORCH = {SGD: torch.optim.SGD, Adam: torch.optim.Adam, AdamW: torch.optim.AdamW}
CASES: list[tuple[type, dict[str, Any]]] = [
    (SGD, {}),
    (SGD, {"weight_decay": 0.1}),
    (SGD, {"momentum": 0.9}),
    (SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    (SGD, {"momentum": 0.8, "nesterov": True, "weight_decay": 0.01}),
    (Adam, {}),
    (Adam, {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}),
    (AdamW, {}),
    (AdamW, {"betas": (0.8, 0.95), "weight_decay": 0.1}),
]


def draw_start(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": (4, 3), "bias": (4,), "untouched": (2,)}
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def draw_gradients(steps: int, dtype: torch.dtype = torch.float32) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"weight": (4, 3), "bias": (4,)}
    return [
        {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}
        for _ in range(steps)
    ]


def run_ours(optimizer, steps: int):
    state = State(draw_start(), {}, {})
    for step, gradients in enumerate(draw_gradients(steps)):
        state = optimizer.update(state, gradients, step)
    return state.parameters, state.optimizer


def run_torch(optimizer: torch.optim.Optimizer, parameters, steps: int, schedule=None, max_norm: float | None = None):
    for step, gradients in enumerate(draw_gradients(steps)):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step) if schedule else group["lr"]
        for name, gradient in gradients.items():
            parameters[name].grad = gradient.clone()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters.values(), max_norm)
        optimizer.step()


def as_torch_parameters() -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(tensor) for name, tensor in draw_start().items()}


def assert_same(ours, theirs):
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name].detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "settings"), CASES)
@pytest.mark.parametrize("scheduled", [False, True])
def test_updates_equal_torch_over_50_steps(kind, settings, scheduled):
    def rate(step: int) -> float:
        return 0.1 * (1 - step / 50) if scheduled else 0.1

    theirs = as_torch_parameters()
    reference = TORCH[kind](theirs.values(), lr=0.1, **settings)
    run_torch(reference, theirs, 50, rate)
    ours, slots = run_ours(kind(rate, **settings), 50)
    assert_same(ours, theirs)
    for slot, tensors in slots.items():
        assert_same(tensors, {name: reference.state[theirs[name]][slot] for name in ("weight", "bias")})
    if kind is SGD:
        assert bool(slots) == bool(settings.get("momentum"))


def test_groups_equal_torch_parameter_groups():
    theirs = as_torch_parameters()
    groups = [
        {"params": [theirs["weight"]], "weight_decay": 0.1, "lr": 0.1},
        {"params": [theirs["bias"], theirs["untouched"]], "weight_decay": 0.0, "lr": 0.2},
    ]
    run_torch(torch.optim.SGD(groups, lr=0.1, momentum=0.9), theirs, 50)
    decayed, plain = SGD(0.1, momentum=0.9, weight_decay=0.1), SGD(0.2, momentum=0.9)
    ours, _ = run_ours(Grouped(lambda name: decayed if name == "weight" else plain), 50)
    assert list(ours) == list(theirs)
    assert_same(ours, theirs)


@pytest.mark.parametrize("max_norm", [1.0, 1e3])
def test_clipping_equals_torch(max_norm):
    theirs = as_torch_parameters()
    run_torch(torch.optim.SGD(theirs.values(), lr=0.1, momentum=0.9), theirs, 50, max_norm=max_norm)
    ours, _ = run_ours(Clipped(SGD(0.1, momentum=0.9), max_norm), 50)
    assert_same(ours, theirs)


def test_average_equals_torch_averaged_model():
    theirs = torch.nn.ParameterDict(draw_start())
    averaged = torch.optim.swa_utils.AveragedModel(theirs, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(theirs)  # the first call copies
    optimizer = torch.optim.SGD(theirs.values(), lr=0.1)
    for gradients in draw_gradients(50):
        for name, gradient in gradients.items():
            theirs[name].grad = gradient.clone()
        optimizer.step()
        averaged.update_parameters(theirs)
    _, slots = run_ours(Averaged(SGD(0.1), 0.9), 50)
    assert_same(slots["average"], averaged.module)


ADJOINT_CASES = {
    "sgd": SGD(0.1, weight_decay=0.2),
    "momentum": SGD(0.1, momentum=0.9, dampening=0.3, weight_decay=0.2),
    "nesterov": SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.2),
    "adam": Adam(0.1, weight_decay=0.2),
    "adamw": AdamW(0.1, betas=(0.8, 0.9), weight_decay=0.2),
    "clipped": Clipped(SGD(0.1, momentum=0.9), 1.0),
    "not clipped": Clipped(Adam(0.1), 1e3),
    "averaged": Averaged(SGD(0.1, momentum=0.9), 0.7),
    "clipped averaged AdamW": Clipped(Averaged(AdamW(0.1), 0.7), 1.0),
    "grouped": Grouped({"weight": SGD(0.1, momentum=0.9), "bias": AdamW(0.1), "untouched": SGD(0.3)}.__getitem__),
    "learned sgd": lambda hyper: SGD(
        hyper["rate"], momentum=hyper["momentum"], dampening=0.1, weight_decay=hyper["decay"]
    ),
    "learned nesterov": lambda hyper: SGD(
        lambda step: hyper["rate"] / (1 + step), momentum=hyper["momentum"], nesterov=True, weight_decay=hyper["decay"]
    ),
    "learned adam": lambda hyper: Adam(hyper["rate"] + hyper["momentum"], weight_decay=hyper["decay"]),
    "learned adamw": lambda hyper: AdamW(hyper["rate"] + hyper["momentum"], weight_decay=hyper["decay"]),
}
EXACT = {"rtol": 1e-10, "atol": 1e-12}
SETTINGS = {"rate": 0.1, "momentum": 0.7, "decay": 0.2}


@pytest.mark.parametrize("warm_steps", [0, 3])
@pytest.mark.parametrize("case", ADJOINT_CASES)
def test_adjoints_equal_autograd(case, warm_steps: int):
    """Compare the hand-derived adjoint of one update with autograd's."""
    hyper = {name: torch.tensor(value, dtype=torch.float64, requires_grad=True) for name, value in SETTINGS.items()}
    recipe = ADJOINT_CASES[case]
    *earlier, gradients = draw_gradients(warm_steps + 1, torch.float64)
    before = State(draw_start(torch.float64), {}, {})
    for step, earlier_gradients in enumerate(earlier):
        before = build_optimizer(recipe, hyper).update(before, earlier_gradients, step).detach()
    counters = {"step": before.optimizer["step"]} if "step" in before.optimizer else {}
    slots = {slot: tensors for slot, tensors in before.optimizer.items() if slot != "step"}

    def update(parameters, slots, gradients, hyper):
        state = State(parameters, {}, slots | counters)
        after = build_optimizer(recipe, hyper).update(state, gradients, warm_steps)
        return after.parameters, {slot: tensors for slot, tensors in after.optimizer.items() if slot != "step"}

    (parameters, after), pull_back = torch.func.vjp(update, before.parameters, slots, gradients, hyper)
    cotangents = tree_map(torch.randn_like, (parameters, after))
    wanted = pull_back(cotangents)
    cotangent_state = State(cotangents[0], {}, cotangents[1])
    optimizer = build_optimizer(recipe, hyper)
    with torch.no_grad():
        found = optimizer.adjoint(before, gradients, warm_steps, cotangent_state)
    for got, expected in zip((found.parameters, found.optimizer, found.gradients), wanted[:3], strict=True):
        compare_trees(got, expected)
    through_settings = sum((setting * cotangent).sum() for setting, cotangent in found.settings)
    settings = list(hyper.values())
    got = torch.autograd.grad(through_settings, settings, allow_unused=True) if found.settings else [None] * len(hyper)
    for gradient, expected in zip(got, wanted[3].values(), strict=True):
        torch.testing.assert_close(torch.zeros_like(expected) if gradient is None else gradient, expected, **EXACT)


def compare_trees(got, expected):
    """What is not there is zero."""
    for key, value in expected.items():
        if isinstance(value, dict):
            compare_trees(got.get(key, {}), value)
        else:
            torch.testing.assert_close(got.get(key, torch.zeros(())).expand_as(value).double(), value, **EXACT)


def test_adam_with_a_vanishing_gradient_has_a_finite_derivative():
    gradient = torch.zeros(3, requires_grad=True)
    before = cotangents = State({"a": torch.ones(3)}, {}, {})
    updated = Adam(0.1).update(before, {"a": gradient}, 0)
    (derivative,) = torch.autograd.grad(updated.parameters["a"].sum(), gradient)
    assert torch.isfinite(derivative).all()
    by_hand = Adam(0.1).adjoint(before, {"a": torch.zeros(3)}, 0, cotangents).gradients["a"]
    torch.testing.assert_close(by_hand, derivative)


def test_nesterov_needs_momentum_without_dampening():
    with pytest.raises(ValueError, match="Nesterov"):
        SGD(0.1, nesterov=True)
    with pytest.raises(ValueError, match="Nesterov"):
        SGD(0.1, momentum=0.9, dampening=0.1, nesterov=True)


def test_an_average_of_an_average_is_refused():
    with pytest.raises(ValueError, match="averages already"):
        Averaged(Averaged(SGD(0.1), 0.9), 0.9)
