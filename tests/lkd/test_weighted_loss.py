"""A loss with a weight for every example: its gradient, its training, its file, its command."""

import copy
import csv
import json
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
from lkd.core.statistics import area_under_curve
from lkd.core.tensor_files import digest
from lkd.influence.influence import Influence, measure_influence
from lkd.influence.weighted_loss import load_weights, save_weights
from lkd.losses.build import build_loss
from lkd.models import build
from lkd.models.files import save_network
from lkd.models.teacher import Teacher
from lkd.training.build import prepare_images
from lkd.training.distill import label_by_teacher
from tests.lkd.parts import prepare_loss, prepare_teacher, start_training

CPU = torch.device("cpu")

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
    settings = {"first_epoch": 30, "influence": {"parameters": "clasifier"}}
    loss = prepare_loss(WEIGHTED | settings, ModelRecipe(), TEACHER, images, 0)
    with pytest.raises(UserError, match="no parameter's name begins with 'clasifier'"):
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
