"""Influence of training examples, against retraining and loops of backward passes; losses that it weighs."""

import copy
import csv
import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lkd.cli import main
from lkd.config import DataRecipe, InfluenceSettings, ModelRecipe, TeacherRecipe, TrainRecipe
from lkd.core.errors import UserError
from lkd.core.outputs import Outputs
from lkd.core.statistics import area_under_curve, spearman
from lkd.core.tensor_files import digest
from lkd.data import ImageSet
from lkd.data.label_noise import add_label_noise
from lkd.influence.influence import Influence, measure_influence
from lkd.influence.solvers import InfluenceProblem
from lkd.influence.weighted_loss import load_weights, save_weights, weigh_examples
from lkd.losses import CrossEntropyLoss, KDLoss
from lkd.losses.build import build_loss
from lkd.losses.functions import calibrated_cross_entropy, find_best_temperature
from lkd.models import build
from lkd.models.files import save_network
from lkd.models.teacher import Teacher
from lkd.training.build import prepare_images
from lkd.training.distill import label_by_teacher
from tests.lkd.parts import prepare_loss, prepare_teacher, start_training

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
    return measure_influence(
        network, loss or CrossEntropyLoss(), teacher, train_images, meta_validation, CPU, InfluenceSettings(**settings)
    )


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
    images = draw_images(6, 2, 8)
    with pytest.raises(UserError, match="at most 2,000 parameters, not 6,"):
        measure(build("small_cnn", 3, 1), train_images=images, meta_validation=images, method="exact")


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


# A loss with a weight for every example: its gradient, its training, its file, its command.

TEACHER = TeacherRecipe(path="random", name="small_cnn")
SMALL = {"iterations": 2, "curvature_examples": 50}
WEIGHTED = {"name": "influence_weighted", "loss": "kd", "first_epoch": 1, "influence": SMALL}


@pytest.fixture(scope="module")
def images():
    return prepare_images(DataRecipe(train_size=200, meta_validation_size=100, label_noise=0.2))


@pytest.mark.parametrize("weigh", ["task", "loss"])
def test_a_loss_of_labels_alone_needs_no_teacher(images, weigh: str) -> None:
    loss = prepare_loss(
        {"name": "influence_weighted", "loss": "cross_entropy", "weigh": weigh}, ModelRecipe(), TEACHER, images, 0
    )
    assert not loss.needs_teacher
    loss.enroll(images.train.index, images.train.labels)
    logits, index, labels = torch.randn(6, 10), images.train.index[:6], images.train.labels[:6]
    terms = loss(Outputs(logits, {}), None, labels, 0.5, index)
    torch.testing.assert_close(sum(terms.values()), torch.nn.functional.cross_entropy(logits, labels))


@pytest.mark.parametrize("weigh", ["task", "loss"])
@pytest.mark.parametrize("name", ["cross_entropy", "kd", "dkd", "logit_mse", "logit_standardization"])
def test_the_gradient_is_that_of_the_weighted_mean(images, name: str, weigh: str) -> None:
    settings = {"name": "influence_weighted", "loss": name, "weigh": weigh}
    loss = prepare_loss(settings, ModelRecipe(), TEACHER, images, 0)
    index, labels = images.train.index[:6], images.train.labels[:6]
    loss.enroll(images.train.index, images.train.labels)
    weights = torch.rand(6)
    loss.set_weights(index, weights)
    student, teacher = torch.randn(6, 10, requires_grad=True), torch.randn(6, 10)
    sum(loss(Outputs(student, {}), Outputs(teacher, {}), labels, 0.5, index).values()).backward()
    plain, single = build_loss(name), student.detach().requires_grad_()
    for i in range(6):
        row = slice(i, i + 1)
        terms = plain(Outputs(single[row], {}), Outputs(teacher[row], {}), labels[row], 0.5)
        for term, value in terms.items():
            ((weights[i] if weigh == "loss" or term == "task" else 1) * value / 6).backward(retain_graph=True)
    torch.testing.assert_close(student.grad, single.grad)


def start(images):
    loss = prepare_loss(WEIGHTED, ModelRecipe(), TEACHER, images, 0)
    torch.manual_seed(0)
    teacher = Teacher(build("small_cnn", 10, 1))
    train = TrainRecipe(epochs=3, batch_size=50, learning_rate=0.1)
    return start_training(ModelRecipe(), images.train, loss, teacher, train, DataRecipe(), 3, CPU)


@pytest.mark.parametrize(("first", "every", "due"), [(1, 2, [1, 3, 5]), (1, 0, [1]), (0, 3, [0, 3, 6])])
def test_influence_is_measured_every_so_many_epochs(
    images, first: int, every: int, due: list[int], monkeypatch
) -> None:
    settings = {**WEIGHTED, "first_epoch": first, "refresh_epochs": every}
    loss, measured = prepare_loss(settings, ModelRecipe(), TEACHER, images, 0), []
    loss.enroll(images.train.index, images.train.labels)

    def measure(*_, **__):
        measured.append(epoch)
        return Influence(images.train.index, torch.randn(len(images.train)), 0.1, 1.0, 0.0)

    monkeypatch.setattr("lkd.influence.weighted_loss.measure_influence", measure)
    student = build("small_cnn", 10, 1)
    for epoch in range(7):
        loss.begin_epoch(epoch, student, images.train, Teacher(student), epoch / 7)
    assert measured == due


