"""Trust: measured rightly, told to the loss, renewed while a student trains, and never a part of a loss's file."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import one_hot
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, Subset, SubsetRandomSampler, TensorDataset

import lkd
from lkd.config import DataRecipe, ModelRecipe, TeacherRecipe, TrainRecipe
from lkd.config.training import InfluenceWeightedLossSettings
from lkd.core import tensor_files
from lkd.core.outputs import Outputs
from lkd.core.plugins import MODULE
from lkd.core.tensor_files import digest
from lkd.influence.weighted_loss import InfluenceWeightedLoss
from lkd.losses.functions import find_best_temperature
from lkd.losses.learned.loss import LearnedLoss, ReplayedLoss, build_learned_loss
from lkd.losses.learned.networks import KNOWN_CONDITIONING
from lkd.losses.learned.trust import (
    OWN_ACCURACY,
    Trust,
    TrustFigures,
    find_contradicted,
    measure_own_accuracy,
    measure_trust,
)
from lkd.losses.loss import WrappedLoss
from lkd.training.answers import measure_teacher
from lkd.training.build import open_teacher, prepare_images
from lkd.training.introduce import introduce_teacher
from tests.lkd.parts import prepare_teacher, start_training
from tests.lkd.test_invariances import wander
from tests.lkd.tiny_images import write_image_folder

SEEN = list(KNOWN_CONDITIONING)
DATA = DataRecipe(train_size=200, meta_validation_size=150)
CPU = torch.device("cpu")
TRUST = TrustFigures(0.7, 0.5, 3.0, 40.0, 0.2)


def build_loss() -> LearnedLoss:
    torch.manual_seed(0)
    return wander(build_learned_loss("logits", {"conditioning": SEEN})).float()


def total(loss: nn.Module, student, teacher, target, progress=0.5) -> torch.Tensor:
    return sum(loss(Outputs(student, {}), Outputs(teacher, {}), target, progress).values())


class Table(nn.Module):
    """A teacher that reads its logits off the images."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def test_the_figures_are_those_counted_by_hand_and_a_scale_of_the_logits_is_their_temperature() -> None:
    logits = 3 * torch.randn(300, 4)
    labels = torch.distributions.Categorical(logits=logits / 2.5).sample()  # calibrated at 2.5
    wrong = torch.where(torch.rand(300) < 0.3, (labels + 1) % 4, labels)
    images = logits[:, None, None]
    parts = [DataLoader(TensorDataset(images, y), 70, drop_last=False) for y in (wrong, labels)]
    trust = lkd.measure_trust(Table(), *parts)
    agreed = [(logits.argmax(1) == y).double().mean().item() for y in (labels, wrong)]
    assert trust.figures[:2] == pytest.approx(agreed)
    assert trust.figures.temperature == pytest.approx(2.5, rel=0.3)
    assert trust.figures.images_per_class == 75
    assert math.isnan(measure_trust(Table(), list(parts[0]), parts[1]).figures.images_per_class), (
        "batches are no images"
    )
    assert math.isnan(trust.figures.own_accuracy)
    scaled = measure_trust(lambda x: 4 * Table()(x), *parts)
    assert scaled.figures.temperature == pytest.approx(4 * trust.figures.temperature, rel=0.02)
    assert measure_own_accuracy(Sequential(Table()), trust.looks) == pytest.approx(agreed[0])
    narrow = [[(x, y.int()) for x, y in part] for part in parts]
    with torch.inference_mode():
        again = measure_trust(Table(), *narrow).figures
    assert again._replace(images_per_class=75.0) == pytest.approx(trust.figures, nan_ok=True)
    smoothed = DataLoader(TensorDataset(images, 0.9 * one_hot(labels, 4) + 0.025), 4)  # as many as classes
    dense = measure_trust(Table(), parts[0], smoothed)
    assert dense.figures == pytest.approx(trust.figures, nan_ok=True)
    assert measure_own_accuracy(Sequential(Table()), dense.looks) == pytest.approx(agreed[0])
    elsewhere = MagicMock(**{"to.return_value": images, "__len__.return_value": 300})  # a network lies on a GPU
    assert measure_trust(Sequential(Table()), None, [(elsewhere, labels)]).figures[0] == pytest.approx(agreed[0])
    assert f"{agreed[0]:.1%}" in str(trust)
    assert "unknown" in str(measure_trust(Table(), None, None))


