"""Is one loss for everybody as good as the best of each world? Train every arm in every world, and keep all figures.

python benchmarks/universal/run.py DATA RUN_DIR [--only WORLDS] [--arms ARMS] [--seeds 4] [--loss NAME=FILE ...]
python benchmarks/universal/run.py DATA --check

--check trains two arms of one world anew, the universal loss among them.

DATA holds the data sets and teachers (README.md). Every training is a row of RUN_DIR/rows.csv, and none is done twice:
a call goes on with what earlier ones left, also from a rows.csv that is all that was kept. The learning rate of each
world is picked on meta-validation with cross-entropy, and the arm `tuned` is the best of a grid of hand-made losses
there. The test split is read once a training, for the rows.
"""

import argparse
import csv
import functools
import itertools
import json
import re
import statistics
import sys
import tempfile
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from checking import SEED_NOISE, check

from lkd.config.evaluation import CompareRecipe
from lkd.config.meta_training import MetaTrainRecipe
from lkd.config.parse import make_recipe, merge
from lkd.config.parts import DataRecipe, ModelRecipe, StudentRecipe, TeacherRecipe, TrainRecipe
from lkd.config.worlds import expand_worlds
from lkd.core.files import flatten, write_json
from lkd.core.tensor_files import read_result
from lkd.core.workers import finish_all, start_workers
from lkd.evaluation.comparison import trials
from lkd.evaluation.comparison.trials import (
    Method,
    Trial,
    TrialInputs,
    hash_content,
    hash_identity,
    open_inputs,
    run_trial,
)
from lkd.losses.learned.trust import Trust, TrustFigures
from lkd.meta_training.meta_train import meta_train
from lkd.models.files import load_network
from lkd.tracking.run import open_run
from lkd.training.answers import measure_teacher

HERE = Path(__file__).parent
EVIDENCE = HERE.parents[1] / "docs" / "evidence" / "universal"
COLUMNS = (
    *("world", "arm", "seed", "learning_rate", "top1", "calibrated_cross_entropy", "meta_validation_top1"),
    *("seconds", "loss", "cell"),
)
RATE, GRID, TUNED = "rate", "grid", "tuned"


@dataclass(frozen=True)
class Arm:
    """What is trained, and in which worlds.

    Attributes:
        loss: The loss; see `place`.
        worlds: A pattern of the worlds' names.
        known: So many of the meta-validation images have known labels; all if None.
        added: Whether those are trained on too.
        told: Whether the loss is told what was measured of the teacher.
        held_out: Whether that is measured on images that are held out; else on the training images.
        seen: Whether the teacher was taught the held-out images too; what it would say of them is taken from the
            training images, which it was taught in the worlds of this arm.
        recipe: Of the meta-training that makes the loss in each world, if one does.
    """

    loss: Method
    worlds: str = "."
    known: int | None = None
    added: bool = False
    told: bool = True
    held_out: bool = True
    seen: bool = False
    recipe: str = ""


