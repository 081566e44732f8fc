"""Evidence of influence weights: which wrong labels they find, and what they are worth to students.

python benchmarks/influence.py DATA RUN_DIR [--sets REGEX] [--kinds REGEX] [--losses REGEX] [--seeds 5] [--workers 2]
python benchmarks/influence.py --check

RUN_DIR/rows.csv is the complete record: a row that stands there is not measured again. Choices were made on the
embedded images; `rest` (another part of Fashion-MNIST, in DATA, which the embedded teacher was trained on) and
`cyrillic` (glyphs, DATA/cyrillic.npz, and DATA/teachers/cyrillic-strong/teacher.safetensors) are what is reported.
"""

import argparse
import itertools
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from checking import SEED_NOISE, check
from rows import matching, read_rows, write_row
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lkd.config import (
    DataRecipe,
    InfluenceSettings,
    InfluenceWeightedLossSettings,
    ModelRecipe,
    TeacherRecipe,
    TrainRecipe,
)
from lkd.core.statistics import area_under_curve, mean_and_error
from lkd.data import ImageSet
from lkd.influence.influence import measure_influence
from lkd.influence.weighted_loss import InfluenceWeightedLoss, save_weights, weigh_examples
from lkd.losses import CrossEntropyLoss, KDLoss
from lkd.training.answers import prepare_teacher
from lkd.training.build import Images, choose_student, open_teacher, prepare_images
from lkd.training.distill import label_by_teacher, start_training

EVIDENCE = Path(__file__).parents[1] / "docs" / "evidence" / "influence"
CPU = torch.device("cpu")
TRAIN = TrainRecipe(epochs=8)
COLUMNS = ["set", "kind", "noise", "loss", "arm", "seed", "auroc", "top1", "worst_class", "seconds"]
SETS = {
    "embedded": ("embedded", "embedded"),
    "rest": ("fashion_mnist_rest", "embedded"),
    "cyrillic": ("npz/cyrillic", "DATA/teachers/cyrillic-strong/teacher.safetensors"),
}
NOISE = [("clean", 0.0), ("semi_supervised", 0.0)]
NOISE += [(kind, noise) for kind in ("symmetric", "pairs", "by_student") for noise in (0.2, 0.4)]
LOSSES = {"ce": CrossEntropyLoss, "kd": lambda: KDLoss(0.5, 4.0)}
MEASURED: dict[str, dict[str, Any]] = {  # options of influence
    "before": {"objective": "calibrated_cross_entropy", "sharpness": 1.0, "gradient": "loss"},
    "expected_error": {},
    "unit": {"queries": "unit"},
}
ARMS = ["none", *MEASURED, "small_loss", "permuted", "oracle", "added"]


def main() -> int:
    if "--check" in sys.argv:
        return check_cell()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("run_dir", type=Path)
    for name in ("sets", "kinds", "losses"):
        parser.add_argument(f"--{name}", default=".*", help="those whose whole names match")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--confident", action="store_true", help="cleanlab's confident learning too (pip install it)")
    options = parser.parse_args()
    options.run_dir.mkdir(parents=True, exist_ok=True)
    path = options.run_dir / "rows.csv"
    arms = [*ARMS, *(["confident"] if options.confident else [])]
    with ProcessPoolExecutor(options.workers) as workers:
        jobs = []
        for seed, name, (kind, noise), loss in itertools.product(range(options.seeds), SETS, NOISE, LOSSES):
            chosen = (options.sets, name), (options.kinds, kind), (options.losses, loss)
            cell = {"set": name, "kind": kind, "noise": noise, "loss": loss, "seed": seed}
            left = [arm for arm in arms if not matching(path, **cell, arm=arm)]
            if left and all(re.fullmatch(*each) for each in chosen):
                jobs.append(workers.submit(measure, options.data, name, kind, noise, loss, seed, left))
        for job in as_completed(jobs):
            for row in job.result():
                write_row(path, COLUMNS, row)
    summarize(path)
    return 0


def check_cell() -> int:
    """Measure one arm of the embedded images anew."""
    row = measure(Path(), "embedded", "pairs", 0.4, "ce", 0, ["expected_error"])[0]
    made = dict(zip(COLUMNS, row, strict=True))
    committed = matching(EVIDENCE / "rows.csv", **{name: made[name] for name in COLUMNS[:6]})[0]
    return check(committed, {"auroc": made["auroc"]}, noise=0.02) | check(
        committed, {"top1": made["top1"]}, noise=SEED_NOISE
    )


def measure(data: Path, name: str, kind: str, noise: float, loss: str, seed: int, arms: list[str]) -> list[list[Any]]:
    """The rows of these arms, which share the network that influence is measured on."""
    torch.set_num_threads(1)
    source, path = SETS[name]
    flips = {"label_noise": noise, "label_noise_kind": kind} if noise else {}
    size = 11000 if kind == "semi_supervised" else 4000
    split = {"name": source, "root": str(data), "train_size": size, "meta_validation_size": 1000, "split_seed": seed}
    if name == "cyrillic" and kind == "semi_supervised":
        split["train_size"] = 6000
    images = prepare_images(DataRecipe(**split, **flips))
    true = prepare_images(DataRecipe(**split)).train.labels
    teacher_recipe = TeacherRecipe(path=path.replace("DATA", str(data)))
    teacher = prepare_teacher(open_teacher(teacher_recipe, images.train), images, CPU)
    if kind == "semi_supervised":
        images = label_by_teacher(images, 4000, teacher, CPU)
    wrong = true != images.train.labels
    network, *reached = train(images, teacher, LOSSES[loss](), seed)
    rows = []
    for arm in arms:
        started, area = time.process_time(), None
        if arm == "added":
            reached = train(add_meta_validation(images), teacher, LOSSES[loss](), seed)[1:]
        elif arm == "none":
            reached = reached[:2]
        else:
            harm, weights = weigh(arm, network, loss, teacher, images, wrong, seed)
            known = bool(wrong.any()) and arm not in ("oracle", "permuted")
            area = area_under_curve(harm.numpy(), wrong.numpy()) if known else None
            reached = train(images, teacher, weighted(loss, images, weights, arm), seed)[1:]
        figures = "" if area is None else f"{area:.4f}", *(f"{value:.3f}" for value in reached)
        rows.append([name, kind, noise, loss, arm, seed, *figures, f"{time.process_time() - started:.1f}"])
    return rows


