from dataclasses import replace

import pytest
import torch

from meta import Problem, State
from meta.estimators import adjoint, evolution
from meta.optim import SGD

RATE, STEPS = 0.1, 3


def inner_loss(parameters, buffers, hyper, batch):
    return 0.5 * (parameters["x"] - hyper["centre"]).square().sum(), buffers


def outer_loss(parameters, buffers, batch):
    return parameters["x"].sum()


START = State({"x": torch.zeros(2, dtype=torch.float64)}, {}, {})
HYPER = {"centre": torch.tensor([1.0, -1.0], dtype=torch.float64)}
PROBLEM = Problem(inner_loss, outer_loss, START, HYPER, [None] * STEPS, None, SGD(RATE))


def test_one_window_agrees_with_the_exact_hypergradient():
    estimate = evolution(PROBLEM, pairs=800, spread=0.1)
    exact = adjoint(PROBLEM)
    torch.testing.assert_close(estimate.grads, exact.grads, rtol=0.2, atol=0.0)
    torch.testing.assert_close(estimate.outer_value, exact.outer_value)
    torch.testing.assert_close(estimate.final_state.parameters, exact.final_state.parameters)


def test_an_error_rate_can_be_the_outer_loss():
    def error_rate(parameters, buffers, batch):
        return (parameters["x"] < 0.27).double().mean()

    estimate = evolution(replace(PROBLEM, outer_loss=error_rate), pairs=500, spread=0.3)
    assert estimate.grads["centre"][0] < -0.1
    assert estimate.grads["centre"][1].abs() < 0.05


def test_pairs_see_the_same_random_numbers():
    def noisy(parameters, buffers, hyper, batch):
        return inner_loss(parameters, buffers, hyper, batch)[0] + 10 * (torch.randn(2) * parameters["x"]).sum(), buffers

    few = evolution(replace(PROBLEM, inner_loss=noisy), pairs=200, spread=0.1)
    quiet = evolution(PROBLEM, pairs=200, spread=0.1)
    torch.testing.assert_close(few.grads, quiet.grads)


def test_a_vector_as_outer_loss_is_an_error():
    with pytest.raises(ValueError, match="must be a scalar"):
        evolution(replace(PROBLEM, outer_loss=lambda parameters, buffers, batch: parameters["x"]))