Planned = list[tuple[CompareRecipe, Trial, Arm]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("run_dir", type=Path, nargs="?")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--worlds", type=Path, default=HERE / "worlds.yaml", help="another list of worlds")
    parser.add_argument("--only", default=".*", help="worlds whose whole names match")
    parser.add_argument("--arms", default=".*", help="arms whose whole names match")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--loss", action="append", default=[], metavar="NAME=FILE", help="a learned loss, as an arm")
    parser.add_argument("--meta_validation", action="store_true", help="never read the test split, as for choices")
    options = parser.parse_args()
    worlds, rates = read_worlds(options.worlds, options.data)
    if options.check or not options.run_dir:
        return check_world("digits", worlds["digits"])
    worlds = {name: world for name, world in worlds.items() if re.fullmatch(options.only, name)}
    arms, grid = read_arms()
    arms |= {name: Arm(path) for name, path in (each.split("=", 1) for each in options.loss)}
    arms = {name: arm for name, arm in arms.items() if re.fullmatch(options.arms, name)}
    folder = options.run_dir.resolve()
    record = Record(folder)
    with start_workers(options.workers) as workers:
        record.finish(
            workers, [each for name, world in worlds.items() for each in plan_rates(folder / name, world, rates)]
        )
        recipes = {
            name: build_recipe(folder / name, world, pick_rate(record, folder / name, world, rates))
            for name, world in worlds.items()
        }
        tuned = bool(re.fullmatch(options.arms, TUNED))
        if tuned:
            record.finish(workers, [each for recipe in recipes.values() for each in plan_grid(recipe, grid)])
        learn_losses(workers, recipes, arms)
        planned: Planned = []
        for name, recipe in recipes.items():
            own = {label: arm for label, arm in arms.items() if re.search(arm.worlds, name)}
            own |= {TUNED: Arm(pick_tuned(record, recipe, grid))} if tuned else {}
            for seed, (label, arm) in itertools.product(range(options.seeds), own.items()):
                loss = place(arm.loss, folder, name)
                trial = Trial(label, loss, recipe.students[0], seed, not options.meta_validation)
                planned.append((recipe, trial, arm))
        record.finish(workers, sorted(planned, key=lambda each: each[1].seed))
        measured = {name: workers.submit(measure, recipe) for name, recipe in recipes.items()}
        trust = {name: job.result().to_json() for name, job in measured.items()}
    told = options.run_dir / "trust.json"
    write_json(told, (json.loads(told.read_text()) if told.exists() else {}) | trust)
    return 0


def check_world(name: str, world: StudentRecipe) -> int:
    """Train the first seed of two arms anew."""
    torch.set_num_threads(1)
    record, arms = Record(EVIDENCE), read_arms()[0]
    status = 0
    for label in ("KD(0.5, 4)", "universal"):
        committed = next((row for row in record.rows.values() if describe(row)[:4] == [name, label, "0", True]), None)
        if committed is None:
            print(f"{label}: has no row")
            status = 1
            continue
        with tempfile.TemporaryDirectory() as folder:
            recipe = build_recipe(Path(folder) / name, world, float(committed["learning_rate"]))
            trial = Trial(label, arms[label].loss, world.student, 0, True)
            found = train(recipe, trial, arms[label], Path(folder) / "row.json")
        made = {"cell": name_cell(recipe, trial, arms[label]), "top1": found["last"]["top1"]}
        status |= check(committed, made, noise=SEED_NOISE)
    return status


class Record:
    """All trainings that were ever done: a row each, by the name of their cell.

    Args:
        folder: Where rows.csv is.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "rows.csv"
        self.rows: dict[str, dict[str, str]] = {}
        if self.path.exists():
            with self.path.open(newline="") as file:
                self.rows = {row["cell"]: row for row in csv.DictReader(file)}

    def finish(self, workers: Executor, planned: Planned) -> None:
        """Do those trainings that are not done, and add their rows."""
        jobs: dict[Future[Any], str] = {}
        left = [each for each in planned if name_cell(*each) not in self.rows]
        for recipe, trial, arm in left:
            path = locate(recipe, trial, arm)
            if not path.exists():
                name = f"{Path(recipe.run_dir).name}: {trial.method}, seed {trial.seed}"
                jobs[workers.submit(train, recipe, trial, arm, path)] = name
        finish_all(jobs, lambda name, row: f"  {name}: {row['seconds']:.0f} s", "trainings")
        for recipe, trial, arm in left:
            cell = read_result(locate(recipe, trial, arm))
            test = cell.get("last", {})
            figures = (test.get("top1"), test.get("calibrated_cross_entropy"), cell["meta_validation"]["top1"])
            told = ("" if figure is None else f"{figure:.6g}" for figure in figures)
            own = Path(recipe.run_dir).name, trial.method, str(trial.seed), str(recipe.train.learning_rate), *told
            name = name_cell(recipe, trial, arm)
            ends = f"{cell['seconds']:.1f}", json.dumps(trial.loss).replace(str(self.path.parent), "{run}"), name
            row = dict(zip(COLUMNS, (*own, *ends), strict=True))
            self.rows = {cell: kept for cell, kept in self.rows.items() if describe(kept) != describe(row)}
            self.rows[name] = row  # in the place of one of another loss
        self.write()

    def write(self) -> None:
        """Write all rows, in order."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = sorted(self.rows.values(), key=lambda row: (row["world"], row["arm"], int(row["seed"]), row["cell"]))
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)

    def score(self, planned: Planned) -> float:
        """Mean accuracy of trainings on meta-validation."""
        return statistics.fmean(float(self.rows[name_cell(*each)]["meta_validation_top1"]) for each in planned)


