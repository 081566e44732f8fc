"""The forms of a learned loss over logits: invariants, bounds, and that the bi-level engine is right on them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from lkd.core.outputs import Outputs
from lkd.losses import DecoupledLoss, FeatureLoss, GenericLoss, LearnedLoss
from lkd.losses.dkd import DecoupledDivergences, DKDLoss
from lkd.losses.learned.forms import FORMS
from lkd.losses.learned.loss import build_learned_loss, reference_logits
from lkd.losses.learned.networks import KNOWN_CONDITIONING, Perceptron
from lkd.losses.learned.trust import TrustFigures
from meta import ESTIMATORS, Problem, State, call_module, verify
from meta.optim import SGD
from tests.lkd.test_invariances import wander

CONDITIONING = [list(KNOWN_CONDITIONING), ["progress", "state"], ["progress"], ["state"], []]


def total(loss: nn.Module, student: Tensor, teacher: Tensor, target: Tensor, progress: float | None = 0.3) -> Tensor:
    return torch.stack(list(loss(Outputs(student, {}), Outputs(teacher, {}), target, progress).values())).sum()


def gradient(loss: nn.Module, student: Tensor, *rest) -> Tensor:
    student = student.detach().requires_grad_()
    return torch.autograd.grad(total(loss, student, *rest), student)[0]


@st.composite
def batches(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    classes, size = draw(st.sampled_from([2, 3, 10, 40])), draw(st.integers(1, 6))
    scale = draw(st.sampled_from([0.1, 3.0, 40.0]))
    student, teacher = (scale * torch.randn(size, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    if draw(st.booleans()):
        return student, teacher, torch.randint(classes, (size,), generator=generator)
    return student, teacher, torch.randn(size, classes, generator=generator, dtype=torch.float64).softmax(1)


@settings(max_examples=30, deadline=None)
@given(
    batch=batches(),
    form=st.sampled_from(sorted(FORMS)),
    conditioning=st.sampled_from(CONDITIONING),
    normalize=st.booleans(),
    lipschitz=st.sampled_from([0.0, 2.0]),
    seed=st.integers(0, 1000),
)
def test_every_form_keeps_its_invariants(batch, form, conditioning, normalize, lipschitz, seed) -> None:
    options = {"form": form, "conditioning": conditioning, "lipschitz": lipschitz, "normalize_gradient": normalize}
    options |= {"linear": True} if form == "decoupled" and not lipschitz else {}
    loss = wander(build_learned_loss("logits", options), seed=seed)
    if seed % 2:
        loss.tell(TrustFigures(0.7, 0.5, 3.0, 40.0, 0.2))
    student, teacher, target = batch
    value, slope = total(loss, *batch).detach(), gradient(loss, *batch)
    assert torch.isfinite(slope).all()
    assert value > -1e-12
    torch.testing.assert_close(slope.sum(1), torch.zeros(len(student), dtype=torch.float64), rtol=0, atol=1e-8)
    order = torch.randperm(student.shape[1], generator=torch.Generator().manual_seed(seed))
    relabelled = target[:, order] if target.is_floating_point() else order.argsort()[target]
    permuted = student[:, order] + 7.5, teacher[:, order] - 3.25, relabelled
    torch.testing.assert_close(total(loss, *permuted), value)
    torch.testing.assert_close(gradient(loss, *permuted), slope[:, order], rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("conditioning", CONDITIONING)
def test_conditioning_says_what_is_seen(form: str, conditioning: list[str]) -> None:
    plain = {"warmup": 0.0, "linear": len(conditioning) % 2 == 0} if form == "decoupled" else {}
    part = wander(FORMS[form](conditioning=conditioning, **plain))
    student, other, teacher = (3 * torch.randn(20, 10, dtype=torch.float64) for _ in range(3))
    target = torch.randint(10, (20,))
    same = torch.equal(total(part, student, teacher, target, 0.0), total(part, student, teacher, target, 1.0))
    assert same == ("progress" not in conditioning)
    weight, temperature = part.weights_and_temperatures(student, teacher, target, 0.5)
    assert ((weight > 0) & (weight < 1) & (temperature > 1) & (temperature < part.maximal_temperature)).all()
    moved, _ = part.weights_and_temperatures(other, teacher, target, 0.5)
    assert torch.equal(weight, moved) == ("state" not in conditioning)
    part.trust = torch.tensor(TrustFigures(0.7, 0.5, 3.0, 40.0, 0.2))
    told, _ = part.weights_and_temperatures(student, teacher, target, 0.5)
    assert torch.equal(weight, told) == (not part.reads_trust)
    assert part.architecture["conditioning"] == conditioning
    with pytest.raises(ValueError, match=r"conditioning: .*weather.* is not a list of some of progress, state"):
        FORMS[form](conditioning=["weather"])


def test_every_form_starts_where_it_says() -> None:
    student, teacher, target = 3 * torch.randn(9, 5), 3 * torch.randn(9, 5), torch.randint(5, (9,))
    start = {"initial_weight": 0.3, "initial_temperature": 2.5}
    for warmup, progress in ((0.6, 0.0), (0.6, 0.3), (0.6, 0.9), (0.0, 0.0), (0.6, None)):
        dkd = DKDLoss(task=1.4, alpha=0.6, beta=0.6, temperature=2.5, warmup=warmup)
        expected = sum(dkd(Outputs(student, {}), Outputs(teacher, {}), target, progress).values())
        for linear in (False, True):
            part = DecoupledLoss(**start, warmup=warmup, linear=linear)
            torch.testing.assert_close(total(part, student, teacher, target, progress), expected)
    with pytest.raises(ValueError, match=r"lipschitz: 2.0 does not go with linear: true"):
        DecoupledLoss(lipschitz=2.0, linear=True)
    mixture = 0.3 * (teacher / 2.5).softmax(1) + 0.7 * nn.functional.one_hot(target, 5)
    divergence = nn.functional.kl_div(student.log_softmax(1), mixture, reduction="batchmean")
    torch.testing.assert_close(total(GenericLoss(**start), student, teacher, target), divergence)


@pytest.mark.parametrize(
    "loss",
    [
        wander(DecoupledLoss()),
        wander(GenericLoss()),
        wander(FeatureLoss()),
        wander(build_learned_loss("logits", {"normalize_gradient": True})),
        DKDLoss(),
    ],
    ids=["decoupled", "generic", "features", "learned", "dkd"],
)
def test_without_progress_every_part_of_a_loss_is_as_at_the_end_and_outside_of_a_training_it_is_refused(loss) -> None:
    student, teacher = (Outputs(3 * x, {"stage": x[:, :, None, None]}) for x in torch.randn(2, 9, 5))
    target = torch.randint(5, (9,))
    ask = lambda *progress: sum(loss(student, teacher, target, *progress).values())  # noqa: E731
    assert torch.equal(ask(), ask(1.0))
    assert not torch.equal(ask(), ask(0.0))
    assert torch.equal(ask(torch.tensor(0.25)), ask(0.25))
    for progress in (-1e-3, 1.001, math.nan, 7, torch.tensor(1.5), torch.tensor(math.nan)):
        with pytest.raises(ValueError, match=r"progress: .* is not in \[0, 1\]"):
            ask(progress)
    mapped = torch.func.vmap(ask)(torch.tensor([0.25, 1.0]))  # a value that is not there is not looked at
    torch.testing.assert_close(mapped, torch.stack([ask(0.25), ask(1.0)]))


@pytest.mark.parametrize("classes", [2, 4])
def test_closed_forms_have_all_derivatives(classes: int) -> None:
    """Against finite differences."""
    student, teacher = (2 * torch.randn(3, classes, dtype=torch.float64, requires_grad=True) for _ in range(2))
    temperatures = [(1 + torch.rand(3, dtype=torch.float64)).requires_grad_() for _ in range(2)]
    label = torch.randint(classes, (3,))
    inputs = student, teacher, *temperatures

    def decoupled(*x: Tensor) -> tuple[Tensor, ...]:
        return DecoupledDivergences.apply(*x, label)

    assert torch.autograd.gradcheck(decoupled, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(decoupled, inputs)
    for alone in (0, 2, 3):  # and where not all inputs have a slope
        points = [x if place == alone else x.detach() for place, x in enumerate(inputs)]
        assert torch.autograd.gradcheck(lambda *x: decoupled(*x)[:2], points)


def test_a_compiled_loss_takes_any_progress() -> None:
    loss, graphs = build_learned_loss("logits", {}), []
    compiled = torch.compile(loss, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    batch = torch.randn(6, 5), torch.randn(6, 5), torch.randint(5, (6,))
    for progress in (0.0, 0.3, 0.6, 0.9):
        torch.testing.assert_close(total(compiled, *batch, progress), total(loss, *batch, progress))
    assert len(graphs) == 2, "one for the first number, one for all others"


@pytest.mark.parametrize("form", FORMS)
def test_normalizing_fixes_the_gradient_norm_at_the_reference(form: str) -> None:
    """Against autograd through cross-entropy: whatever the weights, and at every progress."""
    student, teacher, target = reference_logits()
    expected = torch.autograd.grad(nn.functional.cross_entropy(student.requires_grad_(), target), student)[0].norm()
    for seed, progress in ((0, 0.0), (1, 0.7), (2, 1.0)):
        loss = wander(build_learned_loss("logits", {"form": form, "normalize_gradient": True}), 1.0, seed)
        torch.testing.assert_close(gradient(loss, student, teacher, target, progress).norm(), expected)
        plain = wander(build_learned_loss("logits", {"form": form}), 1.0, seed)
        assert (gradient(plain, student, teacher, target, progress).norm() / expected - 1).abs() > 1e-3


def test_the_lipschitz_bound_holds_for_any_weights() -> None:
    points = torch.randn(50, 4, dtype=torch.float64)

    def largest_slope(network: nn.Module) -> float:
        jacobians = torch.stack([torch.autograd.functional.jacobian(network, point) for point in points])
        return float(torch.linalg.matrix_norm(jacobians, 2).max())

    for size in (0.1, 1.0, 30.0):
        assert largest_slope(wander(Perceptron(4, 8, 2, lipschitz=3.0), size)) < 3.0
    assert largest_slope(wander(Perceptron(4, 8, 2), 2.0)) > 3.0


class Student(nn.Module):
    """A tiny float64 student over ten inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    def forward(self, x: Tensor) -> Outputs:
        return Outputs(self.body(x), {})


