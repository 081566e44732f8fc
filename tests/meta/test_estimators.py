from dataclasses import replace
from functools import partial

import pytest
import torch
from bilevel_problems import learned_loss_problem, relative_distance
from hypothesis import given, settings
from hypothesis import strategies as st

from meta import ESTIMATORS, Problem, rollout, verify
from meta.estimators import adjoint, first_order, higher, truncated, unrolled
from meta.optim import SGD, Adam, AdamW, Averaged, Clipped, Grouped

EXACT = {
    "higher": higher,
    "unrolled": unrolled,
    "adjoint": adjoint,
    "adjoint in chunks of 3": partial(adjoint, chunk=3),
}
BY_DIFFERENCES = {
    "one side": partial(first_order, radius=1e-6),
    "central": partial(first_order, radius=1e-4, central=True),
}
SGDS = {
    "momentum": SGD(0.05, momentum=0.9, weight_decay=1e-3),
    "nesterov": SGD(0.05, momentum=0.9, nesterov=True),
    "dampening and schedule": SGD(lambda step: 0.1 / (1 + step), momentum=0.5, dampening=0.2),
    "plain": SGD(0.1),
}
DIFFERENTIATING = sorted(ESTIMATORS.keys() - {"evolution"})
BIASED, PLAIN = AdamW(0.01), SGD(0.05, momentum=0.9, weight_decay=1e-2)
SMOOTH = Averaged(BIASED, 0.6)
OPTIMIZERS = SGDS | {
    "adam": Adam(0.01, weight_decay=1e-2),
    "adamw": AdamW(0.01, weight_decay=0.1),
    "clipped": Clipped(SGD(0.05, momentum=0.9), 0.1),
    "averaged": Averaged(SGD(0.05, momentum=0.9), 0.6),
    "clipped averaged adamw": Clipped(Averaged(AdamW(0.01), 0.6), 0.1),
    "grouped": Grouped(lambda name: BIASED if name.endswith("bias") else PLAIN),
    "partly averaged": Grouped(lambda name: SMOOTH if name.endswith("bias") else PLAIN),
}


@pytest.mark.parametrize("optimizer", SGDS)
def test_exact_estimators_agree(optimizer):
    problem = learned_loss_problem(steps=4, optimizer=SGDS[optimizer])
    reference = higher(problem)
    for name, estimator in EXACT.items():
        result = estimator(problem)
        assert relative_distance(result.grads, reference.grads) < 1e-8, name
        torch.testing.assert_close(result.norm, reference.norm)
        torch.testing.assert_close(result.outer_value, reference.outer_value)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_is_differentiated_rightly(optimizer):
    problem = learned_loss_problem(steps=4, optimizer=OPTIMIZERS[optimizer], carry_momentum=False)
    exact = adjoint(problem)
    assert verify(partial(adjoint, chunk=2), problem).relative_error < 1e-5
    for name, estimator in BY_DIFFERENCES.items():
        assert relative_distance(estimator(problem).grads, exact.grads) < 1e-4, name


def test_the_outer_loss_sees_the_averages_of_a_group_and_the_last_iterates_of_the_rest():
    problem = learned_loss_problem(optimizer=OPTIMIZERS["partly averaged"], carry_momentum=False)
    end = rollout(problem)
    seen = {name: end.optimizer["average"].get(name, tensor) for name, tensor in end.parameters.items()}
    assert {name for name in seen if seen[name] is not end.parameters[name]} == {"0.bias", "1.bias", "5.bias"}
    torch.testing.assert_close(adjoint(problem).outer_value, problem.outer_loss(seen, end.buffers, problem.outer_batch))


@settings(max_examples=15, deadline=None)
@given(
    steps=st.integers(1, 6),
    seed=st.integers(0, 1000),
    chunk=st.integers(1, 7),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
)
def test_random_problems_are_solved_alike(steps, seed, chunk, optimizer):
    problem = learned_loss_problem(steps, OPTIMIZERS[optimizer], carry_momentum=False, seed=seed)
    exact = unrolled(problem)
    assert relative_distance(adjoint(problem, chunk=chunk).grads, exact.grads) < 1e-8
    assert relative_distance(truncated(problem, steps=steps, estimator=adjoint).grads, exact.grads) < 1e-8
    assert relative_distance(first_order(problem, radius=1e-4, central=True).grads, exact.grads) < 1e-4


def test_the_bias_of_differences_is_of_the_order_it_claims():
    problem = learned_loss_problem(steps=1, optimizer=SGD(0.1), carry_momentum=False)
    exact = adjoint(problem)

    def error(radius: float, central: bool) -> float:
        return relative_distance(first_order(problem, radius=radius, central=central).grads, exact.grads)

    assert error(1e-2, central=False) / error(1e-3, central=False) == pytest.approx(10, rel=0.2)
    assert error(1e-2, central=True) / error(1e-3, central=True) == pytest.approx(100, rel=0.2)