def describe(row: dict[str, str]) -> list[Any]:
    """What a row is of: world, arm, seed, whether the test split was read, and, where an arm has several, the loss."""
    own = [row[name] for name in ("world", "arm", "seed")]
    return [*own, bool(row["top1"]), row["loss"] if row["arm"] in (RATE, GRID) else ""]


def name_cell(recipe: CompareRecipe, trial: Trial, arm: Arm) -> str:
    """A training's name: its world, its arm, its seed, and a hash of all that decides its result.

    Of world and student what differs from the defaults, so that an option that comes new to recipes changes no name.
    """
    learned = trial.loss if isinstance(trial.loss, str) else ""
    world = {**asdict(recipe.data), "teacher": asdict(recipe.teacher), "train": asdict(recipe.train)}
    plain = {**asdict(DataRecipe()), "teacher": asdict(TeacherRecipe()), "train": asdict(TrainRecipe())}
    own = {key: value for key, value in flatten(world).items() if flatten(plain).get(key) != value}
    own |= {"root": "", "teacher.path": identify_teacher(recipe.teacher.path)}
    loss = hash_content(learned) or trial.loss
    network = {name: value for name, value in asdict(trial.student).items() if asdict(ModelRecipe())[name] != value}
    identity = [own, network, loss, trial.seed, trial.reported, arm.known, arm.added, arm.told]
    identity += ([] if arm.held_out else ["not held out"]) + (["seen"] if arm.seen else [])
    label = "".join(letter if letter.isalnum() else "-" for letter in trial.method)
    return f"{Path(recipe.run_dir).name}/{label}-{trial.seed}-{hash_identity({'all': identity})}"


@functools.cache
def identify_teacher(path: str) -> Any:
    """How a teacher was trained, where it differs from the defaults; on a CPU of another kind its bits are others."""
    if not Path(path).is_file():
        return path
    told = load_network(Path(path))[1]["provenance"]["recipe"]
    parts = {"data": DataRecipe(), "model": ModelRecipe(), "train": TrainRecipe()}
    plain = flatten({name: asdict(part) for name, part in parts.items()})
    own = flatten({name: told[name] for name in (*parts, "seed")})
    return {name: value for name, value in own.items() if name != "data.root" and plain.get(name) != value}


def locate(recipe: CompareRecipe, trial: Trial, arm: Arm) -> Path:
    """Where a training's result is put."""
    return Path(recipe.run_dir) / "cells" / f"{Path(name_cell(recipe, trial, arm)).name}.json"


def train(recipe: CompareRecipe, trial: Trial, arm: Arm, path: Path) -> dict[str, Any]:
    """A training, with other images, or another trust or none, if the arm says so."""
    inputs = open_inputs(recipe)
    images = inputs.images
    if arm.known is not None or arm.added:
        known = images.meta_validation.select(torch.arange(arm.known or len(images.meta_validation)))
        images = replace(images, meta_validation=known)
    if arm.added:
        pairs = [(getattr(images.train, name), getattr(images.meta_validation, name)) for name in ARRAYS]
        both = {name: torch.cat(pair) for name, pair in zip(ARRAYS, pairs, strict=True)}
        images = replace(images, train=replace(images.train, **both))
    changed = inputs if images is inputs.images else TrialInputs(images, inputs.teacher)
    if not arm.held_out:
        none = replace(inputs.images, meta_validation=inputs.images.meta_validation.select(torch.arange(0)))
        changed = replace(changed, measured={("cpu", 0): measure_teacher(inputs.teacher, none, torch.device("cpu"))})
    if arm.seen:
        cpu = torch.device("cpu")
        told = measure_teacher(inputs.teacher, replace(images, meta_validation=images.train), cpu)
        changed = replace(changed, measured={("cpu", 0): Trust(told.figures, inputs.measure("cpu").looks)})
    if not arm.told:
        changed = replace(changed, measured={("cpu", 0): Trust()})
    with mock.patch.object(trials, "open_inputs", return_value=changed):
        return run_trial(recipe, trial, path)


ARRAYS = ("images", "labels", "index")  # of an image set


