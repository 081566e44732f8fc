"""Evidence of influence weights: which wrong labels they find, and what they are worth to students.

python benchmarks/influence.py DATA RUN_DIR [--sets rest] [--kinds pairs-0.4] [--losses ce] [--arms REGEX] [--seeds 0 1]
python benchmarks/influence.py DATA RUN_DIR --sets none --out docs/evidence/influence    # table, figures, rows
python benchmarks/influence.py --check

RUN_DIR/rows.csv is the complete record: a row that stands there is not measured again. Choices were made on the
embedded images; `rest` (another part of Fashion-MNIST, in DATA, which the embedded teacher was trained on) and
`cyrillic` (glyphs, DATA/cyrillic.npz, and DATA/teachers/cyrillic-strong/teacher.safetensors) are what is reported.
"""

import argparse
import itertools
import math
import re
import shutil
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
from lkd.core.files import environment, write_json, write_text
from lkd.core.statistics import area_under_curve, mean_and_error
from lkd.data import ImageSet
from lkd.influence.influence import Influence, measure_influence
from lkd.influence.solvers import InfluenceProblem
from lkd.influence.weighted_loss import InfluenceWeightedLoss, save_weights, weigh_examples
from lkd.losses import CrossEntropyLoss, KDLoss
from lkd.tracking.run import evidence
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
NOISE += [(kind, noise) for noise in (0.4, 0.2) for kind in ("pairs", "symmetric", "by_student")]
LOSSES = {"ce": CrossEntropyLoss, "kd": lambda: KDLoss(0.5, 4.0)}
MEASURED: dict[str, dict[str, Any]] = {  # options of influence
    "default": {},
    "unit": {"queries": "unit"},
    "before": {"objective": "calibrated_cross_entropy", "sharpness": 1.0, "gradient": "loss"},
}
ARMS = {
    "none": "no weights: accuracy, %",
    "default": "influence, default",
    "unit": "influence, unit queries",
    "before": "influence, calibrated cross-entropy, sharpness 1, all terms",
    "permuted": "control: the default weights, permuted",
    "small_loss": "control: small loss, at the true rate",
    "oracle": "control: true labels known",
    "added": "control: meta-validation added to training",
    "confident": "control: cleanlab's confident learning",
}
TOLD = ("small_loss", "oracle")  # arms that know how many labels are wrong, or which
SPEED = ["examples", "seconds", "scoring_seconds", "loop_seconds"]
LOOP = 100  # examples of the loop that are timed


def main() -> int:
    if "--check" in sys.argv:
        return check_cell()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("run_dir", type=Path)
    for name, default in {"sets": ".*", "kinds": ".*", "losses": ".*", "arms": "(?!confident).*"}.items():
        parser.add_argument(f"--{name}", default=default, help="those whose whole names match (confident: cleanlab)")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write table, figures and rows there")
    options = parser.parse_args()
    options.run_dir.mkdir(parents=True, exist_ok=True)
    path = options.run_dir / "rows.csv"
    arms = [arm for arm in ARMS if re.fullmatch(options.arms, arm)]
    with ProcessPoolExecutor(options.workers) as workers:
        jobs = []
        for seed, name, (kind, noise), loss in itertools.product(options.seeds, SETS, NOISE, LOSSES):
            chosen = (options.sets, name), (options.kinds, f"{kind}-{noise:g}"), (options.losses, loss)
            cell = {"set": name, "kind": kind, "noise": noise, "loss": loss, "seed": seed}
            left = [arm for arm in arms if not matching(path, **cell, arm=arm) and (noise or arm not in TOLD)]
            if left and all(re.fullmatch(*each) for each in chosen):
                jobs.append(workers.submit(measure, options.data, name, kind, noise, loss, seed, left))
        for job in as_completed(jobs):
            for row in job.result():
                write_row(path, COLUMNS, row)
    if options.out:
        keep_evidence(options.run_dir, options.data, options.out)
    return 0


