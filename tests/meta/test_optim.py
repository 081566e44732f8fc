from typing import Any

import pytest
import torch

from meta.optim import SGD, build_optimizer

SETTINGS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
    {"momentum": 0.8, "nesterov": True, "weight_decay": 0.01},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("scheduled", [False, True])
def test_sgd_equals_torch_over_50_steps(settings, scheduled):
    torch.manual_seed(0)
    start = {"weight": torch.randn(4, 3), "bias": torch.randn(4), "untouched": torch.randn(2)}
    gradients = [{name: torch.randn_like(start[name]) for name in ("weight", "bias")} for _ in range(50)]

    def rate(step: int) -> float:
        return 0.1 * (1 - step / 50) if scheduled else 0.1

    theirs = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in start.items()}
    reference = torch.optim.SGD(theirs.values(), lr=0.1, **settings)
    ours, slots = start, {}
    optimizer = SGD(rate, **settings)
    for step, gradient in enumerate(gradients):
        reference.param_groups[0]["lr"] = rate(step)
        for name, tensor in gradient.items():
            theirs[name].grad = tensor.clone()
        reference.step()
        ours, slots = optimizer.update(ours, gradient, slots, step)

    for name in start:
        torch.testing.assert_close(ours[name], theirs[name].detach(), rtol=1e-6, atol=1e-6)
    if settings.get("momentum"):
        assert slots["momentum_buffer"].keys() == gradients[0].keys()
        for name, buffer in slots["momentum_buffer"].items():
            torch.testing.assert_close(buffer, reference.state[theirs[name]]["momentum_buffer"], rtol=1e-6, atol=1e-6)
    else:
        assert slots == {}


def test_update_writes_to_no_argument():
    parameters, gradients = {"a": torch.ones(3)}, {"a": torch.ones(3)}
    slots = {"momentum_buffer": {"a": torch.ones(3)}}
    SGD(0.1, momentum=0.9, weight_decay=0.1).update(parameters, gradients, slots, 0)
    assert all(
        torch.equal(tensor, torch.ones(3))
        for tensor in (parameters["a"], gradients["a"], slots["momentum_buffer"]["a"])
    )


def test_nesterov_needs_momentum_without_dampening():
    with pytest.raises(ValueError, match="Nesterov"):
        SGD(0.1, nesterov=True)
    with pytest.raises(ValueError, match="Nesterov"):
        SGD(0.1, momentum=0.9, dampening=0.1, nesterov=True)


def test_a_torch_optimizer_is_refused_with_a_clear_line():
    parameter = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="unsupported inner optimiser Adagrad"):
        build_optimizer(torch.optim.Adagrad([parameter]), {})
