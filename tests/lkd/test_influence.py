"""Influence of training examples, against retraining and loops of backward passes; losses that it weighs."""

import copy
import math
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lkd.config import InfluenceSettings
from lkd.core.errors import UserError
from lkd.core.outputs import Outputs
from lkd.core.statistics import area_under_curve, spearman
from lkd.data import ImageSet
from lkd.data.label_noise import add_label_noise
from lkd.influence.influence import Influence, measure_influence
from lkd.influence.solvers import RAISE, InfluenceProblem, Inverse, draw_examples
from lkd.influence.weighted_loss import weigh_examples
from lkd.losses import CrossEntropyLoss, KDLoss
from lkd.losses.functions import calibrated_cross_entropy, find_best_temperature
from lkd.models import build
from lkd.models.teacher import Teacher

CPU = torch.device("cpu")
TRAIN, CLASSES, DAMPING = 24, 3, 0.05
OBJECTIVES = ("cross_entropy", "calibrated_cross_entropy", "expected_error")


class Network(nn.Module):
    """With a hidden layer or not."""

    def __init__(self, hidden: int = 0, precision: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, hidden), nn.Tanh()) if hidden else nn.Identity()
        self.head = nn.Linear(hidden or 4, CLASSES)
        self.to(precision)

    def forward(self, images):
        return Outputs(self.head(self.body(images.flatten(1).to(self.head.weight.dtype))), {})


def draw_images(count: int, seed: int, size: int = 2) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 1, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return ImageSet(pixels, labels, 100 + torch.randperm(count, generator=generator), ("a", "b", "c"), (0.5,), (0.3,))


IMAGES, META_VALIDATION = draw_images(TRAIN, 0), draw_images(15, 1)


def score(network, images, objective: str, temperature: float = 1.0) -> torch.Tensor:
    """The objective on these images, at a temperature where it is held constant."""
    logits = network(images.normalize(images.images)).logits
    if objective == "calibrated_cross_entropy":
        return calibrated_cross_entropy(logits, images.labels)
    if objective == "expected_error":
        return 1 - (logits / temperature).softmax(1)[torch.arange(len(images)), images.labels].mean()
    return cross_entropy(logits, images.labels)


def find_temperature(network, images) -> float:
    return max(1.0, find_best_temperature(network(images.normalize(images.images)).logits.detach(), images.labels))


