"""What a teacher cache costs in accuracy, and how fast it is read: `python benchmarks/teacher_cache.py [OUT]`.

Accuracy: the same student, seeds and crops with the live teacher, with all its logits in float16, and with the largest
ones and what remains. Reading: batches gathered in training order, and the same number of answers read in order. Every
measurement is a row of a CSV file in the output folder and is not taken again while it stands there. --check does one
training with all logits cached anew.
"""

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch
from cached_answers import make_cached_teacher
from checking import SEED_NOISE, check
from rows import matching, median, write_row

from lkd.config import CacheRecipe, DataRecipe, ModelRecipe, TeacherRecipe, TrainRecipe
from lkd.core.files import environment, write_json, write_text
from lkd.data import Batch
from lkd.export.cache import cache_answers
from lkd.losses import KDLoss
from lkd.tracking.run import evidence
from lkd.training.answers import prepare_teacher
from lkd.training.build import Images, choose_student, open_teacher, prepare_images
from lkd.training.distill import start_training
from lkd.training.evaluate import evaluate

OUT = Path(__file__).parents[1] / "docs" / "evidence" / "teacher_cache"
CPU = torch.device("cpu")
DATA = DataRecipe(train_size=4000, meta_validation_size=4000, augmentation="flip_and_crop", augmentation_seeds=4)
TRAIN = TrainRecipe(epochs=8)
METHODS: dict[str, int | None] = {"live": None, "full": 0, "top_3": 3, "top_1": 1}
SEEDS = range(3)
COLUMNS = ["method", "seed", "test_top1", "train_top1", "cpu_seconds"]
READINGS = {"full": 0, "top_20": 20}
IMAGES, CLASSES, BATCH, REPEATS = 200_000, 1000, 256, 50
README = """# Teacher cache

Made by `python benchmarks/teacher_cache.py`. Embedded Fashion-MNIST, {images:,} training images, `flip_and_crop` with
{augmentations} augmentation seeds; embedded teacher → small_cnn, {epochs} epochs, KD of weight 1 at temperature 4 (no
labels: all that the student learns is the teacher's). Accuracy of the last epoch, %, mean ± standard error over
{seeds} paired seeds; processor seconds of a training, median.

{accuracy}

Rounding to float16 alone sets a training on another course, so that `full` − `live` shows the noise of such a gap. Of
10 classes few are left over: this says little about 1,000, where the rest is larger and weighs more at temperature 4.

**Reading.** {answers:,} answers of {classes:,} classes, one augmentation seed, mapped from files of 50,000 that lie in
the page cache; milliseconds for {batch} of them, median of {repeats}, on one thread, looked up and made into logits.

{reading}

Reading in order is the faster one, by less than half a millisecond a batch. Training order is shuffled, so a batch is
gathered; a step of the networks of ImageNet takes many times as long. Nothing was measured from a cold disk or on a
GPU.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", default=OUT)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.check:
        with tempfile.TemporaryDirectory() as folder:
            measure_accuracy(Path(folder) / "accuracy.csv", {"full": 0}, range(1))
            made = matching(Path(folder) / "accuracy.csv", method="full", seed=0)[0]
        committed = matching(OUT / "accuracy.csv", method="full", seed=0)[0]
        return check(committed, {name: made[name] for name in ("test_top1", "train_top1")}, noise=SEED_NOISE)
    options.out.mkdir(parents=True, exist_ok=True)
    measure_accuracy(options.out / "accuracy.csv")
    measure_reading(options.out / "reading.csv")
    report(options.out)
    return 0


def measure_accuracy(path: Path, methods: dict[str, int | None] = METHODS, seeds: range = SEEDS) -> None:
    """Train with every kind of answers and every seed."""
    images = prepare_images(DATA)
    for method, top_k in methods.items():
        left = [seed for seed in seeds if not matching(path, method=method, seed=seed)]
        if left:
            with tempfile.TemporaryDirectory() as folder:
                teacher = TeacherRecipe(cache=None if top_k is None else folder)
                if top_k is not None:
                    cache_answers(CacheRecipe(device="cpu", data=DATA, teacher=teacher, train=TRAIN, top_k=top_k))
                for seed in left:
                    write_row(path, COLUMNS, [method, seed, *train_student(images, teacher, seed)])


def train_student(images: Images, recipe: TeacherRecipe, seed: int) -> list[float]:
    """Train a student; its accuracy on the test and the training split, and processor seconds."""
    teacher = prepare_teacher(open_teacher(recipe, images.train), images, CPU)
    started = time.process_time()
    student = choose_student(ModelRecipe(), images.train)
    training = start_training(student, images, KDLoss(1.0, 4.0), teacher, TRAIN, seed, CPU)
    while training.step < training.total_steps:
        training.run_step()
    seconds = time.process_time() - started
    return [*(evaluate(training.result, part, CPU)["top1"] for part in (images.test, images.train)), round(seconds, 2)]


def measure_reading(path: Path) -> None:
    """Time batches in training order and in the files' order, in turn."""
    for kind, top_k in READINGS.items():
        if matching(path, kind=kind, repeat=REPEATS - 1):
            continue
        teacher = make_cached_teacher(CLASSES, top_k, IMAGES)
        teacher.look_up(torch.arange(IMAGES), torch.zeros(IMAGES, dtype=torch.int64))  # into the page cache
        generator, seeds = torch.Generator().manual_seed(1), torch.zeros(BATCH, dtype=torch.int64)
        for repeat in range(REPEATS):
            shuffled = torch.randint(IMAGES, (BATCH,), generator=generator)
            first = int(torch.randint(IMAGES - BATCH, (), generator=generator))
            times = []
            for index in (shuffled, torch.arange(first, first + BATCH)):
                started = time.process_time()
                teacher(Batch(index, index, index, seeds))
                times.append(round(1000 * (time.process_time() - started), 4))
            write_row(path, ["kind", "repeat", "shuffled_ms", "in_order_ms"], [kind, repeat, *times])


