"""`--check` of the scripts behind docs/evidence: something of it is made anew and compared with what is committed."""

import csv
import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lkd.config import CompareRecipe
from lkd.evaluation.comparison.trials import Trial, run_trial

SEED_NOISE = 1.5  # points of accuracy: three standard deviations over seeds of the students of these benchmarks


def check(committed: Mapping[str, Any], made: Mapping[str, Any], tolerance: float = 1e-4, noise: float = 0.0) -> int:
    """Say what was committed and what is made now; 0 if every value that was made agrees, else 1.

    Args:
        committed: A row or figures; what was not made anew may be in it too.
        made: The same names.
        tolerance: Of numbers, as part of the committed one: how far they are written out.
        noise: What they may differ by beyond that. A CPU of another kind rounds otherwise, which sets a training on
            another course: then a cell is no more alike than one of another seed.
    """
    differs = 0
    for name, now in made.items():
        before: Any = committed[name]
        try:
            gap, size = abs(float(now) - float(before)), abs(float(before))
        except ValueError:  # text
            gap, size = 0.0 if str(now) == str(before) else math.inf, 0.0
        same, near = gap <= tolerance * size, gap <= noise
        said = "the same" if same else f"within {noise:g}" if near else "DIFFERS"
        print(f"{name}: committed {before}, now {now}: {said}", flush=True)
        differs += not (same or near)
    return int(differs > 0)


def check_trial(recipe: CompareRecipe, cells: Path, method: str, noise: float = SEED_NOISE) -> int:
    """Train a method of a comparison anew, with the first student and seed of its cells.csv and the options picked."""
    torch.set_num_threads(1)
    with cells.open(newline="") as file:
        row = next(each for each in csv.DictReader(file) if each["method"] == method)
    try:
        loss = json.loads(row["loss"])
    except ValueError:
        loss = row["loss"]
    student = next(each for each in recipe.students if each.name == row["student"])
    print(f"{cells}: {method}, {student.name}, seed {row['seed']}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(method, loss, student, int(row["seed"]), reported=True)
        found = run_trial(recipe, trial, Path(folder) / "row.json")
    made = {"test_last": found["last"]["top1"], "meta_validation_last": found["meta_validation"]["top1"]}
    return check(row, made, noise=noise)
