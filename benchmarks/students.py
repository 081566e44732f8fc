r"""Does the universal loss hold for students and optimisers that it never met? A ViT, a ConvNeXt and a CNN.

python -m benchmarks.students DATA RUN_DIR [--only STUDENTS] [--seeds 4] [--workers 2] [--loss NAME=FILE ...] \
    [--out docs/evidence/students]
python -m benchmarks.students DATA --check

DATA is that of benchmarks/universal/README.md. Every training is a row of RUN_DIR/rows.csv, and none is done twice: a
call goes on with what earlier ones left. The test split is read once a training, for the rows. Then resumed trainings
are compared with whole ones, bit by bit, for each of `OPTIMIZERS`, and table and result.json are written of all rows
that are there. --check trains two arms of one student anew, and compares them with the committed rows.
"""

import argparse
import csv
import itertools
import re
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import yaml
from tabulate import tabulate

from benchmarks.checking import SEED_NOISE, check
from benchmarks.universal.run import (
    GRID,
    RATE,
    Arm,
    Planned,
    Record,
    build_recipe,
    name_cell,
    pick_rate,
    pick_tuned,
    plan_grid,
    plan_rates,
    train,
)
from lkd.config import DataRecipe, ModelRecipe, TrainRecipe
from lkd.config.parse import make_recipe, merge
from lkd.config.parts import StudentRecipe
from lkd.core.files import PACKAGE, environment, hash_file, write_json, write_text
from lkd.core.statistics import mean_and_error
from lkd.core.tensor_files import load_checkpoint, save_checkpoint
from lkd.core.workers import start_workers
from lkd.evaluation.comparison.trials import Method, Trial
from lkd.losses import CrossEntropyLoss
from lkd.tracking.run import evidence
from lkd.training.build import choose_student, prepare_images
from lkd.training.distill import start_training
from lkd.training.training import Training

