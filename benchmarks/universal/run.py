"""Is one loss for everybody as good as the best of each world? Train every arm in every world, and keep all figures.

python benchmarks/universal/run.py DATA RUN_DIR [--only REGEX] [--seeds 4] [--workers 2] [--loss NAME=FILE ...]

DATA holds the data sets and teachers (README.md). Goes on with an interrupted run in RUN_DIR. The learning rate of each
world is picked on meta-validation with cross-entropy; the test split is read once a training, for the rows.
"""

import argparse
import csv
import json
import re
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from lkd.config.evaluation import CompareRecipe
from lkd.config.meta_training import MetaTrainRecipe
from lkd.config.parse import make_recipe, merge
from lkd.config.parts import StudentRecipe
from lkd.config.worlds import expand_worlds
from lkd.core.files import write_json
from lkd.core.tensor_files import read_result
from lkd.core.workers import finish_all, start_workers
from lkd.evaluation.comparison.trials import Method, Trial, open_inputs, run_trial, trial_path
from lkd.losses.learned.trust import TrustFigures

HERE = Path(__file__).parent
FIGURES = ("top1", "calibrated_cross_entropy")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--worlds", type=Path, default=HERE / "worlds.yaml", help="another list of worlds")
    parser.add_argument("--only", default=".", help="worlds whose names match")
    parser.add_argument("--arms", default=".", help="arms whose names match")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--loss", action="append", default=[], metavar="NAME=FILE", help="a learned loss, as another arm"
    )
    options = parser.parse_args()
    worlds, rates = read_worlds(options.worlds, options.data)
    worlds = {name: world for name, world in worlds.items() if re.search(options.only, name)}
    arms = read_arms() | dict(each.split("=", 1) for each in options.loss)
    arms = {name: arm for name, arm in arms.items() if re.search(options.arms, name)}
    cells = options.run_dir.resolve()
    with start_workers(options.workers) as workers:

        def finish(planned: list[tuple[CompareRecipe, Trial]], title: str) -> None:
            jobs: dict[Future[Any], str] = {}
            for recipe, trial in planned:
                path = trial_path(recipe, trial, Path(recipe.run_dir))
                if not path.exists():
                    name = f"{Path(recipe.run_dir).name}: {trial.method}, seed {trial.seed}"
                    jobs[workers.submit(run_trial, recipe, trial, path)] = name
            finish_all(jobs, lambda name, row: f"  {name}: {row['seconds']:.0f} s", title)

        finish([(r, t) for name, w in worlds.items() for r, t in plan_rates(cells / name, w, rates)], "rates")
        planned, recipes = [], {}
        for name, world in worlds.items():
            recipe = build_recipe(cells / name, world, pick_rate(cells / name, world, rates))
            recipes[name], student = recipe, recipe.students[0]
            planned += [(recipe, Trial(a, m, student, s, True)) for a, m in arms.items() for s in range(options.seeds)]
        finish(planned, "arms")
        measured = {name: workers.submit(measure, recipe) for name, recipe in recipes.items()}
        trust = {name: list(job.result()) for name, job in measured.items()}
    write_json(options.run_dir / "trust.json", trust)
    write_rows(options.run_dir / "rows.csv", planned)
    return 0


def measure(recipe: CompareRecipe) -> TrustFigures:
    """What a loss is told in this world."""
    return open_inputs(recipe).measure("cpu").figures


def read_worlds(path: Path, data: Path) -> tuple[dict[str, StudentRecipe], list[float]]:
    """The worlds of a list, with the folder of the data in the place of DATA, and the learning rates to try."""
    content = yaml.safe_load(path.read_text().replace("DATA/", f"{data.resolve()}/"))
    shared = merge(content["shared"], {"data": {"root": str(data.resolve())}})
    recipe = make_recipe(MetaTrainRecipe, shared | {"worlds": content["worlds"]})
    return expand_worlds(recipe), content["learning_rates"]


def read_arms() -> dict[str, Method]:
    """The hand-made arms, those of the grid by their options."""
    content = yaml.safe_load((HERE / "arms.yaml").read_text())
    grid = {f"grid {json.dumps(arm)[1:-1]}": arm for arm in content["grid"]}
    return content["arms"] | grid


def build_recipe(folder: Path, world: StudentRecipe, rate: float) -> CompareRecipe:
    """A comparison in this world at this learning rate."""
    recipe = CompareRecipe(run_dir=str(folder), device="cpu", data=world.data, teacher=world.teacher)
    recipe.students, recipe.train = [world.student], replace(world.train, learning_rate=rate)
    return recipe


def plan_rates(folder: Path, world: StudentRecipe, rates: list[float]) -> list[tuple[CompareRecipe, Trial]]:
    """Cross-entropy at each rate, two seeds, scored on meta-validation."""
    method = [{"name": "cross_entropy", "train": {"learning_rate": rate}} for rate in rates]
    recipe = build_recipe(folder, world, rates[0])
    return [(recipe, Trial("rate", each, world.student, seed, False)) for each in method for seed in (100, 101)]


def pick_rate(folder: Path, world: StudentRecipe, rates: list[float]) -> float:
    """The rate at which cross-entropy has the highest accuracy on meta-validation."""
    scores = dict.fromkeys(rates, 0.0)
    for recipe, trial in plan_rates(folder, world, rates):
        row = read_result(trial_path(recipe, trial, folder))
        scores[trial.loss["train"]["learning_rate"]] += row["meta_validation"]["top1"]  # type: ignore[index]
    return max(scores, key=lambda rate: scores[rate])


def write_rows(path: Path, planned: list[tuple[CompareRecipe, Trial]]) -> None:
    """A row for every training."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["world", "arm", "seed", "learning_rate", *FIGURES, "meta_validation_top1", "seconds"])
        for recipe, trial in planned:
            row = read_result(trial_path(recipe, trial, Path(recipe.run_dir)))
            figures = [f"{row['last'][name]:.6g}" for name in FIGURES]
            own = Path(recipe.run_dir).name, trial.method, trial.seed, recipe.train.learning_rate
            writer.writerow([*own, *figures, f"{row['meta_validation']['top1']:.6g}", f"{row['seconds']:.1f}"])


if __name__ == "__main__":
    raise SystemExit(main())