def test_without_held_out_labels_those_of_the_training_stand_in() -> None:
    logits = 3 * torch.randn(300, 4)
    labels = torch.distributions.Categorical(logits=logits / 2.5).sample()
    train = DataLoader(TensorDataset(logits[:, None, None], labels), 70)
    alone, held_out = measure_trust(Table(), train, None), measure_trust(Table(), None, train)
    agreed = held_out.figures.validation_agreement
    per_class = {"images_per_class": 75, "training_agreement": agreed, "validation_agreement": math.nan}
    assert alone.figures == pytest.approx(held_out.figures._replace(**per_class), nan_ok=True)
    assert "meta-validation" not in str(alone)
    assert f"agrees with {agreed:.1%} of the training labels" in str(alone)
    loss = lkd.load_loss("universal", alone)
    assert [part.trust[:2].tolist() for part in loss.forms()] == [pytest.approx([agreed, agreed])]
    student = Sequential(Table())
    loss.update_trust(student)
    assert loss.forms()[0].trust[OWN_ACCURACY] == pytest.approx(agreed), "of a student that is the teacher"


class Sequential(nn.Sequential):
    """A student with a parameter, which says where it is."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.place = nn.Parameter(torch.zeros(1))


def test_of_a_teacher_that_answers_at_random_what_the_training_gets_is_measured() -> None:
    images = prepare_images(DATA)
    figures = [
        measure_teacher(open_teacher(TeacherRecipe(random_answers=share), images.train), images, CPU).figures
        for share in (0.0, 0.9)
    ]
    assert figures[0].validation_agreement > 0.85
    assert max(figures[1][:2]) < 0.4
    assert figures[1].temperature > 2 * figures[0].temperature


def test_what_a_teacher_reached_is_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tensor_files, "KEPT_FROM", 0.0)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)  # an earlier test's own code: nothing would be kept
    surroundings = {"commit": "abc1234"}
    monkeypatch.setattr("lkd.training.answers.describe_surroundings", lambda _: surroundings)
    asked: list[int] = []

    def start(data: DataRecipe, teacher: TeacherRecipe) -> tuple[bool, str, TrustFigures]:
        """Whether it is asked about an image, and what comes out."""
        images = prepare_images(data)
        opened = open_teacher(teacher, images.train)
        opened.network.register_forward_hook(lambda _, inputs, __: asked.append(len(inputs[0])))
        asked.clear()
        introduced, trust = introduce_teacher(opened, images, CPU), measure_teacher(opened, images, CPU)
        return sum(asked) >= len(images.meta_validation), introduced, trust.figures

    first, second = (start(DATA, TeacherRecipe()) for _ in range(2))
    assert first[0]
    assert not second[0]
    assert first[1:] == second[1:]
    for data, teacher in (
        (replace(DATA, label_noise=0.4), TeacherRecipe()),
        (replace(DATA, split_seed=1), TeacherRecipe()),
        (DATA, TeacherRecipe(logit_scale=2.0)),
    ):
        measured, _, figures = start(data, teacher)
        assert measured
        assert figures != first[2]
    root = write_image_folder(tmp_path / "images")
    files = DataRecipe("image_folder", root, meta_validation_size=8, image_size=32), TeacherRecipe("random", "tiny_cnn")
    assert [start(*files)[0] for _ in range(2)] == [True, False]
    for path in Path(root).glob("train/*/*"):
        Image.new("RGB", (40, 40)).save(path)
    assert start(*files)[0], "other images of the same names"
    surroundings["commit"] = "abc1234-dirty"
    assert start(*files)[0], "by code that is not committed"
    assert start(*files)[0], "which may change again"


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        (TRUST._replace(own_accuracy=-0.1), "own_accuracy -0.1 is not in [0, 1]"),
        (TRUST._replace(images_per_class=math.inf), "images_per_class inf is not in (0, ∞)"),
    ],
)
def test_figures_out_of_range_are_refused(figures: TrustFigures, message: str) -> None:
    with pytest.raises(lkd.UserError) as error:
        build_loss().set_trust(Trust(figures))
    assert message in str(error.value)


def test_parts_without_labels_or_of_other_classes_are_refused() -> None:
    images = torch.randn(6, 1, 1, 3)
    with pytest.raises(lkd.UserError, match="validation has labels 0 to 7, the teacher has 3 classes"):
        measure_trust(Table(), None, [(images, torch.tensor([0, 1, 2, 7, 1, 0]))])
    with pytest.raises(lkd.UserError, match="train has no images with labels"):
        measure_trust(Table(), [], [(images, torch.tensor([0, 1, 2, 2, 1, 0]))])
    one_hot_labels = one_hot(torch.tensor([0, 1, 2, 2, 1, 0]))
    for batch in ((images,), images, {"images": images, "labels": images}, (images, None), (images, one_hot_labels)):
        with pytest.raises(lkd.UserError, match=f"a batch is a {type(batch).__name__}"):
            measure_trust(Table(), [batch], None)
    for mixed in (one_hot_labels, one_hot(torch.tensor([0, 1, 1, 0, 1, 0]))):
        with pytest.raises(lkd.UserError, match="mixed labels"):
            measure_trust(Table(), [(images, 0.7 * mixed + 0.3 * mixed.roll(1, 0))], None)
    smoothed = 0.9 * one_hot(torch.tensor([0, 1, 1, 0, 1, 0])) + 0.05
    assert measure_trust(Table(), [(images[..., :2], smoothed)], None).figures.training_agreement <= 1


def test_logits_that_are_not_finite_are_refused() -> None:
    logits = torch.randn(6, 3)
    logits[[1, 4]] = math.inf
    with pytest.raises(lkd.UserError, match="logits of 2 of 6 images of train are not finite"):
        measure_trust(Table(), [(logits, torch.tensor([0, 1, 2, 2, 1, 0]))], None)


def test_batches_of_which_the_first_say_nothing_of_the_others_are_refused() -> None:
    """Own accuracy is measured on the first 1,000 images: unshuffled, of a folder of pictures, those of few classes."""
    logits = torch.randn(1500, 3)
    labels = logits.argmax(1)
    order = labels.argsort()
    sorted_by_class, few = (DataLoader(TensorDataset(logits[o], labels[o]), 500) for o in (order, order.flip(0)[::7]))
    with pytest.raises(lkd.UserError, match="validation comes class by class"):
        measure_trust(Table(), few, sorted_by_class)
    with pytest.raises(lkd.UserError, match="train comes class by class"):
        measure_trust(Table(), sorted_by_class, None)
    assert len(measure_trust(Table(), sorted_by_class, few).looks) == 1, "all of those are looked at"
    with pytest.raises(lkd.UserError, match="validation can be read only once"):
        measure_trust(Table(), None, iter([(logits, labels)]))
    assert "nan" not in str(measure_trust(Table(), None, few))


def test_images_a_class_are_those_that_are_drawn_from() -> None:
    logits = torch.randn(600, 3)
    whole, some = TensorDataset(logits, logits.argmax(1)), SubsetRandomSampler(range(300))
    batched = TensorDataset(logits.view(6, 100, 3), logits.argmax(1).view(6, 100))
    for loader, expected in (
        (DataLoader(whole, 100, shuffle=True), 200),
        (DataLoader(Subset(whole, range(150)), 100, shuffle=True), 50),
        (DataLoader(whole, 100, sampler=some), 100),
        (DataLoader(whole, batch_sampler=BatchSampler(some, 100, drop_last=False)), 100),
        (DataLoader(whole, 100, sampler=DistributedSampler(whole, 4, 0)), 200),
        (DataLoader(batched, batch_size=None), math.nan),
    ):
        found = measure_trust(Table(), loader, None).figures.images_per_class
        assert found == pytest.approx(expected, nan_ok=True)


class Writing(nn.Module):
    """Takes its input's mean off in place, and answers in one of the ways that networks have."""

    def __init__(self, answer=lambda logits: logits) -> None:
        super().__init__()
        self.scale, self.answer = nn.Parameter(torch.ones(())), answer

    def forward(self, images: torch.Tensor):
        assert images.dtype == self.scale.dtype
        return self.answer(self.scale * images.sub_(0.5).square().flatten(1))


