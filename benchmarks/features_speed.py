"""Compare a training step with the learned loss over features and logits (`both`) with one over logits alone.

python benchmarks/features_speed.py [OUT]

small_cnn on the embedded images, whose teacher is tabulated, and ResNet-50 → MobileNet V1 at 224 pixels, 4 random
images. All in turn in one process, one thread, processor time, medians; and what the parts of the loss take there,
forward and backward. A row of a CSV file in the output folder is not measured again; delete it to start over.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rows import matching, median, write_row
from speed_report import OUT, record

from lkd.config import TrainRecipe
from lkd.core.outputs import Outputs
from lkd.data import Batches, ImageSet, load_dataset
from lkd.losses.learned.loss import build_learned_loss
from lkd.losses.learned.networks import read_logits, sample_inputs
from lkd.models import build
from lkd.models.build import find_stages
from lkd.models.teacher import TabulatedTeacher, Teacher
from lkd.training.throughput import OperationCounter
from lkd.training.training import Training

CPU = torch.device("cpu")
COLUMNS = ["pair", "loss", "repeat", "cpu_seconds"]
PAIRS = {"small_cnn": ("small_resnet", "small_cnn", 64, 9), "mobilenetv1": ("resnet50", "mobilenetv1_100", 4, 5)}


def make_images(pair: str) -> ImageSet:
    if pair == "small_cnn":
        return load_dataset("embedded").train.select(torch.arange(1000))
    pixels = torch.randint(256, (16, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    names = tuple(map(str, range(1000)))
    return ImageSet(pixels, torch.arange(16), torch.arange(16), names, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def start(pair: str, kind: str) -> Training:
    """A training with a loss whose networks are moved off their start, which computes the same but gives zeros."""
    images, (teacher_name, student_name, size, _) = make_images(pair), PAIRS[pair]
    torch.manual_seed(0)
    channels = images.image_shape[0]
    teacher, student = (build(name, images.num_classes, channels) for name in (teacher_name, student_name))
    stages = () if kind == "logits" else tuple(find_stages(each, images.image_shape) for each in (student, teacher))
    loss = build_learned_loss(kind, {}, *stages).requires_grad_(False)
    for parameter in loss.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape))
    answers: Any = Teacher(teacher)
    if pair == "small_cnn":
        answers = TabulatedTeacher(answers, images, CPU, stages=loss.teacher_stages)
    return Training(student, loss, answers, Batches(images, size, 0), TrainRecipe(1000, size, learning_rate=0.01))


def take_time(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def measure_steps(path: Path, pair: str) -> None:
    repeats = PAIRS[pair][3]
    if matching(path, pair=pair, repeat=repeats - 1, loss="both"):
        return
    trainings = {kind: start(pair, kind) for kind in ("logits", "both")}
    for repeat in range(-2, repeats):
        for kind, training in trainings.items():
            seconds = take_time(training.run_step)
            if repeat >= 0 and not matching(path, pair=pair, loss=kind, repeat=repeat):
                write_row(path, COLUMNS, [pair, kind, repeat, seconds])


def measure_parts(path: Path) -> None:
    """Processor milliseconds and operators, forward and backward, of the parts of the loss in a step of small_cnn."""
    if path.exists():
        return
    training = start("small_cnn", "both")
    batch, loss = training.batches.at(0), training.loss.parts["features"]
    theirs, given = training.teacher(batch), training.student(batch.images)
    (_, depths), (features, teacher_depths) = (
        loss.take_stages(number, each) for number, each in enumerate((given, theirs))
    )

    def leaves() -> Outputs:
        stages = {name: feature.detach().requires_grad_() for name, feature in given.features.items()}
        return Outputs(given.logits.detach().requires_grad_(), stages)

    def take_all() -> None:
        sum(training.loss(leaves(), theirs, batch.target, 0.3).values()).backward()

    def compare() -> None:
        entries = loss.compare(loss.take_stages(0, leaves())[0], features)
        sum(ours.sum() for ours, _ in entries).backward()

    logs = read_logits(given.logits.detach(), theirs.logits, batch.target, loss.conditioning)
    samples = sample_inputs(logs, 0.3, loss.conditioning)
    entries = loss.compare(loss.take_stages(0, leaves())[0], features)

    def weigh(kind: int) -> None:
        ours, seen = entries[kind][0].detach().requires_grad_(), samples.detach().requires_grad_()
        loss.measure(ours, entries[kind][1], kind, depths, teacher_depths, seen).sum().backward()

    def weigh_all() -> None:
        for kind in range(len(entries)):
            weigh(kind)

    logits = training.loss.leave_out_features()
    parts = {
        "the whole loss": take_all,
        "its part over logits": lambda: sum(logits(leaves(), theirs, batch.target, 0.3).values()).backward(),
        "comparisons of stages": compare,
        "network over entries": weigh_all,
    }
    for name, part in parts.items():
        with OperationCounter() as count:
            part()
        seconds = sorted(take_time(part) for _ in range(11))[5]
        write_row(path, ["part", "milliseconds", "operators"], [name, round(1e3 * seconds, 3), count.operations])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", default=OUT)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    torch.empty(6_000_000).fill_(0)  # the allocator then keeps what is freed, as in a training of any network
    times, figures = out / "features_time.csv", {}
    for pair, key in (("small_cnn", "small_cnn"), ("mobilenetv1", "resnet50_mobilenetv1")):
        measure_steps(times, pair)
        both, alone = (median(times, "cpu_seconds", pair=pair, loss=loss) for loss in ("both", "logits"))
        figures[f"both_vs_logits_{key}"] = both / alone
        if pair == "small_cnn":
            measure_parts(out / "features_parts.csv")
            named = partial(median, out / "features_parts.csv")
            for part, what in (
                ("the whole loss", "both"),
                ("comparisons of stages", "compare"),
                ("network over entries", "entries"),
            ):
                figures[f"features_{what}_ms"] = named("milliseconds", part=part)
            figures["features_operators"] = named("operators", part="the whole loss")
            figures["logits_step_ms"] = 1e3 * alone
        record(out, figures)


if __name__ == "__main__":
    main()
