"""Trouble that users of bi-level code report: starts at zero, odd settings, inputs of the wrong kind."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from bilevel_problems import learned_loss_problem, relative_distance
from torch.nn import functional as F
from torch.utils.data import DataLoader

from meta import ESTIMATORS, Audited, Problem, State, audit, horizon, rollout, verify
from meta.estimators import adjoint, evolution, first_order, higher, implicit, last_step, truncated
from meta.linear_solvers import solve_conjugate_gradient
from meta.optim import SGD, Adam, Averaged, Clipped, Grouped

PLAIN = SGD(0.5)
CENTRAL = partial(first_order, radius=1e-3, central=True)


def regression(steps: int = 3, optimizer=PLAIN, dtype=torch.float64, trained=("weight", "bias")) -> Problem:
    """Logistic regression from zero, whose examples are weighed by outer parameters."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(8, 4, generator=generator, dtype=dtype), torch.arange(8) % 3
    frozen = torch.randn(3, 3, generator=generator, dtype=dtype)

    def predict(parameters, images):
        return (images @ parameters["weight"]) @ frozen + parameters.get("bias", 0)

    def inner_loss(parameters, buffers, hyper, batch):
        losses = F.cross_entropy(predict(parameters, images), labels, reduction="none")
        return (hyper["weights"].sigmoid() * losses).mean(), buffers

    def outer_loss(parameters, buffers, batch):
        return F.cross_entropy(predict(parameters, images[:5] + 1), labels[:5])

    start = {"weight": torch.zeros(4, 3, dtype=dtype), "bias": torch.zeros(3, dtype=dtype)}
    state = State({name: start[name] for name in trained}, {}, {})
    hyper = {"weights": torch.randn(8, generator=generator, dtype=dtype)}
    return Problem(inner_loss, outer_loss, state, hyper, [None] * steps, None, optimizer)


@pytest.mark.outside(43)
@pytest.mark.parametrize("trained", [("weight", "bias"), ("weight",)], ids=["regression", "zero factor of a product"])
@pytest.mark.parametrize("optimizer", [SGD(0.5, momentum=0.9), Adam(0.1), Clipped(Averaged(SGD(0.5), 0.5), 0.1)])
def test_every_estimator_starts_at_zero(optimizer, trained) -> None:
    problem = regression(optimizer=optimizer, trained=trained)
    exact = adjoint(problem)
    assert verify(adjoint, problem).relative_error < 1e-6
    assert relative_distance(CENTRAL(problem).grads, exact.grads) < 1e-3
    for name, estimator in ESTIMATORS.items():
        takes_sgd_alone, wrapped = name == "higher", hasattr(optimizer, "max_norm")
        if not (takes_sgd_alone and not isinstance(optimizer, SGD)) and not (name == "implicit" and wrapped):
            result = estimator(problem)
            assert (result.fault, 0 < result.norm < math.inf) == (None, True), name


@pytest.mark.outside(43)
@pytest.mark.parametrize("radius", [1e-3, 3e-2])
def test_differences_at_zero_do_not_drown_in_roundings(radius) -> None:
    for start in (0.0, 1e-12):
        problem = regression(dtype=torch.float32)
        parameters = {name: tensor + start for name, tensor in problem.state.parameters.items()}
        problem = replace(problem, state=State(parameters, {}, {}))
        assert relative_distance(first_order(problem, radius=radius).grads, adjoint(problem).grads) < 0.03


@pytest.mark.outside(43)
@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_what_is_not_finite_has_a_named_fault(name) -> None:
    problem = learned_loss_problem(steps=2)
    nothing = replace(problem, outer_loss=lambda p, b, batch: (problem.outer_loss(p, b, batch) - 1e3).log())
    assert ESTIMATORS[name](nothing).fault == "the outer loss"
    steep = replace(problem, outer_loss=lambda p, b, batch: problem.outer_loss(p, b, batch) * 1e308 * 1e5)
    assert ESTIMATORS[name](steep).fault is not None
    assert ESTIMATORS[name](problem).fault is None


@pytest.mark.outside(43)
def test_an_audit_passes_over_radii_at_which_nothing_comes_out() -> None:
    problem = regression(dtype=torch.float32)
    problem = replace(problem, state=State({n: t + 1 for n, t in problem.state.parameters.items()}, {}, {}))
    found = audit(problem, radii=(1e-30, 1e-2), examples=None)
    assert found.radius == 1e-2
    assert found.cosine > 0.99
    audited = Audited(radii=(1e-30,), examples=None)
    torch.testing.assert_close(audited(problem).grads, adjoint(problem).grads)
    assert audited.exact
    zero = Audited(examples=None)
    regressed = regression(dtype=torch.float32)
    assert relative_distance(zero(regressed).grads, adjoint(regressed).grads) < 0.03