def test_verify_sees_a_wrong_hypergradient():
    def doubled(problem):
        result = unrolled(problem)
        return result._replace(grads={name: 2 * gradient for name, gradient in result.grads.items()})

    assert verify(doubled, learned_loss_problem()).relative_error == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("name", EXACT | BY_DIFFERENCES)
def test_optimizer_settings_can_be_outer_parameters(name):
    problem = learned_loss_problem()

    def recipe(hyper):
        return SGD(hyper["log_rate"].exp(), momentum=hyper["momentum"], weight_decay=hyper["decay"])

    settings = {"log_rate": torch.tensor(-3.0), "momentum": torch.tensor(0.8), "decay": torch.tensor(0.01)}
    problem = replace(problem, hyper={**problem.hyper, **settings}, optimizer=recipe)
    estimator = (EXACT | BY_DIFFERENCES)[name]
    assert verify(estimator, problem).relative_error < (1e-6 if name in EXACT else 1e-4)


@pytest.mark.parametrize("estimator", [adjoint, unrolled, *BY_DIFFERENCES.values()])
def test_optimizer_settings_can_be_the_only_outer_parameters(estimator):
    problem = learned_loss_problem()

    def fixed_loss(parameters, buffers, hyper, batch):
        return problem.inner_loss(parameters, buffers, problem.hyper, batch)

    changed = replace(
        problem,
        inner_loss=fixed_loss,
        hyper={"rate": torch.tensor(0.05)},
        optimizer=lambda hyper: SGD(hyper["rate"], momentum=0.9),
    )
    assert verify(estimator, changed).relative_error < 1e-4


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_the_final_state_is_the_rollouts_and_nothing_is_written_to(name):
    problem = learned_loss_problem()
    before = problem.state.detach()
    end = ESTIMATORS[name](problem).final_state
    expected = rollout(problem)
    assert relative_distance(end.parameters, expected.parameters) < 1e-12
    assert relative_distance(end.optimizer["momentum_buffer"], expected.optimizer["momentum_buffer"]) < 1e-12
    for buffer in expected.buffers:
        torch.testing.assert_close(end.buffers[buffer], expected.buffers[buffer])
    assert not torch.equal(end.buffers["1.running_mean"], before.buffers["1.running_mean"])
    for kept, original in zip(problem.state[:2], before[:2], strict=True):
        assert all(torch.equal(kept[key], original[key]) for key in original)
    assert not any(tensor.requires_grad for tensor in (*problem.hyper.values(), *end.parameters.values()))


def test_the_walk_logs_the_adjoint():
    problem = learned_loss_problem(steps=5)
    for estimator in (adjoint, first_order):
        norms = estimator(problem).adjoint_norms
        assert norms.shape == (5,)
        end = rollout(problem).detach()
        at_the_end = {name: value.requires_grad_() for name, value in end.parameters.items()}
        gradient = torch.autograd.grad(
            problem.outer_loss(at_the_end, end.buffers, problem.outer_batch), [*at_the_end.values()]
        )
        torch.testing.assert_close(norms[0], torch.cat([part.flatten() for part in gradient]).norm())


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_truncated_differentiates_the_last_steps_under_the_whole_schedule(steps):
    rates = [0.2, 0.1, 0.05, 0.02]
    problem = learned_loss_problem(steps=4, optimizer=SGD(rates.__getitem__, momentum=0.9))
    cut = 4 - steps
    head = replace(problem, inner_batches=problem.inner_batches[:cut])
    middle = rollout(head)
    tail = replace(
        problem,
        state=middle,
        inner_batches=problem.inner_batches[cut:],
        optimizer=SGD(rates[cut:].__getitem__, momentum=0.9),
    )
    for estimator in (adjoint, higher):
        result = truncated(problem, steps=steps, estimator=estimator)
        assert relative_distance(result.grads, adjoint(tail).grads) < 1e-10


def test_last_step_is_the_last_steps_mixed_product():
    problem = learned_loss_problem(steps=3)
    expected = truncated(problem, steps=1, estimator=unrolled)
    assert relative_distance(ESTIMATORS["last_step"](problem).grads, expected.grads) < 1e-10


@pytest.mark.parametrize("estimator", [adjoint, partial(adjoint, chunk=2), *BY_DIFFERENCES.values()])
def test_dropout_is_replayed(estimator):
    problem = learned_loss_problem(steps=4)

    def noisy(parameters, buffers, hyper, batch):
        loss, buffers = problem.inner_loss(parameters, buffers, hyper, batch)
        mask = torch.bernoulli(torch.full_like(hyper["weight"], 0.5))
        return loss + (mask * hyper["weight"]).sum() * parameters["0.weight"].square().sum(), buffers

    assert verify(estimator, replace(problem, inner_loss=noisy)).relative_error < 1e-4