def test_weights_come_when_they_are_due(images) -> None:
    training = start(images)
    for step in range(6):
        training.run_step()
        assert bool((training.loss.weight == 1).all()) == (step < 4)
    assert float(training.loss.weight.mean()) == pytest.approx(1, rel=1e-5)


def test_a_teacher_s_rate_counts_under_adam_too(images) -> None:
    loss = prepare_loss({**WEIGHTED, "teacher_rate": 0.1}, ModelRecipe(), TEACHER, images, 0)
    teacher = prepare_teacher(TEACHER, DataRecipe(), images, CPU)
    train = TrainRecipe(1, 50, learning_rate=0.01, optimizer="adam", weight_decay=0.0)
    training = start_training(ModelRecipe(), images.train, loss, teacher, train, DataRecipe(), 3, CPU)
    before = copy.deepcopy(training.loss.teacher)
    training.run_step()
    moved = [
        float((new - old).abs().max()) for old, new in zip(before.parameters(), loss.teacher.parameters(), strict=True)
    ]
    assert max(moved) == pytest.approx(0.1 * 0.01, rel=1e-3)


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
def test_a_transformer_has_influence_too(images, curvature: str) -> None:
    network = build("vit_tiny_patch16_224", 10, 1, options={"img_size": 28, "patch_size": 7, "depth": 1})
    settings = InfluenceSettings(curvature=curvature, iterations=2, curvature_examples=20)
    few = images.train.select(torch.arange(20))
    found = measure_influence(network, build_loss("cross_entropy"), None, few, few, CPU, settings)
    assert bool(found.scores.isfinite().all())
    assert float(found.scores.std()) > 0


def test_no_curvature_is_damped_and_what_is_no_number_is_said(images) -> None:
    network = build("small_cnn", 10, 1)
    few = images.train.select(torch.arange(20))
    bright = replace(few, images=1e6 * few.images.float())  # saturated: no second derivative is left
    settings = InfluenceSettings(damping=0.0, iterations=2)
    found = measure_influence(network, build_loss("cross_entropy"), None, bright, few, CPU, settings)
    assert found.damping > 0
    assert bool(found.scores.isfinite().all())
    list(network.parameters())[-1].data[3] = float("nan")
    with pytest.raises(UserError, match=r"influence: .* not"):
        measure_influence(network, build_loss("cross_entropy"), None, few, few, CPU, settings)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_teacher_is_trained_along_on_the_weighted_labels_and_the_student_as_if_it_were_not(images, parts) -> None:
    def start_together(rate: float):
        loss = prepare_loss({**WEIGHTED, "teacher_rate": rate}, ModelRecipe(), TEACHER, images, 0)
        train = TrainRecipe(2, 50, learning_rate=0.1, weight_decay=0.0, momentum=0.0, accumulation=parts)
        teacher = prepare_teacher(TEACHER, DataRecipe(augmentation="flip_and_crop"), images, CPU)
        return start_training(ModelRecipe(), images.train, loss, teacher, train, DataRecipe(), 3, CPU)

    together, alone = start_together(0.1), start_together(0.0)
    before = copy.deepcopy(together.loss.teacher)
    batch = together.batches.at(0)
    weights = torch.rand(50)
    for training in (together, alone):
        training.loss.begin_epoch = lambda *_: None
        training.loss.set_weights(batch.index, weights)
    losses = cross_entropy(before(batch.images).logits, batch.target, reduction="none")
    expected = torch.autograd.grad((weights * losses).sum() / 50, list(before.parameters()))
    terms = together.run_step()
    for gradient, old, new in zip(expected, before.parameters(), together.loss.teacher.parameters(), strict=True):
        torch.testing.assert_close(new, old - 0.1 * 0.1 * gradient)
    torch.testing.assert_close(terms["teacher/task"], losses.mean().detach())
    alone.run_step()
    assert digest(together.student.state_dict()) == digest(alone.student.state_dict())


def test_only_the_labels_that_are_known_are_kept(images) -> None:
    teacher = Teacher(build("small_cnn", 10, 1))
    found = label_by_teacher(images, 50, teacher, CPU).train
    batch = images.train.batch(torch.arange(200), CPU)
    given = found.labels == images.train.labels
    taught = found.labels == teacher(batch).logits.argmax(1)
    assert (given | taught).all()
    assert int(taught.sum()) >= 150
    assert int(given.sum()) >= 50
    assert not given.all()
    with pytest.raises(UserError, match="labelled_size: 201 is not between 0"):
        label_by_teacher(images, 201, teacher, CPU)


