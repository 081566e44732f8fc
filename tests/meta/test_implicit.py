import pytest
import torch

from meta import Problem, State
from meta.estimators import implicit
from meta.optim import SGD, Adam, AdamW

TARGETS = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
CURVATURES = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)


def inner_loss(parameters, buffers, hyper, batch):
    distance = parameters["x"] - hyper["centre"] ** 2
    return 0.5 * (CURVATURES * distance.square()).sum(), buffers


def outer_loss(parameters, buffers, batch):
    return 0.5 * (parameters["x"] - TARGETS).square().sum()


def solve(optimizer, **options):
    start = State({"x": torch.zeros(3, dtype=torch.float64)}, {}, {})
    hyper = {"centre": torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)}
    problem = Problem(inner_loss, outer_loss, start, hyper, [None] * 400, None, optimizer)
    return implicit(problem, **options), hyper["centre"]


@pytest.mark.parametrize("solver", [{"solver": "neumann", "terms": 400}, {"solver": "conjugate_gradient", "terms": 3}])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_a_converged_quadratic_has_its_closed_form(solver, decay):
    result, centre = solve(SGD(0.2, weight_decay=decay), **solver)
    pull = CURVATURES / (CURVATURES + decay)
    optimum = pull * centre**2
    expected = (optimum - TARGETS) * pull * 2 * centre
    torch.testing.assert_close(result.grads["centre"], expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("terms", [1, 2, 5])
def test_few_neumann_terms_fall_short_as_a_geometric_sum_does(terms):
    result, centre = solve(SGD(0.2), terms=terms)
    part = 1 - (1 - 0.2 * CURVATURES) ** (terms + 1)
    torch.testing.assert_close(result.grads["centre"], (centre**2 - TARGETS) * 2 * centre * part)


def test_damping_is_added_to_the_curvature():
    result, centre = solve(SGD(0.2), solver="conjugate_gradient", terms=3, damping=0.5)
    part = CURVATURES / (CURVATURES + 0.5)
    torch.testing.assert_close(result.grads["centre"], (centre**2 - TARGETS) * 2 * centre * part, rtol=1e-6, atol=1e-8)


def test_adam_is_taken_at_its_stationary_point():
    result, centre = solve(Adam(lambda step: 0.3 * 0.98**step), solver="conjugate_gradient", terms=3)
    expected = (centre**2 - TARGETS) * 2 * centre
    torch.testing.assert_close(result.grads["centre"], expected, rtol=1e-2, atol=1e-2)


def test_what_it_cannot_do_is_said():
    with pytest.raises(ValueError, match="supports SGD and Adam, not AdamW"):
        solve(AdamW(0.1))
    with pytest.raises(ValueError, match="unknown solver 'newton'"):
        solve(SGD(0.1), solver="newton")