def train(weights=None, decay: float = DAMPING, images=IMAGES, start=None) -> Network:
    """The minimum of the weighted mean cross-entropy plus an L2 penalty."""
    torch.manual_seed(0)
    network = Network()
    if start:
        network.load_state_dict(start.state_dict())
    weights = torch.ones(len(images), dtype=torch.float64) if weights is None else weights
    optimizer = torch.optim.LBFGS(
        network.parameters(), max_iter=500, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def objective():
        optimizer.zero_grad()
        losses = cross_entropy(network(images.normalize(images.images)).logits, images.labels, reduction="none")
        penalty = sum(parameter.square().sum() for parameter in network.parameters())
        total = (weights * losses).mean() + decay / 2 * penalty
        total.backward()
        return total

    optimizer.step(objective)
    return network


def measure(network, loss=None, teacher=None, train_images=IMAGES, meta_validation=META_VALIDATION, **settings):
    parts = loss or CrossEntropyLoss(), teacher, train_images, meta_validation, CPU
    if settings.get("method") != "exact":
        return measure_influence(network, *parts, InfluenceSettings(**settings))
    del settings["method"]
    with mock.patch("lkd.influence.influence.solve_iteratively", solve_dense):
        return measure_influence(network, *parts, InfluenceSettings(**settings))


def solve_dense(problem: InfluenceProblem, start: list, settings: InfluenceSettings, seed: int) -> Inverse:
    """Invert the dense matrix, in float64."""
    batches = list(problem.load(problem.train, draw_examples(problem, settings, seed)))
    columns = []
    for unit in torch.eye(problem.size, dtype=start[0].dtype, device=start[0].device):
        product = problem.multiply_mean(split_like(unit, start), batches, settings.curvature)
        columns.append(join(product))
    matrix = torch.stack(columns).double()
    matrix = (matrix + matrix.T) / 2
    least = float(torch.linalg.eigvalsh(matrix)[0])
    damping = settings.damping
    while least + damping <= 0:
        damping = RAISE * max(damping, 1e-6)
    damped = matrix + damping * torch.eye(problem.size, dtype=torch.float64, device=matrix.device)
    solution = torch.linalg.solve(damped, join(start).double())
    return Inverse(split_like(solution.to(start[0].dtype), start), damping, least)


def join(vector: list) -> torch.Tensor:
    """A vector as one tensor, [P]."""
    return torch.cat([entry.flatten() for entry in vector])


def split_like(flat: torch.Tensor, vector: list) -> list:
    """The inverse of `join`."""
    parts = flat.split([entry.numel() for entry in vector])
    return [part.view_as(entry) for part, entry in zip(parts, vector, strict=True)]


@pytest.fixture(scope="module")
def retrained() -> dict[str, torch.Tensor]:
    """N · ∂(objective of the retrained network)/∂w_i, by central differences."""
    found, temperature = [], find_temperature(train(), META_VALIDATION)
    for i in range(TRAIN):
        values = []
        for change in (1e-3, -1e-3):
            weights = torch.ones(TRAIN, dtype=torch.float64)
            weights[i] += change
            network = train(weights)
            values.append([float(score(network, META_VALIDATION, name, temperature).detach()) for name in OBJECTIVES])
        upper, lower = torch.tensor(values, dtype=torch.float64)
        found.append(TRAIN * (upper - lower) / 2e-3)
    return dict(zip(OBJECTIVES, torch.stack(found, 1), strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "exact", "curvature": "hessian"},
        {"method": "conjugate_gradient", "curvature": "hessian"},
        {"method": "conjugate_gradient", "curvature": "gauss_newton", "batch_size": 7},
        {"method": "exact", "objective": "calibrated_cross_entropy"},
        {"method": "exact", "objective": "expected_error"},
        {"method": "conjugate_gradient", "objective": "expected_error"},
    ],
    ids=str,
)
def test_influence_is_what_retraining_shows(settings, retrained) -> None:
    settings = {"objective": "cross_entropy", **settings}
    found = measure(train(), damping=DAMPING, **settings)
    assert torch.equal(found.index, IMAGES.index)
    torch.testing.assert_close(found.scores, retrained[settings["objective"]], rtol=3e-3, atol=5e-4)


def test_unit_queries_have_gradients_of_norm_1() -> None:
    network, parts = train(), META_VALIDATION
    settings = InfluenceSettings(queries="unit")
    problem = InfluenceProblem(network, CrossEntropyLoss(), None, IMAGES, parts, CPU, settings)
    expected = torch.zeros(problem.size, dtype=torch.float64)
    for position in range(len(parts)):
        one = parts.select(torch.tensor([position]))
        found = torch.autograd.grad(score(network, one, "expected_error", problem.temperature), [*network.parameters()])
        flat = torch.cat([entry.flatten() for entry in found])
        expected += flat / flat.norm() / len(parts)
    torch.testing.assert_close(torch.cat([entry.flatten() for entry in problem.differentiate_validation()]), expected)


# Which wrong labels the objectives find, whatever the network's confidence: three blobs.


def draw_blobs(seed: int) -> ImageSet:
    """Three overlapping blobs of 100 points each, in four dimensions."""
    labels = torch.arange(300) % 3
    points = 1.65 * torch.eye(3, 4)[labels] + torch.randn(300, 4, generator=torch.Generator().manual_seed(seed))
    return ImageSet(points.view(300, 1, 2, 2), labels, torch.arange(300), ("a", "b", "c"), (0.0,), (1.0,))


