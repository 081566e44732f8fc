"""Compare a distillation step with timm's and with a plain loop: `python benchmarks/distillation_speed.py [OUT]`.

Time: all in turn in one process on one thread, processor time, median; images through the same `Batches`. Memory: each
in a process of its own, peak resident memory above the idle one. Share of the loss: forward and backward on the outputs
of the real pair, in turn with whole steps. Cache: steps with cached answers in turn with the student's alone. Every
measurement is a row of a CSV file in the output folder and is not taken again while it stands there; delete the files
to start over.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from cached_answers import make_cached_teacher
from checking import check
from rows import matching, median, write_row
from timm.task import LogitDistillationTask
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from lkd.config import TrainRecipe
from lkd.core.files import environment, read_json, write_json, write_text
from lkd.core.outputs import Outputs
from lkd.data import Batches, ImageSet
from lkd.evaluation.comparison.trials import Cost
from lkd.losses import CrossEntropyLoss, KDLoss
from lkd.losses.learned.loss import build_learned_loss
from lkd.models import build
from lkd.models.teacher import Teacher, TeacherFunction
from lkd.tracking.run import evidence
from lkd.training.training import Training

OUT = Path(__file__).parents[1] / "docs" / "evidence" / "imagenet" / "distillation_speed"
CLASSES, TEMPERATURE, WEIGHT, REPEATS, WARM_UP = 1000, 4.0, 0.5, 9, 2
TIME_COLUMNS = ["case", "engine", "repeat", "cpu_seconds"]
MEMORY_COLUMNS = ["case", "engine", "peak_mib"]
LOSS_COLUMNS = ["loss", "repeat", "loss_seconds", "step_seconds"]
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(256 * 1024)}


class Case(NamedTuple):
    """A pair of networks and the images that it sees."""

    teacher: str
    student: str
    pixels: int
    batch_size: int


CASES = {
    "resnet34-resnet18": Case("resnet34", "resnet18", 64, 32),
    "resnet50-mobilenetv1": Case("resnet50", "mobilenetv1_100", 128, 16),
}
REAL = Case("resnet50", "mobilenetv1_100", 224, 8)
SGD: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}


def make_batches(case: Case) -> Batches:
    """Random images in memory, normalised as ImageNet's."""
    generator = torch.Generator().manual_seed(0)
    count = 4 * case.batch_size
    pixels = torch.randint(256, (count, 3, case.pixels, case.pixels), dtype=torch.uint8, generator=generator)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    names = tuple(map(str, range(CLASSES)))
    images = ImageSet(pixels, labels, torch.arange(count), names, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return Batches(images, case.batch_size, 0)


def start_lkd(case: Case, loss: nn.Module, teacher: TeacherFunction | None) -> Callable[[int], object]:
    """`Training.run_step` of this package."""
    rates = {"learning_rate": SGD["lr"], "momentum": SGD["momentum"], "weight_decay": SGD["weight_decay"]}
    recipe = TrainRecipe(1000, case.batch_size, **rates)
    training = Training(build(case.student, CLASSES), loss, teacher, make_batches(case), recipe)
    return lambda step: training.run_step()


def build_teacher(case: Case) -> Teacher:
    """The teacher of a pair, asked anew for every batch."""
    return Teacher(build(case.teacher, CLASSES))


def start_timm(case: Case) -> Callable[[int], object]:
    """Timm's task in the loop of its training script."""
    student = timm.create_model(case.student)
    teacher = timm.create_model(case.teacher).requires_grad_(False)
    shares = {"distill_loss_weight": WEIGHT, "task_loss_weight": 1 - WEIGHT}
    task = LogitDistillationTask(student, teacher, nn.CrossEntropyLoss(), temperature=TEMPERATURE, **shares).train()
    optimizer, batches = torch.optim.SGD(student.parameters(), **SGD), make_batches(case)

    def run_step(step: int) -> float:
        batch = batches.at(step)
        loss = task(batch.images, batch.target)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return run_step


def start_plain(case: Case) -> Callable[[int], object]:
    """The loop that one writes by hand."""
    student, teacher = timm.create_model(case.student).train(), timm.create_model(case.teacher).eval()
    optimizer, batches = torch.optim.SGD(student.parameters(), **SGD), make_batches(case)

    def run_step(step: int) -> float:
        batch = batches.at(step)
        with torch.no_grad():
            taught = teacher(batch.images)
        logits = student(batch.images)
        ours, theirs = (log_softmax(each / TEMPERATURE, 1) for each in (logits, taught))
        distillation = kl_div(ours, theirs, reduction="batchmean", log_target=True) * TEMPERATURE**2
        loss = (1 - WEIGHT) * cross_entropy(logits, batch.target) + WEIGHT * distillation
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return run_step


ENGINES: dict[str, Callable[[Case], Callable[[int], object]]] = {
    "lkd": lambda case: start_lkd(case, KDLoss(WEIGHT, TEMPERATURE), build_teacher(case)),
    "timm": start_timm,
    "plain": start_plain,
    "student_alone": lambda case: start_lkd(case, CrossEntropyLoss(), None),
}
CACHED = {
    "student_alone": ENGINES["student_alone"],
    "cached": lambda case: start_lkd(case, KDLoss(WEIGHT, TEMPERATURE), make_cached_teacher(CLASSES, 0)),
    "cached_top_20": lambda case: start_lkd(case, KDLoss(WEIGHT, TEMPERATURE), make_cached_teacher(CLASSES, 20)),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", default=OUT)
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "ENGINE"), help="measure one peak, print it, stop")
    parser.add_argument("--check", action="store_true", help="one pair beside timm and the plain loop, to a quarter")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.check:
        return check_speed(next(iter(CASES)))
    if options.peak:
        print(measure_peak(*options.peak))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        measure_times(options.out / "time.csv", case, ENGINES)
        measure_times(options.out / "cache.csv", case, CACHED)
    measure_losses(options.out / "loss.csv")
    measure_memory(options.out / "memory.csv")
    report(options.out)
    return 0