EVIDENCE = Path(__file__).parents[1] / "docs" / "evidence" / "students"
CE, UNIVERSAL, TUNED = "cross-entropy", "universal", "tuned DKD"
OPTIMIZERS = ("sgd", "adam", "adamw", "nadamw", "lamb", "lion", "muon", "adan", "adopt", "adafactorbv", "rmsproptf")
Worlds = dict[str, tuple[StudentRecipe, list[float]]]
"""IMAGES-STUDENT → recipe, and the learning rates to try."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("run_dir", type=Path, nargs="?")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--only", default=".*", help="IMAGES-STUDENT whose whole names match")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--loss", action="append", default=[], metavar="NAME=FILE", help="a learned loss, as an arm")
    parser.add_argument("--out", type=Path, default=EVIDENCE)
    options = parser.parse_args()
    content = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
    content["arms"] |= dict(each.split("=", 1) for each in options.loss)
    worlds = read_worlds(content, options.data.resolve())
    if options.check or not options.run_dir:
        return check_student("fashion-cnn", worlds["fashion-cnn"][0], content["arms"])
    worlds = {name: world for name, world in worlds.items() if re.fullmatch(options.only, name)}
    folder = options.run_dir.resolve()
    train_all(content, worlds, Record(folder), folder, options.seeds, options.workers)
    fraction = statistics.fmean(is_resumed_to_the_bit(name, folder) for name in OPTIMIZERS)
    report(folder, options.out, fraction)
    return 0


def read_worlds(content: dict, data: Path) -> Worlds:
    """Each student on each set of images."""
    worlds: Worlds = {}
    for (images, where), (student, how) in itertools.product(content["images"].items(), content["students"].items()):
        own = {key: value for key, value in how.items() if key != "learning_rates"}
        whole = merge(merge(where, own), {"data": {"root": str(data)}, "device": "cpu"})
        whole["teacher"]["path"] = whole["teacher"]["path"].replace("DATA", str(data))
        worlds[f"{images}-{student}"] = (make_recipe(StudentRecipe, whole), how["learning_rates"])
    return worlds


def check_student(name: str, world: StudentRecipe, losses: dict[str, Method]) -> int:
    """Train the first seed of two arms anew."""
    torch.set_num_threads(1)
    rows = {(row["arm"], row["seed"]): row for row in Record(EVIDENCE).rows.values() if row["world"] == name}
    status = 0
    for label in ("KD(0.5, 4)", UNIVERSAL):
        committed, arm = rows[label, "0"], Arm(losses[label])
        with tempfile.TemporaryDirectory() as folder:
            recipe = build_recipe(Path(folder) / name, world, float(committed["learning_rate"]))
            trial = Trial(label, arm.loss, recipe.students[0], 0, True)
            found = train(recipe, trial, arm, Path(folder) / "row.json")
        made = {"cell": name_cell(recipe, trial, arm), "top1": found["last"]["top1"]}
        status |= check(committed, made, noise=SEED_NOISE)
    return status


def train_all(content: dict, worlds: Worlds, record: Record, folder: Path, seeds: int, workers: int) -> None:
    """Pick learning rates, DKD's options and its own rate on meta-validation, then train all arms with paired seeds.

    Rows of another learning rate, or of options that are no longer the best ones, are dropped.
    """
    with start_workers(workers) as pool:
        rates = {name: plan_rates(folder / name, *each) for name, each in worlds.items()}
        record.finish(pool, [each for planned in rates.values() for each in planned])
        recipes = {
            name: build_recipe(folder / name, world, pick_rate(record, folder / name, world, tried))
            for name, (world, tried) in worlds.items()
        }
        grids = [plan_grid(recipe, content["grid"]) for recipe in recipes.values()]
        record.finish(pool, list(itertools.chain(*grids)))
        finer = {
            name: list_rates(pick_tuned(record, recipe, content["grid"]), recipe.train.learning_rate, worlds[name][1])
            for name, recipe in recipes.items()
        }
        grids += [plan_grid(recipe, finer[name]) for name, recipe in recipes.items()]
        record.finish(pool, list(itertools.chain(*grids)))
        planned: Planned = []
        for name, recipe in recipes.items():
            arms = content["arms"] | {TUNED: pick_tuned(record, recipe, finer[name])}
            for seed, (label, loss) in itertools.product(range(seeds), arms.items()):
                planned.append((recipe, Trial(label, loss, recipe.students[0], seed, True), Arm(loss)))
        record.finish(pool, sorted(planned, key=lambda each: each[1].seed))
    own = {name_cell(*each) for each in itertools.chain(*rates.values(), *grids, planned)}
    record.rows = {cell: row for cell, row in record.rows.items() if cell in own or row["world"] not in worlds}
    record.write()


def list_rates(loss: Any, own: float, rates: list[float]) -> list[Method]:
    """A loss as it is, and at each learning rate but that of its world."""
    return [loss, *({**loss, "train": {"learning_rate": rate}} for rate in rates if rate != own)]


def is_resumed_to_the_bit(optimizer: str, folder: Path) -> bool:
    """Whether a tiny ViT's training that is stopped and gone on with has the bits of a whole one."""
    data = DataRecipe(train_size=200, meta_validation_size=100, augmentation="flip_and_crop", random_erasing=0.25)
    images = prepare_images(data)
    options = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2, "drop_path_rate": 0.1}
    student = choose_student(ModelRecipe("vit_tiny_patch16_224", options=options), images.train)
    train = TrainRecipe(2, 50, optimizer, learning_rate=1e-3, weight_decay=0.05, clip_norm=1.0, label_smoothing=0.1)

    def start() -> Training:
        return start_training(student, images, CrossEntropyLoss(), None, train, 0, torch.device("cpu"))

    whole, path = start(), folder / "resumed.safetensors"
    for step in range(whole.total_steps):
        if step == whole.total_steps // 2:
            save_checkpoint(path, whole.state_dict())
        whole.run_step()
    resumed = start()
    resumed.load_state_dict(load_checkpoint(path))
    path.unlink()
    while resumed.step < resumed.total_steps:
        resumed.run_step()
    pairs = zip(whole.student.state_dict().values(), resumed.student.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def report(folder: Path, out: Path, resumed: float) -> None:
    """Write rows.csv, table.md and result.json of the rows that are there."""
    found: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    text, rates = (folder / "rows.csv").read_text(), {}
    for row in csv.DictReader(text.splitlines()):
        if row["top1"]:
            found[row["world"]][row["arm"]][int(row["seed"])] = float(row["top1"])
            rates[row["world"]] = row["learning_rate"]
    students = sorted({name.partition("-")[2] for name in found})
    figures: dict[str, float] = {
        "students": len(students),
        "optimizers_tested": len(OPTIMIZERS),
        "seeds": min(len(seeds) for arms in found.values() for seeds in arms.values()),
        "resume_bitwise_fraction": resumed,
    }
    for student in students:
        for name, other in (("ce", CE), ("tuned_dkd", TUNED)):
            worlds = [arms for world, arms in found.items() if world.partition("-")[2] == student]
            parts = [compare_paired(arms[UNIVERSAL], arms[other]) for arms in worlds]
            key = f"universal_minus_{name}_{student}"
            figures[key] = round(statistics.fmean(mean for mean, _ in parts), 3)
            figures[f"{key}_se"] = round(sum(error**2 for _, error in parts) ** 0.5 / len(parts), 3)
    arms = [CE, "KD(0.5, 4)", TUNED, UNIVERSAL]
    arms += sorted({arm for own in found.values() for arm in own} - {*arms, RATE, GRID})
    table = [
        [world, rates[world], *(format_mean(own[arm]) if arm in own else "" for arm in arms)]
        for world, own in sorted(found.items())
    ]
    head = ["images-student", "learning rate", *arms]
    write_text(out / "table.md", tabulate(table, head, tablefmt="github", disable_numparse=True) + "\n")
    write_text(out / "rows.csv", text)
    command = "python -m benchmarks.students DATA RUN_DIR"
    loss = hash_file(PACKAGE / "losses/pretrained/universal.lkd.safetensors")
    write_json(out / "result.json", {**evidence(command, environment(), figures), "universal": loss})


def compare_paired(one: dict[int, float], other: dict[int, float]) -> tuple[float, float]:
    """Mean difference over the seeds that both have, points, and its standard error."""
    return mean_and_error([one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())])


def format_mean(top1: dict[int, float]) -> str:
    """Mean and standard error, percent."""
    mean, error = mean_and_error(list(top1.values()))
    return f"{mean:.2f} ± {error:.2f}"


if __name__ == "__main__":
    raise SystemExit(main())
