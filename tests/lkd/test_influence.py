"""Influence of training examples: against retraining, against the bi-level engine, against loops of backward passes."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lkd.config import InfluenceSettings
from lkd.core.errors import UserError
from lkd.core.outputs import Outputs
from lkd.core.statistics import spearman
from lkd.data import ImageSet
from lkd.influence.influence import measure_influence
from lkd.influence.weighted_loss import weigh_examples
from lkd.losses import CrossEntropyLoss, KDLoss
from lkd.losses.functions import calibrated_cross_entropy
from lkd.models import build
from lkd.models.teacher import Teacher

CPU = torch.device("cpu")
TRAIN, CLASSES, DAMPING = 24, 3, 0.05
PLAIN = {"method": "gradient_similarity", "objective": "cross_entropy"}
OBJECTIVES = {"cross_entropy": cross_entropy, "calibrated_cross_entropy": calibrated_cross_entropy}


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


def validation_loss(network, score=cross_entropy) -> torch.Tensor:
    return score(network(META_VALIDATION.normalize(META_VALIDATION.images)).logits, META_VALIDATION.labels)


def train(weights=None, decay: float = DAMPING) -> Network:
    """The minimum of the weighted mean cross-entropy plus an L2 penalty."""
    torch.manual_seed(0)
    network = Network()
    weights = torch.ones(TRAIN, dtype=torch.float64) if weights is None else weights
    optimizer = torch.optim.LBFGS(
        network.parameters(), max_iter=500, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def objective():
        optimizer.zero_grad()
        losses = cross_entropy(network(IMAGES.normalize(IMAGES.images)).logits, IMAGES.labels, reduction="none")
        penalty = sum(parameter.square().sum() for parameter in network.parameters())
        total = (weights * losses).mean() + decay / 2 * penalty
        total.backward()
        return total

    optimizer.step(objective)
    return network


def measure(network, loss=None, teacher=None, train_images=IMAGES, meta_validation=META_VALIDATION, **settings):
    return measure_influence(
        network, loss or CrossEntropyLoss(), teacher, train_images, meta_validation, CPU, InfluenceSettings(**settings)
    )


@pytest.fixture(scope="module")
def retrained() -> dict[str, torch.Tensor]:
    """N · ∂(validation loss of the retrained network)/∂w_i, by central differences."""
    found = []
    for i in range(TRAIN):
        values = []
        for change in (1e-3, -1e-3):
            weights = torch.ones(TRAIN, dtype=torch.float64)
            weights[i] += change
            network = train(weights)
            values.append([float(validation_loss(network, score).detach()) for score in OBJECTIVES.values()])
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
        {"method": "lissa", "iterations": 200, "step_size": 0.4},
    ],
    ids=str,
)
def test_influence_is_what_retraining_shows(settings, retrained) -> None:
    settings = {"objective": "cross_entropy", **settings}
    found = measure(train(), damping=DAMPING, **settings)
    assert torch.equal(found.index, IMAGES.index)
    torch.testing.assert_close(found.scores, retrained[settings["objective"]], rtol=3e-3, atol=5e-4)


def test_gradient_similarity_is_another_thing(retrained) -> None:
    found = measure(train(), method="gradient_similarity", objective="cross_entropy")
    assert not torch.allclose(found.scores, retrained["cross_entropy"], rtol=0.1)


def test_the_bilevel_engine_gives_the_same_number_at_a_fixed_point() -> None:
    network = train(decay=0.0)
    exact = measure(network, method="exact", damping=1e-9)
    engine = measure(network, method="bilevel", iterations=200, step_size=0.8)
    torch.testing.assert_close(engine.scores.double(), exact.scores, rtol=1e-3, atol=1e-4)


def test_scores_are_those_of_a_loop_of_backward_passes() -> None:
    """A network with convolutions and BatchNorm, a loss with a teacher, the plain inner product."""
    images, meta_validation = draw_images(6, 2, 8), draw_images(5, 3, 8)
    student, teacher = build("small_cnn", 3, 1), Teacher(build("small_cnn", 3, 1))
    student(images.normalize(images.images))  # running statistics
    loss = KDLoss(0.7, 3.0)
    found = measure(student, loss, teacher, images, meta_validation, **PLAIN, batch_size=4)
    assert student.training
    student.eval()
    parameters = list(student.parameters())
    outputs = student(meta_validation.normalize(meta_validation.images))
    direction = torch.autograd.grad(cross_entropy(outputs.logits, meta_validation.labels), parameters)
    for position in range(6):
        batch = images.batch(torch.tensor([position]), CPU)
        total = sum(loss(student(batch.images), teacher(batch), batch.target).values())
        gradient = torch.autograd.grad(total, parameters)
        expected = -sum(float((a * b).sum()) for a, b in zip(direction, gradient, strict=True))
        assert float(found.scores[position]) == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("method", ["exact", "conjugate_gradient"])
def test_damping_is_raised_where_the_hessian_is_not_positive(method: str) -> None:
    torch.manual_seed(1)
    network = Network(hidden=6)
    found = measure(network, method=method, curvature="hessian", damping=0.0, iterations=40)
    assert found.least_curvature < 0 < found.damping
    assert found.scores.isfinite().all()
    plain = measure(network, method=method, damping=0.01, iterations=40)
    assert plain.damping == 0.01
    assert plain.least_curvature > -1e-6


def test_ekfac_ranks_as_the_exact_inverse_does() -> None:
    pytest.importorskip("kronfluence")
    torch.manual_seed(0)
    images, meta_validation = draw_images(200, 4), draw_images(50, 5)
    network = Network(precision=torch.float32)
    ekfac = measure(network, train_images=images, meta_validation=meta_validation, method="ekfac")
    exact = measure(network, train_images=images, meta_validation=meta_validation, method="exact", damping=0.01)
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


def test_the_exponential_form_spans_e_squared() -> None:
    weights = weigh_examples(torch.tensor([1.0, 5.0, 2.0]), InfluenceSettings(weights="exponential"))
    assert float(weights.max() / weights.min()) == pytest.approx(math.e**2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parameters": "tail"}, "no parameter's name begins with 'tail'"),
        ({"method": "lissa", "step_size": 1e200, "iterations": 5}, "lissa diverged at step size 1e\\+200"),
    ],
)
def test_what_cannot_be_is_said(settings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        measure(Network(), **settings)


def test_influence_needs_meta_validation_images() -> None:
    with pytest.raises(UserError, match="there are no meta-validation images"):
        measure(Network(), meta_validation=META_VALIDATION.select(torch.tensor([], dtype=torch.int64)))


def test_the_dense_inverse_is_for_few_parameters() -> None:
    images = draw_images(6, 2, 8)
    with pytest.raises(UserError, match="at most 2,000 parameters, not 6,"):
        measure(build("small_cnn", 3, 1), train_images=images, meta_validation=images, method="exact")