def check_speed(case: str) -> int:
    """Time the engines of one case anew."""
    with tempfile.TemporaryDirectory() as folder:
        measure_times(path := Path(folder) / "time.csv", case, ENGINES)
        seconds = {engine: median(path, "cpu_seconds", case=case, engine=engine) for engine in ENGINES}
    made = {f"speed_vs_{peer}_{case}": round(seconds[peer] / seconds["lkd"], 4) for peer in ("timm", "plain")}
    return check(read_json(OUT / "result.json")["figures"], made, tolerance=0.25)


def measure_times(path: Path, case: str, engines: dict[str, Callable[[Case], Callable[[int], object]]]) -> None:
    """Time the engines in turn, after rounds that are thrown away."""
    if matching(path, case=case, repeat=REPEATS - 1, engine=list(engines)[-1]):
        return
    runs = {engine: start(CASES[case]) for engine, start in engines.items()}
    for repeat in range(-WARM_UP, REPEATS):
        for engine, run_step in runs.items():
            seconds = time_call(partial(run_step, repeat + WARM_UP))
            if repeat >= 0 and not matching(path, case=case, repeat=repeat, engine=engine):
                write_row(path, TIME_COLUMNS, [case, engine, repeat, seconds])


def measure_losses(path: Path) -> None:
    """Time a loss, forward and backward, on outputs of the real pair, in turn with whole steps with it."""
    losses = {
        "learned": build_learned_loss("logits", {}).requires_grad_(False),
        "kd": KDLoss(WEIGHT, TEMPERATURE),
        "cross_entropy": CrossEntropyLoss(),
    }
    if matching(path, repeat=REPEATS - 1, loss="cross_entropy"):
        return
    student, teacher = torch.randn(2, REAL.batch_size, CLASSES, generator=torch.Generator().manual_seed(0))
    target = torch.arange(REAL.batch_size)
    steps = {name: start_lkd(REAL, loss, build_teacher(REAL)) for name, loss in losses.items()}
    for repeat in range(-WARM_UP, REPEATS):
        for name, loss in losses.items():
            alone = time_call(partial(differentiate, loss, student, teacher, target), calls=20)
            whole = time_call(partial(steps[name], repeat + WARM_UP))
            if repeat >= 0 and not matching(path, loss=name, repeat=repeat):
                write_row(path, LOSS_COLUMNS, [name, repeat, alone, whole])


def differentiate(loss: nn.Module, student: Tensor, teacher: Tensor, target: Tensor) -> None:
    """Forward and backward of a loss down to the student's logits."""
    leaf = student.clone().requires_grad_()
    torch.stack(list(loss(Outputs(leaf, {}), Outputs(teacher, {}), target, 0.3).values())).sum().backward()


def time_call(call: Callable[[], object], calls: int = 1) -> float:
    """Return processor seconds of one call."""
    started = time.process_time()
    for _ in range(calls):
        call()
    return round((time.process_time() - started) / calls, 6)


def measure_memory(path: Path) -> None:
    """Measure every engine's peak in a process of its own."""
    for case in CASES:
        for engine in ENGINES:
            if not matching(path, case=case, engine=engine):
                command = [sys.executable, __file__, "--peak", case, engine]
                process = subprocess.run(
                    command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | RETURN_FREED_MEMORY
                )
                write_row(path, MEMORY_COLUMNS, [case, engine, float(process.stdout)])


