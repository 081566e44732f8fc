import math
from dataclasses import replace

import pytest
import torch
from bilevel_problems import learned_loss_problem
from test_networks import build, network_problem

from meta import Audited, Problem, audit, horizon
from meta.estimators import adjoint, first_order
from meta.optim import SGD, Adam


def test_an_audit_finds_the_radius_and_leaves_the_generators_alone():
    problem = learned_loss_problem(steps=4)
    before = torch.get_rng_state()
    found = audit(problem, radii=(1e-4, 1.0), examples=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.radius == 1e-4
    assert found.cosine == found.cosines[1e-4] > 0.9999
    assert found.cosines[1.0] < found.cosine
    assert found.norm_ratio == pytest.approx(1, abs=1e-3)


def test_audited_audits_on_schedule_and_is_first_order_in_between():
    problem = learned_loss_problem(steps=3)
    estimator = Audited(every=2, radii=(1e-4, 1.0))
    results = [estimator(problem) for _ in range(3)]
    assert sorted(estimator.audits) == [0, 2]
    assert not estimator.exact
    expected = first_order(problem, radius=1e-4)
    for result in results:
        torch.testing.assert_close(result.grads, expected.grads)


def test_processes_that_share_students_audit_as_one_that_has_them_all():
    problems = [learned_loss_problem(steps=3, seed=seed) for seed in range(4)]
    alone, *sharing = (Audited(every=3, radii=(1e-4, 1e-2, 1.0)) for _ in range(3))
    for number, problem in enumerate(problems):
        expected = alone(problem)
        for process, estimator in enumerate(sharing):
            if number % 2 == process:
                torch.testing.assert_close(estimator(problem).grads, expected.grads, rtol=0, atol=0)
            else:
                estimator.follow(lambda problem=problem: problem)
            assert estimator.audits == alone.audits
            assert estimator.state_dict() == alone.state_dict()
    assert sorted(alone.audits) == [0, 3]


def test_an_audit_on_a_student_that_diverges_says_nothing():
    problem = learned_loss_problem(steps=3)
    broken = {name: float("nan") * tensor for name, tensor in problem.state.parameters.items()}
    estimator = Audited(every=100, radii=(1e-4, 1e-2, 1.0))
    estimator(replace(problem, state=problem.state._replace(parameters=broken)))
    assert (estimator.radius, estimator.exact) == (1e-2, False)
    estimator(problem)
    assert sorted(estimator.audits) == [0, 1]
    assert estimator.radius == 1e-4


def test_audited_falls_back_to_the_exact_walk():
    problem = learned_loss_problem(steps=3)
    estimator = Audited(radii=(3.0,), threshold=0.9999)
    result = estimator(problem)
    assert estimator.exact
    assert estimator.audits[0].cosine < 0.9999
    torch.testing.assert_close(result.grads, adjoint(problem).grads)


def test_the_audit_sees_what_adam_from_a_cold_start_does_to_differences():
    """Early in Adam the update divides by roots of almost nothing."""
    problem = network_problem(build("in-place ReLU"), dtype=torch.float32, steps=20, optimizer=Adam(0.05))
    estimator = Audited(radii=(1e-3, 3e-3), examples=None)
    result = estimator(problem)
    assert estimator.audits[0].cosine < 0.9
    assert estimator.exact
    torch.testing.assert_close(result.grads, adjoint(problem).grads)
    found = audit(replace(problem, optimizer=Adam(0.01)), radii=(1e-3, 3e-2))
    assert found.radius == 3e-2
    assert found.cosines[1e-3] < 0.9
    assert found.cosine > 0.99


def test_audited_goes_on_where_nothing_exact_can_be_had():
    problem = network_problem(build("vision transformer with fused attention"))
    estimator = Audited()
    result = estimator(problem)
    assert math.isnan(estimator.audits[0].cosine)
    assert not estimator.exact
    torch.testing.assert_close(result.grads, first_order(problem, radius=estimator.radius).grads)


def test_horizon_tells_a_calm_problem_from_a_chaotic_one():
    calm = horizon(learned_loss_problem(steps=6))
    assert calm.steps == 6
    assert sorted(calm.cosines) == [1, 2, 4, 6]

    def logistic_map(parameters, buffers, hyper, batch):
        x = parameters["x"]
        # One step at rate 1 is x ← 4 x (1 − x) up to the outer parameter: chaos.
        return (x.square() / 2 - hyper["a"] * (x.square() / 2 - x**3 / 3)).sum(), buffers

    problem = learned_loss_problem()
    state = problem.state._replace(parameters={"x": torch.rand(5, dtype=torch.float64)}, buffers={}, optimizer={})
    hyper = {"a": torch.tensor(4.0, dtype=torch.float64)}

    def outer_loss(parameters, buffers, batch):
        return parameters["x"].sum()

    chaotic = horizon(Problem(logistic_map, outer_loss, state, hyper, [None] * 64, None, SGD(1.0)))
    assert 1 <= chaotic.steps < 64
    assert min(chaotic.cosines, key=chaotic.cosines.get) > chaotic.steps