def bilevel_problem(loss: LearnedLoss, student: nn.Module, steps: int = 4):
    """The student's training with the loss, scored by cross-entropy, as every estimator takes it."""

    def inner_loss(parameters, buffers, hyper, batch):
        inputs, teacher, target, progress = batch
        outputs, buffers = call_module(student, parameters, buffers, inputs)
        terms = functional_call(loss, hyper, (outputs, teacher, target, progress))
        return torch.stack(list(terms.values())).sum(), buffers

    def outer_loss(parameters, buffers, batch):
        return nn.functional.cross_entropy(call_module(student, parameters, buffers, batch[0])[0].logits, batch[1])

    def draw():
        return torch.randn(7, 6, dtype=torch.float64), torch.randint(3, (7,))

    inner = []
    for step in range(steps):
        inputs, target = draw()
        inner.append((inputs, Outputs(3 * torch.randn(7, 3, dtype=torch.float64), {}), target, step / steps))
    state = State({name: p.detach() for name, p in student.named_parameters()}, {}, {})
    hyper = {name: parameter.detach() for name, parameter in loss.named_parameters()}
    return Problem(inner_loss, outer_loss, state, hyper, inner, draw(), SGD(0.3, momentum=0.9))


@pytest.mark.parametrize("options", [{"normalize_gradient": True}, {"lipschitz": 4.0}], ids=["norm", "lip"])
@pytest.mark.parametrize("form", FORMS)
def test_hypergradients_of_every_form_are_right(form: str, options) -> None:
    """In float64 against central differences; and two estimators that share no code agree."""
    loss = wander(build_learned_loss("logits", {"form": form, "hidden": 4, **options}))
    problem = bilevel_problem(loss, Student())
    assert verify(ESTIMATORS["adjoint"], problem).relative_error < 1e-6
    exact, tracked = (ESTIMATORS[name](problem) for name in ("adjoint", "higher"))
    torch.testing.assert_close(tracked.grads, exact.grads, rtol=1e-7, atol=1e-11)
    assert exact.norm > 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("classes", "normalize"), [(2, False), (1000, True)])