@pytest.mark.parametrize("favour", ["helpful", "harmful"])
def test_the_command_writes_what_the_loss_reads(images, tmp_path, favour: str) -> None:
    architecture = {"name": "small_cnn", "num_classes": 10, "in_chans": 1}
    save_network(tmp_path / "n.safetensors", build(**architecture), architecture, {})
    data = ["--data.train_size", "200", "--data.meta_validation_size", "100", "--data.label_noise", "0.2"]
    words = [*data, "--influence.iterations", "3", "--influence.favour", favour, "--run_dir", "r"]
    words += ["--checkpoint", str(tmp_path / "n.safetensors")]
    assert main(["influence", *words]) == 0
    rows = list(csv.DictReader(Path("r/influence.csv").read_text().splitlines()))
    influences = [float(row["influence"]) for row in rows]
    assert len(rows) == 200
    assert influences == sorted(influences)
    index, weights, _ = load_weights(Path("r/weights.safetensors"))
    by_index = dict(zip(index.tolist(), weights.tolist(), strict=True))
    for row in rows:
        assert float(row["weight"]) == pytest.approx(by_index[int(row["index"])], rel=1e-4)
        assert int(images.train.labels[int(row["position"])]) == int(row["label"])
    assert Path("r/influence.png").stat().st_size > 5000
    issues = list(csv.DictReader(Path("r/label_issues.csv").read_text().splitlines()))
    assert {"is_label_issue", "label_quality", "given_label", "predicted_label"} < issues[0].keys()
    flags = [row["is_label_issue"] for row in issues]
    assert flags == sorted(flags, reverse=True)  # "True" before "False"
    harm = {row["position"]: float(row["influence"]) for row in rows}
    for row in issues:
        harmful = harm[row["position"]] > 0 and row["given_label"] != row["predicted_label"]
        assert row["is_label_issue"] == str(harmful)
    qualities = [float(row["label_quality"]) for row in sorted(issues, key=lambda row: harm[row["position"]])]
    assert qualities == sorted(qualities, reverse=True)  # whichever images get more weight
    page = Path("r/influence.html").read_text()
    assert page.count("data:image/png") == 48
    assert page.count("<polyline") == 2
    clean = prepare_images(DataRecipe(train_size=200, meta_validation_size=100)).train.labels
    wrong = [bool(clean[int(row["position"])] != int(row["label"])) for row in rows]
    area = area_under_curve(np.array([float(row["influence"]) for row in rows]), np.array(wrong))
    figures = json.loads(Path("r/result.json").read_text())["figures"]
    assert figures["auroc_of_wrong_labels"] == pytest.approx(area, abs=1e-3)
    loss = {"name": "influence_weighted", "loss": "kd", "weights": "r/weights.safetensors"}
    prepared = prepare_loss(loss, ModelRecipe(), TEACHER, images, 0)
    prepared.enroll(images.train.index, images.train.labels)
    assert prepared.weight.tolist() == [pytest.approx(by_index[int(i)]) for i in images.train.index]


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"los": "kd"}, "los.; nearest: loss"),
        ({"first_epoch": "one"}, "first_epoch: 'one'"),
        ({"influence": {"method": "newton"}}, "influence.method: .*conjugate_gradient.*newton"),
        ({"influence": 3}, "influence: .*3"),
        ({"weights": "none.safetensors"}, "none.safetensors: no such file"),
        ({"loss": "fitnet"}, "reads features"),
    ],
)
def test_bad_options_of_a_weighted_loss_are_one_line(images, loss, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare_loss({"name": "influence_weighted", **loss}, ModelRecipe(), TEACHER, images, 0)


def test_what_cannot_be_measured_is_said_before_the_first_epoch(images) -> None:
    wrong = {"parameters": "clasifier"}, {"method": "exact"}
    for settings, message in zip(wrong, ("no parameter's name begins with 'clasifier'", "exact inverts"), strict=True):
        loss = prepare_loss(WEIGHTED | {"first_epoch": 30, "influence": settings}, ModelRecipe(), TEACHER, images, 0)
        with pytest.raises(UserError, match=message):
            loss.begin_epoch(0, build("small_cnn", 10, 1), images.train, None, 0.0)


def test_weights_of_other_images_are_refused(images, tmp_path) -> None:
    save_weights(tmp_path / "w", images.train.select(torch.arange(7)), torch.ones(7), torch.ones(7), {})
    loss = {"name": "influence_weighted", "loss": "kd", "weights": str(tmp_path / "w")}
    prepared = prepare_loss(loss, ModelRecipe(), TEACHER, images, 0)
    with pytest.raises(UserError, match="has no weight for 193 of the 200 training images"):
        prepared.enroll(images.train.index, images.train.labels)
    moved = replace(images.train, images=images.train.images.roll(1, 0))
    for whole, refused in ((images.train, False), (moved, True)):
        save_weights(tmp_path / "w", whole, torch.ones(200), torch.ones(200), {})
        prepared = prepare_loss(loss, ModelRecipe(), TEACHER, images, 0)
        prepared.enroll(images.train.index, images.train.labels)
        asked = nn.Identity(), images.train.relabel(1 - images.train.labels.clamp_max(1)), None, 0.0
        with (
            pytest.raises(UserError, match="weights of other images than 200 of the 200") if refused else nullcontext()
        ):
            prepared.begin_epoch(0, *asked)