@pytest.fixture(scope="module")
def blobs() -> list[tuple[ImageSet, ImageSet, torch.Tensor, Network]]:
    """Points with a fifth of the labels flipped, others, which are flipped, and a network; of three seeds."""
    found = []
    for seed in range(1, 4):
        clean, others = draw_blobs(seed), draw_blobs(100 + seed)
        noisy, _ = add_label_noise(clean, others, "symmetric", (0.2, 0.0), seed)
        found.append((noisy, others, noisy.labels != clean.labels, train(None, 0.01, noisy)))
    return found


@pytest.mark.parametrize(
    ("objective", "scale", "least", "most"),
    [
        ("cross_entropy", 1, 0.85, 1.0),
        ("cross_entropy", 6, 0.0, 0.3),
        ("expected_error", 1, 0.84, 1.0),
        ("expected_error", 2, 0.84, 1.0),
        ("expected_error", 6, 0.84, 1.0),
    ],
)
def test_the_expected_error_finds_flips_whatever_the_confidence(blobs, objective, scale, least, most) -> None:
    """Where plain cross-entropy turns with it. Predictions are the same at each scale of the head."""
    for noisy, others, flipped, network in blobs:
        sure = copy.deepcopy(network)
        for parameter in sure.parameters():
            parameter.data *= scale
        parts = {"train_images": noisy, "meta_validation": others}
        scores = measure(sure, **parts, method="exact", damping=0.01, objective=objective).scores
        assert least < area_under_curve(scores.numpy(), flipped.numpy()) < most


def test_the_change_by_leaving_a_point_out_is_foretold(blobs) -> None:
    for noisy, others, _, network in blobs[:2]:
        chosen, temperature, retrained = range(0, 300, 15), find_temperature(network, others), []
        for position in chosen:
            weights = torch.ones(300, dtype=torch.float64)
            weights[position] = 0
            retrained.append(train(weights, 0.01, noisy, network))
        parts = {"train_images": noisy, "meta_validation": others}
        for objective in ("cross_entropy", "expected_error"):
            scores = measure(network, **parts, method="exact", damping=0.01, objective=objective).scores
            before, *after = (score(each, others, objective, temperature).detach() for each in (network, *retrained))
            found = torch.stack([-scores[list(chosen)] / 300, torch.stack(after) - before])
            assert torch.corrcoef(found)[0, 1] >= 0.98


def test_scores_are_those_of_a_loop_of_backward_passes() -> None:
    """A network with convolutions and BatchNorm, a loss with a teacher; by the label or by the loss."""
    images, meta_validation = draw_images(6, 2, 8), draw_images(5, 3, 8)
    student, teacher = build("small_cnn", 3, 1), Teacher(build("small_cnn", 3, 1))
    student(images.normalize(images.images))  # running statistics
    loss, parameters = KDLoss(0.7, 3.0), list(student.parameters())
    for gradient in ("loss", "label"):
        settings = InfluenceSettings(objective="cross_entropy", gradient=gradient, batch_size=4)
        problem = InfluenceProblem(student.eval(), loss, teacher, images, meta_validation, CPU, settings)
        outputs = student(meta_validation.normalize(meta_validation.images))
        direction = torch.autograd.grad(cross_entropy(outputs.logits, meta_validation.labels), parameters)
        _, products = problem.project_gradients(problem.differentiate_validation())
        for position in range(6):
            batch = images.batch(torch.tensor([position]), CPU)
            total = cross_entropy(student(batch.images).logits, batch.target)
            if gradient == "loss":
                total = sum(loss(student(batch.images), teacher(batch), batch.target).values())
            found = torch.autograd.grad(total, parameters)
            expected = sum(float((a * b).sum()) for a, b in zip(direction, found, strict=True))
            assert float(products[position]) == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("method", ["exact", "conjugate_gradient"])
def test_damping_is_raised_where_the_hessian_is_not_positive(method: str) -> None:
    torch.manual_seed(1)
    network = Network(hidden=6)
    found = measure(network, method=method, curvature="hessian", damping=0.0, iterations=40)
    assert network.training, "its mode is restored"
    assert found.least_curvature < 0 < found.damping
    assert found.scores.isfinite().all()
    plain = measure(network, method=method, damping=0.01, iterations=40)
    assert plain.damping == 0.01
    assert plain.least_curvature > -1e-6