def learn_losses(workers: Executor, recipes: dict[str, CompareRecipe], arms: dict[str, Arm]) -> None:
    """Make the losses that arms have in each world by a meta-training of its own."""
    jobs: dict[Future[Any], str] = {}
    for label, arm in arms.items():
        for name, recipe in recipes.items():
            folder = Path(place(arm.loss, Path(recipe.run_dir).parent, name)).parent if arm.recipe else Path()
            if arm.recipe and re.search(arm.worlds, name) and not (folder / "loss.lkd.safetensors").exists():
                jobs[workers.submit(learn, recipe, arm.recipe, folder)] = f"{name}: {label}"
    finish_all(jobs, lambda name, seconds: f"  {name}: {seconds}", "meta-trainings")


def learn(recipe: CompareRecipe, path: str, folder: Path) -> str:
    """A meta-training in a world."""
    content = yaml.safe_load((HERE.parents[1] / path).read_text())
    own = make_recipe(MetaTrainRecipe, content | {"run_dir": str(folder), "resume": "auto", "device": "cpu"})
    own.data, own.teacher, own.student, own.train = recipe.data, recipe.teacher, recipe.students[0], recipe.train
    with open_run(own, "meta-train") as run:
        return str(meta_train(own, run))


def place(loss: Method, run_dir: Path, world: str) -> Any:
    """The loss, with the run's folder and the world in the places of {run} and {world} in a file's name."""
    return loss.format(run=run_dir, world=world) if isinstance(loss, str) else loss


def measure(recipe: CompareRecipe) -> TrustFigures:
    """What a loss is told in this world."""
    return open_inputs(recipe).measure("cpu").figures


def read_worlds(path: Path, data: Path) -> tuple[dict[str, StudentRecipe], list[float]]:
    """The worlds of a list, with the folder of the data in the place of DATA, and the learning rates to try."""
    content = yaml.safe_load(path.read_text().replace("DATA/", f"{data.resolve()}/"))
    shared = merge(content["shared"], {"data": {"root": str(data.resolve())}})
    recipe = make_recipe(MetaTrainRecipe, shared | {"worlds": content["worlds"]})
    return expand_worlds(recipe), content["learning_rates"]


def read_arms() -> tuple[dict[str, Arm], list[Method]]:
    """The arms, and the hand-made losses of the grid."""
    content = yaml.safe_load((HERE / "arms.yaml").read_text())
    arms = {name: Arm(loss) for name, loss in content["arms"].items()}
    return arms | {name: Arm(**options) for name, options in content["changed"].items()}, content["grid"]


def build_recipe(folder: Path, world: StudentRecipe, rate: float) -> CompareRecipe:
    """A comparison in this world at this learning rate."""
    recipe = CompareRecipe(run_dir=str(folder), device="cpu", data=world.data, teacher=world.teacher)
    recipe.students, recipe.train = [world.student], replace(world.train, learning_rate=rate)
    recipe.evaluate_every = world.train.epochs  # at the end only: the last weights are what is reported
    return recipe


def plan_rates(folder: Path, world: StudentRecipe, rates: list[float]) -> Planned:
    """Cross-entropy at each rate, two seeds, scored on meta-validation; none if there is one rate."""
    if len(rates) == 1:
        return []
    methods = [{"name": "cross_entropy", "train": {"learning_rate": rate}} for rate in rates]
    recipe = build_recipe(folder, world, rates[0])
    arms = [(method, seed) for method in methods for seed in (100, 101)]
    return [(recipe, Trial(RATE, method, world.student, seed, False), Arm(method)) for method, seed in arms]


def pick_rate(record: Record, folder: Path, world: StudentRecipe, rates: list[float]) -> float:
    """The rate at which cross-entropy has the highest accuracy on meta-validation."""
    if not (planned := plan_rates(folder, world, rates)):
        return rates[0]
    of = {rate: [each for each in planned if each[1].loss["train"]["learning_rate"] == rate] for rate in rates}  # type: ignore[index]
    return max(rates, key=lambda rate: record.score(of[rate]))


def plan_grid(recipe: CompareRecipe, grid: list[Method]) -> Planned:
    """Each hand-made loss of the grid once, scored on meta-validation."""
    return [(recipe, Trial(GRID, loss, recipe.students[0], 100, False), Arm(loss)) for loss in grid]


def pick_tuned(record: Record, recipe: CompareRecipe, grid: list[Method]) -> Method:
    """The loss of the grid with the highest accuracy on meta-validation."""
    return max(grid, key=lambda loss: record.score(plan_grid(recipe, [loss])))


if __name__ == "__main__":
    raise SystemExit(main())
