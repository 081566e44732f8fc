"""Which part of a step takes the time."""

import json
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lkd import distillation
from lkd.assembly import prepare_images
from lkd.cli import main
from lkd.config import DataRecipe, TrainRecipe
from lkd.data import Batches
from lkd.outputs import Outputs
from lkd.throughput import PARTS, Throughput
from lkd.training import Training

SECONDS = {"data": 0.02, "teacher": 0.03, "student": 0.08, "loss": 0.05}


class Slow(torch.autograd.Function):
    """The identity, which takes its time forward and backward."""

    @staticmethod
    def forward(x: Tensor, seconds: float) -> Tensor:
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.seconds = inputs[1]

    @staticmethod
    def backward(ctx, gradient: Tensor):
        time.sleep(ctx.seconds)
        return gradient, None


class SlowStudent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(28 * 28, 10)

    def forward(self, images: Tensor) -> Outputs:
        return Outputs(self.classifier(Slow.apply(images.flatten(1), 0.0)) + Slow.apply(self.classifier.bias, 0.02), {})


class SlowLoss(nn.Module):
    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, progress=None) -> dict[str, Tensor]:
        return {"distillation": Slow.apply(student.logits, SECONDS["loss"] / 4).square().mean()}


@pytest.mark.parametrize("parts", [1, 2])
def test_every_part_gets_its_own_time(parts: int, monkeypatch) -> None:
    """Of sleeps whose lengths are known, forward and backward, in a batch that is cut in parts too."""
    images = prepare_images(DataRecipe(train_size=300, meta_validation_size=300)).train
    batches, plain = Batches(images, 10, 0), Batches.at
    monkeypatch.setattr(Batches, "at", lambda self, step: (time.sleep(SECONDS["data"]), plain(self, step))[1])

    def teacher(batch) -> Outputs:
        time.sleep(SECONDS["teacher"])
        return Outputs(torch.zeros(len(batch.target), 10), {})

    training = Training(SlowStudent(), SlowLoss(), teacher, batches, TrainRecipe(epochs=1, accumulation=parts))
    throughput = Throughput(training.clock, 10)
    for _ in range(5):
        training.run_step()
    figures = throughput.read(5)
    expected = {"data": 0.02, "teacher": 0.03, "student": 0.04 * parts, "loss": 0.025 * parts}
    for part in PARTS:
        share = expected[part] / sum(expected.values())
        assert figures[f"time_share/{part}"] == pytest.approx(share, abs=0.05), part
    assert figures["images_per_second"] == pytest.approx(10 / sum(expected.values()), rel=0.2)


def test_a_run_logs_its_throughput(monkeypatch) -> None:
    monkeypatch.setattr(distillation, "SECONDS_BETWEEN_REPORTS", 0.0)
    assert (
        main(["distill", "--data.train_size", "200", "--data.meta_validation_size", "100", "--train.epochs", "1"]) == 0
    )
    rows = [json.loads(line) for line in Path("runs/run/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 3], "every report, and the epoch"
    for row in rows:
        assert row["images_per_second"] > 0
        assert sum(row[f"time_share/{part}"] for part in PARTS) == pytest.approx(1)