def report(out: Path) -> None:
    """Write result.json and the README from the rows."""
    figures: dict[str, float] = {}
    accuracy = ["| | test | test − live | training images | − live | s |", "|---|---|---|---|---|---|"]
    for method in METHODS:
        cells = []
        for column in ("test_top1", "train_top1"):
            mine, live = (
                [float(matching(out / "accuracy.csv", method=m, seed=s)[0][column]) for s in SEEDS]
                for m in (method, "live")
            )
            gaps = [a - b for a, b in zip(mine, live, strict=True)]
            cells += [format_mean(mine), format_mean(gaps)]
            figures[f"{column}_{method}"] = statistics.mean(mine)
            figures[f"{column}_gap_{method}"] = statistics.mean(gaps)
        seconds = median(out / "accuracy.csv", "cpu_seconds", method=method)
        figures[f"cpu_seconds_{method}"] = seconds
        accuracy.append(f"| {method} | {' | '.join(cells)} | {seconds:.1f} |")
    reading = ["| | in training order | in the files' order |", "|---|---|---|"]
    for kind in READINGS:
        times = [median(out / "reading.csv", column, kind=kind) for column in ("shuffled_ms", "in_order_ms")]
        figures[f"shuffled_ms_{kind}"], figures[f"in_order_ms_{kind}"] = times
        reading.append(f"| {kind} | {times[0]:.2f} | {times[1]:.2f} |")
    counts = {"images": DATA.train_size, "augmentations": DATA.augmentation_seeds, "epochs": TRAIN.epochs}
    counts |= {"seeds": len(SEEDS), "answers": IMAGES, "classes": CLASSES, "batch": BATCH, "repeats": REPEATS}
    write_text(out / "README.md", README.format(accuracy="\n".join(accuracy), reading="\n".join(reading), **counts))
    rounded = {key: round(value, 4) for key, value in figures.items()}
    write_json(out / "result.json", evidence("python benchmarks/teacher_cache.py", environment(), rounded))


def format_mean(values: list[float]) -> str:
    """Mean ± standard error."""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) / math.sqrt(len(values)):.2f}"


if __name__ == "__main__":
    raise SystemExit(main())