@pytest.mark.outside(43)
def test_lengths_that_are_none_are_refused() -> None:
    problem = regression()
    for radius in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="radius"):
            first_order(problem, radius=radius)
    for options in ({"pairs": 0}, {"spread": 0.0}):
        with pytest.raises(ValueError, match="pairs"):
            evolution(problem, **options)
    with pytest.raises(ValueError, match="terms"):
        implicit(problem, terms=0)
    with pytest.raises(ValueError, match="lengths"):
        horizon(problem, lengths=[0, 2])


def weights_of_each_step() -> Problem:
    """A problem whose step k alone uses the outer parameter `wk`, and whose optimiser alone uses `rk`."""
    problem = learned_loss_problem(steps=3)

    def inner_loss(parameters, buffers, hyper, batch):
        number, inner = batch
        loss, buffers = problem.inner_loss(parameters, buffers, problem.hyper, inner)
        return loss * hyper[f"w{number}"], buffers

    hyper = {name: torch.tensor(1.5, dtype=torch.float64) for name in ("w0", "w1", "w2")}
    rates = {name: torch.tensor(0.05, dtype=torch.float64) for name in ("r0", "r1", "r2")}
    return replace(
        problem,
        inner_loss=inner_loss,
        hyper=hyper | rates,
        inner_batches=list(enumerate(problem.inner_batches)),
        optimizer=lambda hyper: SGD(lambda step: hyper[f"r{step}"], momentum=0.9),
    )


@pytest.mark.outside(47)
@pytest.mark.parametrize(
    "estimator",
    [
        partial(truncated, steps=1, estimator=adjoint),
        partial(truncated, steps=1, estimator=higher),
        partial(truncated, steps=1, estimator=CENTRAL),
        last_step,
    ],
)
def test_what_only_earlier_steps_use_has_a_zero_hypergradient(estimator) -> None:
    problem = weights_of_each_step()
    before = torch.get_rng_state()
    found, exact = estimator(problem), adjoint(problem)
    assert torch.equal(torch.get_rng_state(), before)
    for name in ("w2", "r2"):
        assert found.grads[name] == pytest.approx(exact.grads[name].item(), rel=1e-3)
    for name in ("w0", "w1", "r0", "r1"):
        assert exact.grads[name] != 0
        assert found.grads[name] == 0
    stray = replace(problem, hyper={**problem.hyper, "stray": torch.ones(2, dtype=torch.float64)})
    with pytest.raises(ValueError, match=r"never uses: stray$"):
        estimator(stray)


@pytest.mark.outside(47)
@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("shape", ["one", "each element"])
def test_learned_settings_may_have_a_shape(shape, kind) -> None:
    problem = learned_loss_problem()

    def spread(value: float) -> dict[str, torch.Tensor]:
        if shape == "one":
            return {"all": torch.tensor([value])}
        return {name: torch.full(tensor.shape, value) for name, tensor in problem.state.parameters.items()}

    rates, decays, momenta = spread(0.05), spread(0.01), spread(0.8)
    hyper = {
        f"{what}.{name}": value
        for what, values in (("rate", rates), ("decay", decays), ("momentum", momenta))
        for name, value in values.items()
        if kind == "sgd" or what != "momentum"
    }

    def recipe(hyper):
        def build(name):
            settings = {"learning_rate": hyper[f"rate.{name}"], "weight_decay": hyper[f"decay.{name}"]}
            return SGD(**settings, momentum=hyper[f"momentum.{name}"]) if kind == "sgd" else Adam(**settings, eps=0.1)

        built = {name: build(name) for name in rates}
        return built["all"] if shape == "one" else Grouped(built.__getitem__)

    state = problem.state if kind == "sgd" else problem.state._replace(optimizer={})
    problem = replace(problem, state=state, hyper=problem.hyper | hyper, optimizer=recipe)
    exact = adjoint(problem)
    assert verify(adjoint, problem, directions=2).relative_error < 1e-5
    for estimator in (partial(first_order, radius=1e-4, central=True), partial(first_order, radius=1e-6)):
        assert relative_distance(estimator(problem).grads, exact.grads) < 1e-4


@pytest.mark.outside(47)
@pytest.mark.parametrize("estimator", [adjoint, higher, first_order, rollout])
def test_a_setting_of_another_shape_than_the_parameters_is_refused(estimator) -> None:
    problem = learned_loss_problem()
    hyper = problem.hyper | {"rate": torch.full((2, 1, 1, 1, 1), 0.05, dtype=torch.float64)}
    with pytest.raises(ValueError, match="setting"):
        estimator(replace(problem, hyper=hyper, optimizer=lambda hyper: SGD(hyper["rate"])))


