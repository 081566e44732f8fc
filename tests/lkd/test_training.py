"""One student's training: equal to a plain loop; which part of a step takes the time."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lkd.cli import main
from lkd.config import DataRecipe, ModelRecipe, TeacherRecipe, TrainRecipe
from lkd.core.errors import UserError
from lkd.core.outputs import Outputs
from lkd.core.tensor_files import digest
from lkd.data import Batches
from lkd.losses import CrossEntropyLoss, DistillationLoss, KDLoss
from lkd.training import distill as distillation
from lkd.training import throughput
from lkd.training.build import prepare_images
from lkd.training.throughput import PARTS
from lkd.training.training import Training
from tests.lkd.parts import VIT, prepare_loss, prepare_student, prepare_teacher, start_training

CPU = torch.device("cpu")
DATA = DataRecipe(augmentation="flip_and_crop")
RECIPE = TrainRecipe(epochs=3, batch_size=50, learning_rate=0.1, nesterov=True)


@pytest.fixture(scope="module")
def images():
    return prepare_images(DataRecipe(train_size=300, meta_validation_size=300)).train


def start(images, loss=None, **changes) -> Training:
    recipe = TrainRecipe(**{**vars(RECIPE), **changes})
    return start_training(ModelRecipe("small_cnn"), images, loss or CrossEntropyLoss(), None, recipe, DATA, 7, CPU)


def test_training_equals_a_plain_loop(images) -> None:
    training = start(images)
    while training.step < training.total_steps:
        training.run_step()
    student = prepare_student(ModelRecipe("small_cnn"), images, 7, CPU).train()
    batches = Batches(images, 50, 7, "flip_and_crop")
    optimizer = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for step in range(18):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / 18))
        batch = batches.at(step)
        optimizer.zero_grad()
        cross_entropy(student(batch.images).logits, batch.target).backward()
        optimizer.step()
    for ours, plain in zip(training.student.state_dict().values(), student.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_equal_seeds_pair_the_losses(images) -> None:
    first, second = start(images), start(images, KDLoss())
    assert torch.equal(first.batches.at(4).images, second.batches.at(4).images)
    assert digest(first.student.state_dict()) == digest(second.student.state_dict())


def test_the_learning_rate_warms_up_and_ends_low(images) -> None:
    training = start(images, warmup_epochs=1)
    rates = []
    while training.step < training.total_steps:
        rates.append(training.learning_rate)
        training.run_step()
    assert rates[0] < rates[3] < max(rates) <= 0.1 + 1e-9
    assert rates[-1] < 0.01


def test_a_loss_that_is_not_finite_is_named(images) -> None:
    class Broken(DistillationLoss):
        def forward(self, student: Outputs, teacher, target, progress=None):
            return {"task": student.logits.mean(), "distillation": student.logits.sum() * math.inf}

    with pytest.raises(UserError, match=r"step 0: the loss is not finite \(task = .*, distillation = .*(inf|nan)"):
        start(images, Broken()).run_step()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"momentum": 0.0}, "train: Nesterov"),
        ({"schedule": "cosin"}, "train.schedule"),
        ({"schedule": "step"}, "train.schedule"),  # timm's falls every 90 epochs
        ({"accumulation": 3}, "train.accumulation"),
        ({"epochs": 2, "warmup_epochs": 2}, "train.warmup_epochs: 2 leave nothing"),
        ({"epochs": 3, "warmup_epochs": 1, "cooldown_epochs": 2}, "train.warmup_epochs: 1 leave nothing"),
        ({"epochs": 1, "warmup_steps": 100}, "train.warmup_steps: 100 leave nothing"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(images, changes: dict, field: str) -> None:
    with pytest.raises(UserError, match=field):
        start(images, **changes)


def test_bfloat16_trains_nearly_as_float32_with_weights_and_losses_in_float32() -> None:
    images = prepare_images(DataRecipe(train_size=200, meta_validation_size=100))
    recipe, taught = ModelRecipe("small_cnn"), TeacherRecipe()
    values = {}
    for precision in ("float32", "bfloat16", "auto"):
        built = prepare_loss("fitnet", recipe, taught, images, 0)
        teacher = prepare_teacher(taught, DataRecipe(), images, CPU, built.teacher_stages)
        train = TrainRecipe(epochs=1, batch_size=40, learning_rate=0.02, precision=precision)
        training = start_training(recipe, images.train, built, teacher, train, DataRecipe(), 0, CPU)
        rows = [training.run_step() for _ in range(3)]
        assert all(term.dtype == torch.float32 for row in rows for term in row.values())
        assert all(p.dtype == torch.float32 for p in training.student.parameters())
        values[precision] = torch.tensor([float(sum(row.values())) for row in rows])
    assert torch.equal(values["auto"], values["float32"]), "auto is float32 on a CPU"
    assert not torch.equal(values["bfloat16"], values["float32"])
    torch.testing.assert_close(values["bfloat16"], values["float32"], rtol=0.05, atol=0.0)


def test_accumulated_parts_are_the_whole_batch(images) -> None:
    """Watched and reported once a step."""
    terms, students = [], []
    for accumulation in (1, 4):
        train = TrainRecipe(epochs=1, batch_size=40, accumulation=accumulation)
        training = start_training(VIT, images, CrossEntropyLoss(), None, train, DataRecipe(), 0, CPU)
        terms.append(torch.tensor([float(training.run_step()["task"]) for _ in range(5)]))
        students.append(training.student.state_dict())
    torch.testing.assert_close(*terms, rtol=1e-4, atol=1e-5)
    for name, tensor in students[0].items():
        torch.testing.assert_close(students[1][name], tensor, rtol=1e-3, atol=1e-5)


def test_the_average_is_that_of_the_weights_after_every_step(images) -> None:
    train = TrainRecipe(epochs=1, batch_size=40, ema_decay=0.7)
    training = start_training(ModelRecipe(), images, CrossEntropyLoss(), None, train, DataRecipe(), 0, CPU)
    expected = {name: p.detach().clone() for name, p in training.student.named_parameters()}
    for step in range(1, 7):
        training.run_step()
        decay = min(0.7, 1 - step ** (-2 / 3))
        for name, parameter in training.student.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach()
    assert training.result is not training.student
    for name, parameter in training.result.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-7)


# ----------------------------------------------------------------------------------------------------------------------
# Throughput.

TAKES = {"data": 2.0, "teacher": 3.0, "student": 5.0, "loss": 7.0}


class Clock:
    """Time that passes only where a part of a step says so."""

    now = 0.0

    @classmethod
    def perf_counter(cls) -> float:
        return cls.now


class Slow(torch.autograd.Function):
    """The identity, which takes its time forward and backward."""

    @staticmethod
    def forward(x: Tensor, part: str) -> Tensor:
        Clock.now += TAKES[part] / 2
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.part = inputs[1]

    @staticmethod
    def backward(ctx, gradient: Tensor):
        Clock.now += TAKES[ctx.part] / 2
        return gradient, None


class SlowStudent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(28 * 28, 10)

    def forward(self, images: Tensor) -> Outputs:
        return Outputs(Slow.apply(self.classifier(images.flatten(1)), "student") * 1.0, {})


class SlowLoss(DistillationLoss):
    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, progress=None) -> dict[str, Tensor]:
        return {"distillation": Slow.apply(student.logits, "loss").square().mean()}


@pytest.mark.parametrize("parts", [1, 2])
def test_every_part_gets_its_own_time(parts: int, monkeypatch) -> None:
    """Forward and backward, in a batch that is cut in parts too."""
    images = prepare_images(DataRecipe(train_size=300, meta_validation_size=300)).train
    batches, plain = Batches(images, 10, 0), Batches.at

    def wait_for_batch(self: Batches, step: int):
        Clock.now += TAKES["data"]
        return plain(self, step)

    def ask_teacher(batch) -> Outputs:
        Clock.now += TAKES["teacher"]
        return Outputs(torch.zeros(len(batch.target), 10), {})

    monkeypatch.setattr(Batches, "at", wait_for_batch)
    monkeypatch.setattr(throughput, "time", Clock)
    recipe = TrainRecipe(epochs=1, accumulation=parts)
    training = Training(SlowStudent(), SlowLoss(), ask_teacher, batches, recipe)
    speed = throughput.Throughput(training.clock, 10)
    for _ in range(4):
        training.run_step()
        Clock.now += 100  # between steps: nobody's
    figures = speed.read(4)
    expected = TAKES | {part: parts * TAKES[part] for part in ("student", "loss")}
    for part in throughput.PARTS:
        assert figures[f"time_share/{part}"] == pytest.approx(expected[part] / sum(expected.values())), part
    assert figures["images_per_second"] == pytest.approx(10 / (sum(expected.values()) + 100))


def test_a_run_logs_its_throughput(monkeypatch) -> None:
    monkeypatch.setattr(distillation, "FIRST_PAUSE", 0.0)
    sizes = ["--data.train_size", "200", "--data.meta_validation_size", "100"]
    assert main(["distill", *sizes, "--train.epochs", "1"]) == 0
    rows = [json.loads(line) for line in Path("runs/run/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 3], "every report, and the epoch"
    for row in rows:
        assert row["images_per_second"] > 0
        assert sum(row[f"time_share/{part}"] for part in PARTS) == pytest.approx(1)