def test_what_is_measured_twice_is_the_same_of_networks_that_write_into_their_input() -> None:
    images = torch.rand(60, 1, 1, 3)
    labels = (images - 0.5).square().flatten(1).argmax(1)
    batches = [(images, labels)]
    first, second = (measure_trust(Writing(), batches, batches) for _ in range(2))
    assert str(first) == str(second)
    assert first.figures.validation_agreement == 1
    assert [measure_own_accuracy(Writing(), first.looks) for _ in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("answer", [lambda logits: (logits, None), lambda logits: {"logits": logits}])
def test_networks_are_asked_in_their_own_precision_however_they_answer(dtype, answer) -> None:
    images = torch.rand(60, 1, 1, 3)
    batches = [(images, (images - 0.5).square().flatten(1).argmax(1))]
    network = Writing(answer).to(dtype)
    assert measure_trust(network, batches, batches).figures.validation_agreement > 0.9
    assert measure_own_accuracy(network, batches) > 0.9


@pytest.mark.parametrize("part", [nn.Dropout(), nn.BatchNorm1d(3), nn.ReLU()])
def test_a_teacher_that_trains_while_it_is_asked_is_said(part: nn.Module, caplog) -> None:
    teacher = nn.Sequential(nn.Flatten(), part)
    batches = [(torch.randn(30, 1, 1, 3), torch.arange(30) % 3)]
    measure_trust(teacher, batches, batches)
    assert ("the teacher is in train mode" in caplog.text) == (not isinstance(part, nn.ReLU))
    caplog.clear()
    measure_trust(teacher.eval(), batches, batches)
    assert not caplog.text


def test_a_loss_of_inference_mode_is_like_any_other() -> None:
    labels = torch.arange(30) % 3
    batches = [(5.0 * one_hot(labels).view(30, 1, 1, 3), labels)]
    with torch.inference_mode():
        loss = lkd.load_loss("universal", trust=measure_trust(Table(), batches, batches))
    student = Writing()
    loss.update_trust(student)
    images = batches[0][0].clone()
    total(loss, student(images), batches[0][0].flatten(1), labels).backward()
    assert student.scale.grad is not None


@pytest.mark.parametrize("classes", [2, 10, 21_841])
@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("scale", [0.25, 4.0])
def test_any_batch_any_classes_any_scale_known_or_not(classes: int, size: int, scale: float) -> None:
    for dense in (False, True):
        for figures in (TRUST, TrustFigures()):
            loss = build_loss()
            loss.tell(figures)
            student, teacher = 3 * torch.randn(2, size, classes)
            target = torch.randn(size, classes).softmax(1) if dense else torch.randint(classes, (size,))
            student.requires_grad_()
            total(loss, student, scale * teacher, target).backward()
            assert student.grad.isfinite().all()
            assert student.grad.abs().sum() > 0


def test_a_part_of_a_batch_sees_its_own_context() -> None:
    """What several processes, or parts of a batch, change: an eighth of a batch has noisier means."""
    loss = build_loss()
    loss.tell(TRUST)
    student, teacher, target = 2 * torch.randn(256, 10), 2 * torch.randn(256, 10), torch.randint(10, (256,))
    whole = total(loss, student, teacher, target)
    parts = [total(loss, *each) for each in zip(student.chunk(8), teacher.chunk(8), target.chunk(8), strict=True)]
    mean = torch.stack(parts).mean().item()
    assert mean == pytest.approx(whole.item(), rel=0.05)
    assert mean != whole.item()


def test_the_gradient_is_that_of_a_function_of_the_whole_batch() -> None:
    loss = build_loss().double()
    loss.tell(TRUST)
    teacher, target = 2 * torch.randn(4, 5, dtype=torch.float64), torch.randint(5, (4,))
    student = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: total(loss, s, teacher, target), student)
    assert torch.autograd.gradgradcheck(lambda s: total(loss, s, teacher, target), student)