@pytest.mark.outside(47)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_too_coarse_for_differences_are_refused(dtype) -> None:
    problem = regression(dtype=dtype)
    assert adjoint(problem).norm > 0
    coarse = problem.hyper
    wide = regression(dtype=torch.float32)
    for spoilt, name in ((problem, "weight"), (replace(wide, hyper=coarse), "weights")):
        for estimator in (first_order, Audited(), truncated):
            with pytest.raises(ValueError, match=f"'{name}' is of type {dtype}"):
                estimator(spoilt)


@pytest.mark.outside(47)
@pytest.mark.parametrize("solver", ["neumann", "conjugate_gradient"])
def test_implicit_of_a_zero_outer_gradient_is_zero(solver) -> None:
    problem = regression()
    flat = replace(problem, outer_loss=lambda p, b, batch: 0 * p["weight"].sum() + 1)
    assert verify(adjoint, flat).relative_error == 0
    result = implicit(flat, solver=solver)
    assert result.fault is None
    assert result.norm == 0
    assert solve_conjugate_gradient(lambda vector: vector, [torch.zeros(3)], 5).vector[0].abs().max() == 0


@pytest.mark.outside(47)
def test_a_loss_of_outer_parameters_alone_is_refused_by_all() -> None:
    problem = learned_loss_problem()
    alone = replace(problem, inner_loss=lambda p, buffers, hyper, batch: (hyper["weight"].sum(), buffers))
    for name in ESTIMATORS.keys() - {"evolution"}:
        with pytest.raises(ValueError, match="the inner loss does not depend on"):
            ESTIMATORS[name](alone)


def _with_batches_of_inference(problem: Problem) -> Problem:
    images, targets = problem.inner_batches[0]
    with torch.inference_mode():
        images = images + 0
    return replace(problem, inner_batches=[(images, targets), *problem.inner_batches[1:]])


WRONG_KIND = {
    "hyper is a float": (lambda p: replace(p, hyper=0.1), "outer parameters are a float"),
    "hyper is a list": (lambda p: replace(p, hyper=list(p.hyper.values())), "outer parameters are a list"),
    "hyper of floats": (lambda p: replace(p, hyper={**p.hyper, "rate": 0.1}), "outer parameter 'rate' is a float"),
    "state of lists": (
        lambda p: replace(p, state=p.state._replace(parameters=list(p.state.parameters.items()))),
        "inner parameters are a list",
    ),
    "no state": (lambda p: replace(p, state=p.state.parameters), "state is a dict"),
    "a generator of batches": (lambda p: replace(p, inner_batches=iter(p.inner_batches)), "inner_batches is a"),
    "a DataLoader": (lambda p: replace(p, inner_batches=DataLoader([1, 2, 3])), "inner_batches is a DataLoader"),
    "no buffers": (lambda p: replace(p, inner_loss=lambda *a: p.inner_loss(*a)[0]), r"return \(loss, buffers\)"),
    "None for buffers": (lambda p: replace(p, inner_loss=lambda *a: (p.inner_loss(*a)[0], None)), "NoneType"),
    "an inner loss of a number": (
        lambda p: replace(p, inner_loss=lambda *a: (p.inner_loss(*a)[0].item(), {})),
        "inner loss is a float",
    ),
    "a class of ours": (lambda p: replace(p, optimizer=SGD), "SGD is a class"),
    "a class of torch": (lambda p: replace(p, optimizer=torch.optim.Adam), "Adam is a class"),
    "a wrapped class": (lambda p: replace(p, optimizer=lambda hyper: Clipped(SGD, 1.0)), "SGD is a class"),
    "a group's class": (lambda p: replace(p, optimizer=Grouped(lambda name: SGD)), "SGD is a class"),
    "a batch of inference mode": (_with_batches_of_inference, "inner batch was made under torch.inference_mode"),
}


@pytest.mark.outside(48)
@pytest.mark.parametrize("case", WRONG_KIND)
def test_an_input_of_the_wrong_kind_is_one_clear_error(case) -> None:
    spoil, message = WRONG_KIND[case]
    checkers = {"verify": partial(verify, adjoint), "audit": audit, "horizon": horizon, "rollout": rollout}
    for name, estimator in (ESTIMATORS | checkers).items():
        if name in ("higher", "implicit") and "group" in case:
            continue  # takes no groups
        with pytest.raises(ValueError, match=message):
            estimator(spoil(learned_loss_problem()))


@pytest.mark.outside(48)
def test_inference_mode_is_refused_and_a_number_is_no_outer_loss_but_for_evolution() -> None:
    problem = learned_loss_problem(steps=2)
    number = replace(problem, outer_loss=lambda *arguments: float(problem.outer_loss(*arguments)))
    for name, estimator in ESTIMATORS.items():
        with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
            estimator(problem)
        if name != "evolution":
            with pytest.raises(ValueError, match="outer loss is a float"):
                estimator(number)
    torch.testing.assert_close(
        ESTIMATORS["evolution"](number).grads, ESTIMATORS["evolution"](problem).grads, rtol=1e-4, atol=1e-5
    )