def check_cell() -> int:
    """Measure one arm of the embedded images anew."""
    row = measure(Path(), "embedded", "pairs", 0.4, "ce", 0, ["default"])[0]
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
    everything = add_meta_validation(images)  # on which the teacher is asked, as one arm trains on it
    teacher = prepare_teacher(open_teacher(teacher_recipe, images.train), everything, CPU)
    if kind == "semi_supervised":
        images = label_by_teacher(images, 4000, teacher, CPU)
    wrong = true != images.train.labels
    network, *plain = train(images, teacher, LOSSES[loss](), seed)
    rows = []
    found: dict[str, Influence] = {}
    for arm in arms:
        started, area = time.process_time(), None
        if arm == "added":
            reached = train(add_meta_validation(images), teacher, LOSSES[loss](), seed)[1:]
        elif arm == "none":
            reached = plain
        else:
            harm, weights = weigh(arm, network, loss, teacher, images, wrong, seed, found)
            known = bool(wrong.any()) and arm not in ("oracle", "permuted")
            area = area_under_curve(harm.numpy(), wrong.numpy()) if known else None
            told = weighted(loss, images, weights, arm)
            reached = plain if bool((weights == 1).all()) else train(images, teacher, told, seed)[1:]
        figures = "" if area is None else f"{area:.4f}", *(f"{value:.3f}" for value in reached)
        rows.append([name, kind, noise, loss, arm, seed, *figures, f"{time.process_time() - started:.1f}"])
    return rows


def weigh(
    arm: str,
    network: nn.Module,
    loss: str,
    teacher: Any,
    images: Images,
    wrong: Tensor,
    seed: int,
    found: dict[str, Influence],
) -> tuple[Tensor, Tensor]:
    """How harmful an arm finds each training image, and its weight, [N] each; what was found is measured once."""
    part, count = images.train, int(wrong.sum())
    if arm == "oracle":
        return wrong.float(), keep(~wrong)
    if arm == "small_loss":
        losses = cross_entropy(answer(network, part), part.labels, reduction="none")
        return losses, keep(losses.argsort().argsort() < len(part) - count)
    if arm == "confident":
        return find_by_confidence(images, teacher, loss, seed)
    settings = InfluenceSettings(**MEASURED.get(arm, {}))
    asked = f"{settings.objective} {settings.queries} {settings.gradient}"
    if asked not in found:
        parts = LOSSES[loss](), teacher, part, images.meta_validation
        found[asked] = measure_influence(network, *parts, CPU, settings, seed=seed)
    scores = found[asked].scores
    weights = weigh_examples(scores, settings)
    if arm == "permuted":
        weights = weights[torch.randperm(len(weights), generator=torch.Generator().manual_seed(seed))]
    return scores, weights


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
        save_weights(path, images.train, weights, weights, {})
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


def measure_speed(data: Path) -> list[float]:
    """Processor seconds of one thread for 12,000 images: influence, its scores alone, a loop of backward passes."""
    torch.set_num_threads(1)
    recipe = DataRecipe(SETS["rest"][0], root=str(data), train_size=12000, meta_validation_size=1000)
    images, loss, settings = prepare_images(recipe), CrossEntropyLoss(), InfluenceSettings()
    network = train(images, None, loss, 0)[0].eval()
    parts = network, loss, None, images.train, images.meta_validation, CPU, settings
    started = time.process_time()
    measure_influence(*parts)
    seconds = time.process_time() - started
    problem = InfluenceProblem(*parts)
    direction = problem.differentiate_validation()
    started = time.process_time()
    problem.project_gradients(direction)
    scoring = time.process_time() - started
    parameters = list(network.parameters())
    started = time.process_time()
    for position in range(LOOP):
        batch = images.train.batch(torch.tensor([position]), CPU)
        gradient = torch.autograd.grad(cross_entropy(network(batch.images).logits, batch.target), parameters)
        sum((left * right).sum() for left, right in zip(gradient, direction, strict=True))
    return [len(images.train), seconds, scoring, (time.process_time() - started) * len(images.train) / LOOP]


# ----------------------------------------------------------------------------------------------------------------------
# Tables and figures.

Cell = dict[str, str]


def list_differences(path: Path, cell: Cell, arm: str, base: str, column: str) -> list[float]:
    """Paired differences of an arm and another, a seed each."""
    others = {row["seed"]: float(row[column]) for row in matching(path, **cell, arm=base)}
    rows = matching(path, **cell, arm=arm)
    return [float(row[column]) - others[row["seed"]] for row in rows if row["seed"] in others]


def list_areas(path: Path, cell: Cell, arm: str) -> list[float]:
    return [float(row["auroc"]) for row in matching(path, **cell, arm=arm) if row["auroc"]]