def test_wrong_held_out_labels_are_told_from_a_weak_teacher() -> None:
    """Three in ten labels wrong, the teacher right; and all labels right, the teacher as unsure as it is wrong."""
    torch.manual_seed(0)
    sure, weak = (scale * torch.randn(4000, 10) for scale in (20, 2))
    for scale in (0.3, 1.0, 3.0):
        true = torch.distributions.Categorical(logits=sure).sample()
        labels = torch.where(torch.rand(4000) < 0.3, torch.randint(10, (4000,)), true)
        assert find_contradicted(scale * sure, labels, 1.0) == pytest.approx(0.27, abs=0.03)  # some hit the right one
        assert find_contradicted(scale * weak, torch.distributions.Categorical(logits=weak).sample(), 1.0) == 0


@pytest.mark.parametrize("scale", [3, 10, 30])
def test_contradicted_labels_of_two_classes_are_found(scale: float) -> None:
    """Though the best temperature of a teacher whose labels are wrong so often is hot."""
    logits = scale * torch.randn(1000, 2)
    labels = torch.distributions.Categorical(logits=logits).sample()
    for share, expected in ((0.4, pytest.approx(0.4, abs=0.06)), (0.6, 0)):  # beyond a half they say the contrary
        wrong = torch.where(torch.rand(1000) < share, 1 - labels, labels)
        assert find_contradicted(logits, wrong, find_best_temperature(logits, wrong, 1 / 64, 64)) == expected