def weigh(arm: str, network: nn.Module, loss: str, teacher: Any, images: Images, wrong: Tensor, seed: int):
    """How harmful an arm finds each training image, and its weight, [N] each."""
    part, count = images.train, int(wrong.sum())
    if arm == "oracle":
        return wrong.float(), keep(~wrong)
    if arm == "small_loss":
        losses = cross_entropy(answer(network, part), part.labels, reduction="none")
        return losses, keep(losses.argsort().argsort() < len(part) - count)
    if arm == "confident":
        return find_by_confidence(images, teacher, loss, seed)
    settings = InfluenceSettings(**MEASURED.get(arm, {}))
    found = measure_influence(network, LOSSES[loss](), teacher, part, images.meta_validation, CPU, settings, seed=seed)
    weights = weigh_examples(found.scores, settings)
    if arm == "permuted":
        weights = weights[torch.randperm(len(weights), generator=torch.Generator().manual_seed(seed))]
    return found.scores, weights


def find_by_confidence(images: Images, teacher: Any, loss: str, seed: int) -> tuple[Tensor, Tensor]:
    """Cleanlab's confident learning on the answers of four networks to images that they did not see."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    part = images.train
    answers = torch.zeros(len(part), part.num_classes)
    for fold in range(4):
        held = torch.arange(len(part)) % 4 == fold
        seen = replace(images, train=part.select((~held).nonzero().flatten()))
        network = train(seen, teacher, LOSSES[loss](), seed)[0]
        answers[held] = answer(network, part.select(held.nonzero().flatten())).softmax(1)
    quality = get_label_quality_scores(part.labels.numpy(), answers.numpy())
    issues = find_label_issues(part.labels.numpy(), answers.numpy())
    return -torch.as_tensor(quality), keep(~torch.as_tensor(issues))


def keep(kept: Tensor) -> Tensor:
    """Weights of mean 1 that leave the other images out."""
    return kept.float() / kept.float().mean()


def weighted(loss: str, images: Images, weights: Tensor, arm: str) -> nn.Module:
    """The loss with these weights; those of the settings before weigh all of its terms."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        save_weights(path, images.train.index, weights, weights, {})
        scope = "loss" if arm == "before" else "task"
        settings = InfluenceWeightedLossSettings(weights=str(path), weigh=scope)
        return InfluenceWeightedLoss(LOSSES[loss](), images.meta_validation, settings)


def add_meta_validation(images: Images) -> Images:
    """The control: the clean labels are trained on."""
    pairs = {name: (getattr(images.train, name), getattr(images.meta_validation, name)) for name in ARRAYS}
    return replace(images, train=replace(images.train, **{name: torch.cat(pair) for name, pair in pairs.items()}))


ARRAYS = ("images", "labels", "index")  # of an image set


def train(images: Images, teacher: Any, loss: nn.Module, seed: int) -> tuple[nn.Module, float, float]:
    """A student, its test accuracy and that of its worst class, percent."""
    training = start_training(choose_student(ModelRecipe(), images.train), images, loss, teacher, TRAIN, seed, CPU)
    while training.step < training.total_steps:
        training.run_step()
    right = answer(training.student, images.test).argmax(1) == images.test.labels
    of = [right[images.test.labels == label] for label in range(images.test.num_classes)]
    worst = min(float(own.double().mean()) for own in of if len(own))
    return training.student, 100 * float(right.double().mean()), 100 * worst


@torch.no_grad()
def answer(network: nn.Module, images: ImageSet) -> Tensor:
    """Logits, [N, C]."""
    network.eval()
    return torch.cat(
        [network(batch.images).logits for batch in images.batches(torch.arange(len(images)).split(500), CPU)]
    )


def summarize(path: Path) -> None:
    """Print each arm's paired gain over no weights."""
    rows = read_rows(path)
    keys = sorted({tuple(row[name] for name in COLUMNS[:5]) for row in rows if row["arm"] != "none"})
    for *cell, arm in keys:
        own = dict(zip(COLUMNS[:4], cell, strict=True))
        plain = {row["seed"]: row for row in matching(path, **own, arm="none")}
        pairs = [(row, plain[row["seed"]]) for row in matching(path, **own, arm=arm) if row["seed"] in plain]
        gains = [
            mean_and_error([float(row[name]) - float(base[name]) for row, base in pairs])
            for name in ("top1", "worst_class")
        ]
        areas = [float(row["auroc"]) for row, _ in pairs if row["auroc"]]
        area = f"{sum(areas) / len(areas):.3f}" if areas else ""
        print(*cell, arm, f"{len(pairs)} seeds", *(f"{mean:+.2f} ± {error:.2f}" for mean, error in gains), area)


if __name__ == "__main__":
    raise SystemExit(main())