def show(values: list[float], digits: int = 2, sign: str = "+") -> str:
    """Mean ± standard error, and the number of seeds."""
    if not values:
        return ""
    mean, error = mean_and_error(values)
    spread = "" if math.isnan(error) else f" ± {error:.{digits}f}"
    return f"{mean:{sign}.{digits}f}{spread} ({len(values)})".replace("-", "−")


def draw_tables(path: Path) -> str:
    """Tables of all sets and losses: accuracy and that of the worst class over no weights, and AUROC."""
    rows = read_rows(path)
    lines = ["# Influence weights: all cells", ""]
    lines += ["Points of test accuracy over no weights, mean ± standard error over paired seeds (how many)."]
    titles = {"top1": "accuracy", "worst_class": "accuracy of the worst class", "auroc": "AUROC of wrong labels"}
    for name, loss, column in itertools.product(SETS, LOSSES, titles):
        here = [row for row in rows if (row["set"], row["loss"]) == (name, loss)]
        kinds = [(kind, str(noise)) for kind, noise in NOISE if any(is_of(row, kind, str(noise)) for row in here)]
        lists = []
        for arm, title in ARMS.items():
            of = [{"set": name, "kind": kind, "noise": noise, "loss": loss} for kind, noise in kinds]
            if column == "auroc":
                shown = [show(list_areas(path, cell, arm), 3, "") for cell in of]
            elif arm == "none":
                shown = [show([float(row[column]) for row in matching(path, **cell, arm=arm)], 2, "") for cell in of]
            else:
                shown = [show(list_differences(path, cell, arm, "none", column)) for cell in of]
            if any(shown):
                lists.append([title, *shown])
        if not lists:
            continue
        heads = [f"{kind.replace('_', ' ')}{f', {float(noise):.0%}' if float(noise) else ''}" for kind, noise in kinds]
        lines += ["", f"## {name}, {loss.upper()}: {titles[column]}", "", f"| | {' | '.join(heads)} |"]
        lines += [f"|---|{'---|' * len(heads)}", *(f"| {' | '.join(row)} |" for row in lists)]
    return "\n".join(lines) + "\n"


def is_of(row: Cell, kind: str, noise: str) -> bool:
    return row["kind"] == kind and row["noise"] == noise


def keep_evidence(folder: Path, data: Path, out: Path) -> None:
    """Write table.md, result.json and the rows."""
    path, speed = folder / "rows.csv", folder / "speed.csv"
    if not read_rows(speed):
        write_row(speed, SPEED, measure_speed(data))
    pairs, symmetric = ({"set": "rest", "kind": kind, "noise": "0.4", "loss": "ce"} for kind in ("pairs", "symmetric"))
    lists = {
        "auroc_pairs": list_areas(path, pairs, "default"),
        "auroc_symmetric": list_areas(path, symmetric, "default"),
        "weighted_minus_unweighted_ce_pairs": list_differences(path, pairs, "default", "none", "top1"),
        "weighted_minus_unweighted_ce_symmetric": list_differences(path, symmetric, "default", "none", "top1"),
        "weighted_minus_permuted_pairs": list_differences(path, pairs, "default", "permuted", "top1"),
        "worst_class_gain_pairs": list_differences(path, pairs, "default", "none", "worst_class"),
    }
    reported = [row for row in matching(path, arm="default") if row["set"] != "embedded"]
    cells = sorted({tuple(row[name] for name in COLUMNS[:4]) for row in reported})
    gains = [
        mean_and_error(list_differences(path, dict(zip(COLUMNS, cell, strict=False)), "default", "none", "top1"))
        for cell in cells
    ]
    figures: dict[str, float] = {"seeds": min(len(values) for values in lists.values()), "cells": len(cells)}
    for name, (mean, error) in {
        **{name: mean_and_error(values) for name, values in lists.items()},
        "worst_harm_of_weights": min(gains),
    }.items():
        figures |= {name: round(mean, 4), f"{name}_se": round(error, 4)}
    (took,) = read_rows(speed)
    figures["seconds_12000_examples"] = round(float(took["seconds"]), 1)
    figures["speedup_vs_per_example_loop"] = round(float(took["loop_seconds"]) / float(took["scoring_seconds"]), 1)
    command = "python benchmarks/influence.py DATA RUN_DIR --out docs/evidence/influence"
    write_json(out / "result.json", evidence(command, environment(), figures))
    write_text(out / "table.md", draw_tables(path))
    for each in (path, speed):
        shutil.copyfile(each, out / each.name)


if __name__ == "__main__":
    raise SystemExit(main())