def measure_peak(case: str, engine: str) -> float:
    """Return the MiB by which three steps exceed what the process holds with networks, images and libraries."""
    warm = ENGINES[engine](CASES[case]._replace(batch_size=2, pixels=32))
    warm(0)
    del warm
    run_step = ENGINES[engine](CASES[case])
    cost = Cost(torch.device("cpu"))
    with cost.measured():
        for step in range(3):
            run_step(step)
    return round(cost.peak_mib or math.nan, 1)


GOALS = [
    ("images/s ÷ timm's LogitDistillationTask", "speed_vs_timm", 1.0),
    ("images/s ÷ plain loop", "speed_vs_plain", 1.0),
    ("images/s ÷ student's step alone (no teacher, no cache)", "speed_vs_student_alone", None),
    ("images/s with cached answers ÷ student's step alone", "cached_vs_student_only", 0.9),
    ("images/s with cached answers, 20 classes each ÷ student's step alone", "cached_top_20_vs_student_only", 0.9),
    ("peak memory ÷ timm's", "memory_vs_timm", None),
    ("peak memory ÷ plain loop", "memory_vs_plain", None),
]
README = """# Speed of a distillation step

Made by `python benchmarks/distillation_speed.py`; every row is in the CSV files; medians of {repeats}, processor time
on one thread of a CPU, all engines in turn in one process, the same random images through the same `Batches`, the same
SGD (the package's is fused, which gives the same bits; the others take torch's default), KD at temperature 4.

{table}

The default learned loss (over logits, frozen) takes {learned:.2%} of a step ResNet-50 → MobileNet V1 at 224 pixels,
{batch} images, {classes} classes, forward and backward (goal ≤ 2 %: {judged}); KD takes {kd:.2%}, cross-entropy
{ce:.2%}.

Seconds are of a shared machine: trust the ratios, to some 10 %: a cached step does more than the student alone, so that
its ratio above 1 is noise. **Nothing here was measured on a GPU.** There, a loss of many small
operations costs launches rather than arithmetic, and its share depends on the batch: a run's log shows it
(`time_share/loss`).
"""


def report(out: Path) -> None:
    """Write result.json and the README from the rows."""
    figures: dict[str, float] = {}
    lines = ["| | goal | " + " | ".join(CASES) + " |", "|---|---|" + "---|" * len(CASES)]
    for case in CASES:
        seconds = {engine: median(out / "time.csv", "cpu_seconds", case=case, engine=engine) for engine in ENGINES}
        peaks = {engine: median(out / "memory.csv", "peak_mib", case=case, engine=engine) for engine in ENGINES}
        for peer in ("timm", "plain", "student_alone"):
            figures[f"speed_vs_{peer}_{case}"] = seconds[peer] / seconds["lkd"]
            figures[f"memory_vs_{peer}_{case}"] = peaks["lkd"] / peaks[peer]
        figures[f"peak_mib_{case}"] = peaks["lkd"]
        cached = {engine: median(out / "cache.csv", "cpu_seconds", case=case, engine=engine) for engine in CACHED}
        for engine in ("cached", "cached_top_20"):
            figures[f"{engine}_vs_student_only_{case}"] = cached["student_alone"] / cached[engine]
    figures["cached_vs_student_only"] = min(figures[f"cached_vs_student_only_{case}"] for case in CASES)
    for loss in ("learned", "kd", "cross_entropy"):
        loss_seconds, step_seconds = (
            median(out / "loss.csv", column, loss=loss) for column in ("loss_seconds", "step_seconds")
        )
        figures[f"{loss}_share"] = loss_seconds / step_seconds
    for text, key, goal in GOALS:
        cells = [judge(figures[f"{key}_{case}"], goal) for case in CASES]
        lines.append(f"| {text} | {'–' if goal is None else f'≥ {goal:g}'} | {' | '.join(cells)} |")
    text = README.format(
        repeats=REPEATS,
        table="\n".join(lines),
        learned=figures["learned_share"],
        kd=figures["kd_share"],
        ce=figures["cross_entropy_share"],
        batch=REAL.batch_size,
        classes=f"{CLASSES:,}",
        judged="met" if figures["learned_share"] <= 0.02 else "missed",
    )
    write_text(out / "README.md", text)
    rounded = {key: round(value, 4) for key, value in figures.items()}
    write_json(out / "result.json", evidence("python benchmarks/distillation_speed.py", environment(), rounded))


def judge(value: float, goal: float | None) -> str:
    """A figure, and whether it reaches its goal."""
    return f"{value:.3f}" if goal is None else f"{value:.3f} ({'met' if value >= goal else 'missed'})"


if __name__ == "__main__":
    raise SystemExit(main())
