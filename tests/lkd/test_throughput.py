"""Which part of a step takes the time."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lkd.cli import main
from lkd.config import DataRecipe, TrainRecipe
from lkd.core.outputs import Outputs
from lkd.data import Batches
from lkd.losses import DistillationLoss
from lkd.training import distill as distillation
from lkd.training import throughput
from lkd.training.build import prepare_images
from lkd.training.throughput import PARTS
from lkd.training.training import Training

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