@pytest.mark.parametrize(("objective", "queries"), [("expected_error", "unit"), ("calibrated_cross_entropy", "mean")])
def test_ekfac_ranks_as_the_exact_inverse_does(objective: str, queries: str) -> None:
    pytest.importorskip("kronfluence")
    torch.manual_seed(0)
    parts = {"train_images": draw_images(200, 4), "meta_validation": draw_images(50, 5)}
    network, asked = Network(precision=torch.float32), {"objective": objective, "queries": queries}
    ekfac = measure(network, **parts, **asked, method="ekfac")
    exact = measure(network, **parts, **asked, method="exact", damping=0.01)
    assert torch.equal(ekfac.index, exact.index)
    assert spearman(ekfac.scores.numpy(), exact.scores.numpy()) > 0.9


@pytest.mark.parametrize("form", ["sigmoid", "exponential"])
def test_weights_have_mean_1_and_favour_what_they_should(form: str) -> None:
    influence = torch.tensor([-3.0, 0.5, 0.0, 2.0, -1.0])
    helpful = weigh_examples(influence, InfluenceSettings(weights=form))
    harmful = weigh_examples(influence, InfluenceSettings(weights=form, favour="harmful"))
    assert torch.equal(helpful.argsort(), influence.argsort(descending=True))
    assert torch.equal(harmful.argsort(), influence.argsort())
    for weights in (helpful, harmful):
        assert float(weights.mean()) == pytest.approx(1)
    assert torch.equal(weigh_examples(torch.full((3,), 2.0), InfluenceSettings(weights=form)), torch.ones(3))
    if form == "exponential":
        assert float(helpful.max() / helpful.min()) == pytest.approx(math.e**2)


def test_few_images_that_stand_out_are_no_wrong_labels() -> None:
    """Two groups are weighted with the whole sharpness, a few far out are not, and a part of it lies between."""
    normal = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    groups, few, some = normal.clone(), normal.clone(), normal.clone()
    groups[:300] += 5
    few[:20] += 15
    some[:50] += 6
    settings = InfluenceSettings()
    expected = torch.sigmoid(-3 * (groups - groups.mean()) / groups.std(correction=0))
    torch.testing.assert_close(weigh_examples(groups, settings), expected / expected.mean())
    assert torch.equal(weigh_examples(few, settings), torch.ones(1000))
    weights = weigh_examples(some, settings)
    assert 0 < float(weights[:50].mean()) < 0.9 < float(weights[50:].mean())


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(UserError, match="no parameter's name begins with 'tail'"):
        measure(Network(), parameters="tail")
    with pytest.raises(UserError, match="there are no meta-validation images"):
        measure(Network(), meta_validation=META_VALIDATION.select(torch.tensor([], dtype=torch.int64)))


def test_a_system_that_is_not_solved_is_warned_of(caplog) -> None:
    torch.manual_seed(1)
    measure(Network(hidden=6), iterations=1, damping=1e-6)
    assert "relative residual" in caplog.text
    assert "raise influence.iterations" in caplog.text


def test_ekfac_leaves_damaged_images_out_and_draws_by_the_seed(monkeypatch) -> None:
    pytest.importorskip("kronfluence")
    torch.manual_seed(0)
    train, network = draw_images(60, 4), Network(precision=torch.float32)
    read = ImageSet.batch
    monkeypatch.setattr(ImageSet, "batch", lambda images, at, device: read(images, at[images.index[at] != 7], device))

    def ask(seed: int) -> Influence:
        settings = InfluenceSettings(method="ekfac", curvature_examples=20, batch_size=16)
        return measure_influence(network, CrossEntropyLoss(), None, train, draw_images(20, 5), CPU, settings, seed=seed)

    first, again, other = ask(0), ask(0), ask(1)
    assert first.index.tolist() == [index for index in train.index.tolist() if index != 7]
    assert torch.equal(first.scores, again.scores)
    assert not torch.equal(first.scores, other.scores)
