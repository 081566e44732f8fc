import pytest
import torch
from bilevel_problems import Problem, learned_loss_problem, relative_distance

from meta import ESTIMATORS, rollout, verify
from meta.optim import SGD

EXACT = ["higher", "unrolled"]
OPTIMIZERS = [
    SGD(0.05, momentum=0.9, weight_decay=1e-3),
    SGD(0.05, momentum=0.9, nesterov=True),
    SGD(lambda step: 0.1 / (1 + step), momentum=0.5, dampening=0.2),
    SGD(0.1),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("carry_momentum", [True, False])
def test_exact_estimators_agree(optimizer, carry_momentum):
    problem = learned_loss_problem(steps=4, optimizer=optimizer, carry_momentum=carry_momentum)
    results = [ESTIMATORS[name](*problem) for name in EXACT]
    for result in results[1:]:
        assert relative_distance(result.grads, results[0].grads) < 1e-8
        torch.testing.assert_close(result.norm, results[0].norm)
        torch.testing.assert_close(result.outer_value, results[0].outer_value)


@pytest.mark.parametrize("name", EXACT)
def test_exact_estimators_agree_with_central_differences(name):
    outcome = verify(ESTIMATORS[name], *learned_loss_problem(steps=4))
    assert outcome.relative_error < 1e-6
    assert outcome.measured.abs().min() > 0


def test_verify_sees_a_wrong_hypergradient():
    def doubled(*problem):
        result = ESTIMATORS["unrolled"](*problem)
        return result._replace(grads={name: 2 * gradient for name, gradient in result.grads.items()})

    assert verify(doubled, *learned_loss_problem()).relative_error == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("name", EXACT)
def test_optimizer_settings_can_be_outer_parameters(name):
    problem = learned_loss_problem()

    def recipe(hyper):
        return SGD(hyper["log_rate"].exp(), momentum=hyper["momentum"], weight_decay=hyper["decay"])

    settings = {"log_rate": torch.tensor(-3.0), "momentum": torch.tensor(0.8), "decay": torch.tensor(0.01)}
    problem = problem._replace(hyper={**problem.hyper, **settings}, optimizer=recipe)
    assert verify(ESTIMATORS[name], *problem).relative_error < 1e-6


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_the_final_state_is_the_rollouts_and_nothing_is_written_to(name):
    problem = learned_loss_problem()
    before = problem.state.detach()
    end = ESTIMATORS[name](*problem).final_state
    expected = rollout(problem.inner_loss, problem.state, problem.hyper, problem.inner_batches, problem.optimizer)
    assert relative_distance(end.parameters, expected.parameters) < 1e-12
    assert relative_distance(end.optimizer["momentum_buffer"], expected.optimizer["momentum_buffer"]) < 1e-12
    for buffer in expected.buffers:
        torch.testing.assert_close(end.buffers[buffer], expected.buffers[buffer])
    assert not torch.equal(end.buffers["1.running_mean"], before.buffers["1.running_mean"])
    for kept, original in zip(problem.state[:2], before[:2], strict=True):
        assert all(torch.equal(kept[key], original[key]) for key in original)
    assert not any(tensor.requires_grad for tensor in (*problem.hyper.values(), *end.parameters.values()))


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_two_windows_continue_as_one(name):
    problem = learned_loss_problem(steps=4)
    first = ESTIMATORS[name](*problem._replace(inner_batches=problem.inner_batches[:2]))
    second = ESTIMATORS[name](*problem._replace(state=first.final_state, inner_batches=problem.inner_batches[2:]))
    whole = rollout(problem.inner_loss, problem.state, problem.hyper, problem.inner_batches, problem.optimizer)
    assert relative_distance(second.final_state.parameters, whole.parameters) < 1e-12


def test_a_constant_in_the_loss_has_a_zero_hypergradient_and_is_no_error():
    problem = learned_loss_problem()

    def shifted(parameters, buffers, hyper, batch):
        loss, buffers = problem.inner_loss(parameters, buffers, hyper, batch)
        return loss + hyper["offset"], buffers

    hyper = {**problem.hyper, "offset": torch.zeros((), dtype=torch.float64)}
    for estimator in ESTIMATORS.values():
        grads = estimator(*problem._replace(inner_loss=shifted, hyper=hyper)).grads
        assert grads["offset"] == 0
        assert grads["weight"].abs().max() > 0


def test_an_inner_parameter_without_gradient_stays():
    problem = learned_loss_problem()
    state = problem.state._replace(parameters={**problem.state.parameters, "idle": torch.ones(2, dtype=torch.float64)})

    def without_idle(parameters, buffers, hyper, batch):
        used = {name: tensor for name, tensor in parameters.items() if name != "idle"}
        return problem.inner_loss(used, buffers, hyper, batch)

    def outer_with_idle(parameters, buffers, batch):
        used = {name: tensor for name, tensor in parameters.items() if name != "idle"}
        return problem.outer_loss(used, buffers, batch) + parameters["idle"].sum()

    changed = problem._replace(inner_loss=without_idle, outer_loss=outer_with_idle, state=state)
    for name, estimator in ESTIMATORS.items():
        result = estimator(*changed)
        assert torch.equal(result.final_state.parameters["idle"], state.parameters["idle"]), name
        assert relative_distance(result.grads, estimator(*problem).grads) < 1e-12


def _detached(problem: Problem) -> Problem:
    def inner_loss(parameters, buffers, hyper, batch):
        loss, buffers = problem.inner_loss(parameters, buffers, hyper, batch)
        return loss.detach(), buffers

    return problem._replace(inner_loss=inner_loss)


def _vector_loss(problem: Problem) -> Problem:
    def inner_loss(parameters, buffers, hyper, batch):
        loss, buffers = problem.inner_loss(parameters, buffers, hyper, batch)
        return loss.expand(3), buffers

    return problem._replace(inner_loss=inner_loss)


def _independent_outer(problem: Problem) -> Problem:
    elsewhere = torch.ones((), dtype=torch.float64, requires_grad=True)
    return problem._replace(outer_loss=lambda parameters, buffers, batch: 2 * elsewhere)


def _foreign_slot(problem: Problem) -> Problem:
    return problem._replace(state=problem.state._replace(optimizer={"momentum_buffer": {"stranger": torch.ones(1)}}))


def _misshapen_slot(problem: Problem) -> Problem:
    return problem._replace(state=problem.state._replace(optimizer={"momentum_buffer": {"0.bias": torch.ones(9)}}))


def _integer_parameter(problem: Problem) -> Problem:
    parameters = {**problem.state.parameters, "count": torch.ones(2, dtype=torch.int64)}
    return problem._replace(state=problem.state._replace(parameters=parameters))


def _unused_outer(problem: Problem) -> Problem:
    return problem._replace(hyper={**problem.hyper, "stray": torch.ones(2, dtype=torch.float64)})


BAD_INPUT = {
    "no steps": (lambda problem: problem._replace(inner_batches=[]), "at least one inner batch"),
    "detached loss": (_detached, "does not depend on the inner parameters"),
    "vector loss": (_vector_loss, r"must be a scalar, but has shape \(3,\)"),
    "outer loss elsewhere": (_independent_outer, "outer loss does not depend on the inner parameters"),
    "unused outer parameter": (_unused_outer, "never uses: stray"),
    "foreign slot": (_foreign_slot, "of no inner parameter: stranger"),
    "misshapen slot": (_misshapen_slot, r"has shape \(9,\) for '0.bias'"),
    "integer parameter": (_integer_parameter, "inner parameter 'count' is of type torch.int64"),
    "no outer parameters": (lambda problem: problem._replace(hyper={}), "no outer parameters"),
    "torch optimiser": (
        lambda problem: problem._replace(optimizer=torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)),
        "unsupported inner optimiser SGD",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_bad_input_is_one_clear_error(name, case):
    spoil, message = BAD_INPUT[case]
    with pytest.raises(ValueError, match=message):
        ESTIMATORS[name](*spoil(learned_loss_problem()))
