"""Every estimator against central differences on random small problems, where it promises to be right."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from meta import ESTIMATORS, Estimator, Problem, State, verify
from meta.estimators import evolution, first_order, implicit, last_step, truncated
from meta.optim import SGD, Adam


class Promise(NamedTuple):
    """What an estimator promises.

    Attributes:
        estimator: It, with the options under which the promise holds.
        steps: For how many inner steps.
        error: Relative error against central differences.
        quadratic: Whether the inner loss must be quadratic, so that a long rollout ends where it is stationary.
    """

    estimator: Estimator
    steps: tuple[int, ...]
    error: float
    quadratic: bool = False


PROMISES = {
    "higher": Promise(ESTIMATORS["higher"], (1, 2, 5), 1e-6),
    "unrolled": Promise(ESTIMATORS["unrolled"], (1, 2, 5), 1e-6),
    "adjoint": Promise(ESTIMATORS["adjoint"], (1, 2, 5), 1e-6),
    "first_order": Promise(partial(first_order, radius=1e-4, central=True), (1, 2, 5), 1e-5),
    "truncated": Promise(partial(truncated, steps=5, estimator=ESTIMATORS["adjoint"]), (1, 2, 5), 1e-6),
    "last_step": Promise(last_step, (1,), 1e-6),
    "implicit": Promise(partial(implicit, solver="conjugate_gradient", terms=8), (150,), 1e-4, quadratic=True),
    "evolution": Promise(partial(evolution, pairs=100, spread=0.01), (2,), 0.6),  # a random direction: 1.4
}


def draw_problem(seed: int, size: int, steps: int, optimizer: str, quadratic: bool) -> Problem:
    """An inner loss that is a random convex quadratic about an outer parameter, and unless told otherwise a bend."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    root, bend = draw(size, size) / size**0.5, draw(size, size)
    curvature = root @ root.T + torch.eye(size, dtype=torch.float64)
    goal = draw(size)

    def inner_loss(parameters, buffers, hyper, batch):
        apart = parameters["x"] - hyper["centre"]
        value = 0.5 * apart @ curvature @ apart
        if not quadratic:
            value = value + (hyper["scale"].exp() * F.softplus(bend @ parameters["x"] + batch)).sum()
        return value, buffers

    def outer_loss(parameters, buffers, batch):
        return (parameters["x"] - goal).square().sum()

    hyper = {"centre": draw(size)} | ({} if quadratic else {"scale": 0.3 * draw()})
    batches = [torch.zeros(size, dtype=torch.float64) if quadratic else draw(size) for _ in range(steps)]
    recipe = {"sgd": SGD(0.05), "momentum": SGD(0.05, momentum=0.8), "adam": Adam(0.05, eps=1.0)}[optimizer]
    return Problem(inner_loss, outer_loss, State({"x": draw(size)}, {}, {}), hyper, batches, None, recipe)


def test_every_estimator_has_promised_something() -> None:
    assert PROMISES.keys() == ESTIMATORS.keys()


@pytest.mark.parametrize("name", PROMISES)
@settings(max_examples=8, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(
    data=st.data(),
    seed=st.integers(0, 10_000),
    size=st.integers(1, 4),
    optimizer=st.sampled_from(["sgd", "momentum", "adam"]),
)
def test_estimators_keep_their_promises_on_random_problems(name, data, seed, size, optimizer) -> None:
    promise = PROMISES[name]
    steps = data.draw(st.sampled_from(promise.steps))
    # Adam does not settle within these steps. Its eps is large: with a small one its first update is a step function.
    optimizer = "momentum" if promise.quadratic or name in ("higher", "evolution") else optimizer
    size = min(size, 2) if name == "evolution" else size  # its noise grows with the number of outer parameters
    problem = draw_problem(seed, size, steps, optimizer, promise.quadratic)
    outcome = verify(promise.estimator, problem, directions=3)
    assert outcome.measured.abs().max() > 0
    assert outcome.relative_error < promise.error


@pytest.mark.parametrize("name", PROMISES)
def test_estimators_give_the_same_bits_again(name: str) -> None:
    promise = PROMISES[name]
    first, second = (
        ESTIMATORS[name](draw_problem(3, 3, promise.steps[0], "momentum", promise.quadratic)) for _ in range(2)
    )
    for key, gradient in first.grads.items():
        assert torch.equal(gradient, second.grads[key])