def test_few_images_without_an_error_say_little_of_the_temperature() -> None:
    logits = 3 * torch.randn(20, 10)
    images, labels = torch.arange(20), logits.argmax(1)
    found = lkd.measure_trust(lambda index: logits[index], None, [(images, labels)]).figures.temperature
    assert 0.15 < found < 1
    assert find_best_temperature(logits, labels, 1 / 64, 64) < 0.1, "as it would be without the prior"


def test_a_file_holds_no_trust(tmp_path: Path) -> None:
    loss = build_loss()
    loss.set_trust(Trust(TRUST))
    lkd.save_loss(tmp_path / "x.lkd.safetensors", loss, {})
    loaded = lkd.load_loss(tmp_path / "x.lkd.safetensors")
    assert loaded.reads_trust
    student, teacher, target = torch.randn(4, 5), torch.randn(4, 5), torch.randint(5, (4,))
    assert total(loaded, student, teacher, target) != total(loss, student, teacher, target)
    loaded = lkd.load_loss(tmp_path / "x.lkd.safetensors", trust=Trust(TRUST))
    assert torch.equal(total(loaded, student, teacher, target), total(loss, student, teacher, target))


def test_losses_inside_of_others_are_told() -> None:
    """In a replayed course each one, and the student is asked once for all."""
    images = prepare_images(DATA)
    inner = [build_loss() for _ in range(4)]
    replayed = ReplayedLoss(inner[:2], [0, 0.5])
    weighted = InfluenceWeightedLoss(inner[2], images.meta_validation, InfluenceWeightedLossSettings())
    looks, asked = (torch.randn(6, 1, 8, 8), torch.arange(6) % 3), []

    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.tensor([1.0, 0.0, 0.0]))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            asked.append(len(images))
            return self.bias.expand(len(images), 3)

    for loss in (replayed, weighted, WrappedLoss(inner[3])):
        assert loss.reads_trust
        loss.set_trust(Trust(TRUST, (looks,)))
        loss.update_trust(Student())
    assert asked == [6, 6, 6]
    for loss in inner:
        told = loss.parts["logits"].trust
        assert told[0] == pytest.approx(0.7)
        assert told[OWN_ACCURACY] == pytest.approx(1 / 3)


def test_own_accuracy_is_renewed_and_a_training_goes_on_to_the_same_bits() -> None:
    images = prepare_images(DATA)
    opened = open_teacher(TeacherRecipe(), images.train)
    trust = measure_teacher(opened, images, CPU)
    teacher = prepare_teacher(TeacherRecipe(), DATA, images, CPU)
    train = TrainRecipe(epochs=6, batch_size=50, learning_rate=0.1)

    def begin():
        loss = build_loss().requires_grad_(False)
        loss.set_trust(trust)
        return start_training(ModelRecipe("tiny_cnn"), images.train, loss, teacher, train, DATA, 0, CPU)

    whole, stopped = begin(), begin()
    seen = []
    while whole.step < whole.total_steps:
        whole.run_step()
        seen.append(float(whole.loss.parts["logits"].trust[OWN_ACCURACY]))
    assert len(set(seen)) > 4, "the student's own accuracy was never measured anew"
    assert seen[0] == pytest.approx(measure_own_accuracy(begin().student, trust.looks))
    for _ in range(11):
        stopped.run_step()
    resumed = begin()
    resumed.load_state_dict(stopped.state_dict())
    while resumed.step < resumed.total_steps:
        resumed.run_step()
    assert digest(resumed.student.state_dict()) == digest(whole.student.state_dict())