@pytest.mark.parametrize("name", ESTIMATORS)
def test_random_numbers_are_drawn_as_by_the_rollout_alone(name):
    """So that what is drawn next does not depend on the estimator."""
    problem = learned_loss_problem()

    def noisy(parameters, buffers, hyper, batch):
        loss, buffers = problem.inner_loss(parameters, buffers, hyper, batch)
        return loss * torch.rand(()), buffers

    drawn = []
    for solve in (rollout, ESTIMATORS[name]):
        torch.manual_seed(0)
        solve(replace(problem, inner_loss=noisy))
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("estimator", [partial(adjoint, chunk=1), first_order])
def test_the_first_tensor_that_is_not_finite_is_named(estimator):
    problem = learned_loss_problem(steps=4)
    images, targets = problem.inner_batches[2]
    batches = [*problem.inner_batches[:2], (images / 0, targets), problem.inner_batches[3]]
    result = estimator(replace(problem, inner_batches=batches))
    assert result.fault is not None
    assert result.fault.startswith("inner step 2: gradient of '0.")
    assert estimator(problem).fault is None


def test_a_constant_in_the_loss_has_a_zero_hypergradient_and_is_no_error():
    problem = learned_loss_problem()

    def shifted(parameters, buffers, hyper, batch):
        loss, buffers = problem.inner_loss(parameters, buffers, hyper, batch)
        return loss + hyper["offset"], buffers

    hyper = {**problem.hyper, "offset": torch.zeros((), dtype=torch.float64)}
    for name in DIFFERENTIATING:
        grads = ESTIMATORS[name](replace(problem, inner_loss=shifted, hyper=hyper)).grads
        assert grads["offset"] == pytest.approx(0, abs=1e-12), name
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

    changed = replace(problem, inner_loss=without_idle, outer_loss=outer_with_idle, state=state)
    for name in DIFFERENTIATING:
        estimator = ESTIMATORS[name]
        result = estimator(changed)
        assert torch.equal(result.final_state.parameters["idle"], state.parameters["idle"]), name
        assert relative_distance(result.grads, estimator(problem).grads) < 1e-12


def _detached(problem: Problem) -> Problem:
    def inner_loss(parameters, buffers, hyper, batch):
        loss, buffers = problem.inner_loss(parameters, buffers, hyper, batch)
        return loss.detach(), buffers

    return replace(problem, inner_loss=inner_loss)


def _vector_loss(problem: Problem) -> Problem:
    def inner_loss(parameters, buffers, hyper, batch):
        loss, buffers = problem.inner_loss(parameters, buffers, hyper, batch)
        return loss.expand(3), buffers

    return replace(problem, inner_loss=inner_loss)


def _independent_outer(problem: Problem) -> Problem:
    elsewhere = torch.ones((), dtype=torch.float64, requires_grad=True)
    return replace(problem, outer_loss=lambda parameters, buffers, batch: 2 * elsewhere)


def _foreign_slot(problem: Problem) -> Problem:
    return replace(problem, state=problem.state._replace(optimizer={"momentum_buffer": {"stranger": torch.ones(1)}}))


def _misshapen_slot(problem: Problem) -> Problem:
    return replace(problem, state=problem.state._replace(optimizer={"momentum_buffer": {"0.bias": torch.ones(9)}}))


def _integer_parameter(problem: Problem) -> Problem:
    parameters = {**problem.state.parameters, "count": torch.ones(2, dtype=torch.int64)}
    return replace(problem, state=problem.state._replace(parameters=parameters))


def _unused_outer(problem: Problem) -> Problem:
    return replace(problem, hyper={**problem.hyper, "stray": torch.ones(2, dtype=torch.float64)})


BAD_INPUT = {
    "no steps": (lambda problem: replace(problem, inner_batches=[]), "at least one inner batch"),
    "detached loss": (_detached, "does not depend on the inner parameters"),
    "vector loss": (_vector_loss, r"must be a scalar, but has shape \(3,\)"),
    "outer loss elsewhere": (_independent_outer, "outer loss does not depend on the inner parameters"),
    "unused outer parameter": (_unused_outer, "never uses: stray"),
    "foreign slot": (_foreign_slot, "of no inner parameter: stranger"),
    "misshapen slot": (_misshapen_slot, r"has shape \(9,\) for '0.bias'"),
    "integer parameter": (_integer_parameter, "inner parameter 'count' is of type torch.int64"),
    "no outer parameters": (lambda problem: replace(problem, hyper={}), "no outer parameters"),
    "torch optimiser": (
        lambda problem: replace(problem, optimizer=torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)),
        "unsupported inner optimiser SGD",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_error(case):
    spoil, message = BAD_INPUT[case]
    for name in DIFFERENTIATING:
        with pytest.raises(ValueError, match=message):
            ESTIMATORS[name](spoil(learned_loss_problem()))