def test_gradients_and_their_derivatives_stay_finite_at_extreme_gaps(form: str, classes: int, normalize: bool) -> None:
    """In float32, with logits 1e4 apart, in agreement and against each other, also through the second derivative."""
    loss = wander(build_learned_loss("logits", {"form": form, "normalize_gradient": normalize})).float()
    drawn = 1e4 * torch.randn(6, classes)
    target = torch.randint(classes, (6,))
    for teacher in (drawn, -drawn, torch.zeros_like(drawn)):
        for student in (drawn, torch.zeros_like(drawn), torch.full_like(drawn, 3.0).index_fill_(1, target[:1], 1e4)):
            student = student.clone().requires_grad_()
            (slope,) = torch.autograd.grad(total(loss, student, teacher, target), student, create_graph=True)
            assert torch.isfinite(slope).all()
            assert slope.norm() < 1e3
            mixed = torch.autograd.grad(
                (slope * torch.randn_like(slope)).sum(), [student, *loss.parameters()], allow_unused=True
            )
            assert all(torch.isfinite(tensor).all() for tensor in mixed if tensor is not None)


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        ("generic", {"maximal_factor": 1.0}, "maximal_factor: 1.0"),
        ("generic", {"initial_weight": 0.0}, "initial_weight: 0.0"),
        ("decoupled", {"initial_temperature": 1.0}, "initial_temperature: 1.0"),
        ("decoupled", {"warmup": 1.5}, "warmup: 1.5"),
        ("decoupled", {"fades": "false"}, "fades: 'false' is neither true nor false"),
        ("decoupled", {"hidden": 0}, "hidden: 0"),
        ("decoupled", {"lipschitz": -1.0}, "lipschitz: -1.0"),
    ],
)
def test_impossible_options_are_refused(form: str, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FORMS[form](**options)
