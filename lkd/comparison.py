"""Losses × students × paired seeds, each cell a training of its own; finished cells are kept and never run again."""

import dataclasses
import hashlib
import itertools
import json
import time
from concurrent.futures import Future, ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from lkd.assembly import (
    Images,
    introduce_network,
    introduce_teacher,
    prepare_images,
    prepare_loss,
    prepare_teacher,
    read_teacher_stages,
)
from lkd.comparison_table import format_table, plot_table, summarize, write_csv
from lkd.config import CompareRecipe, DataRecipe, ModelRecipe, TeacherRecipe
from lkd.distillation import start_training
from lkd.errors import UserError
from lkd.evaluation import evaluate
from lkd.files import read_json, write_json, write_text
from lkd.run import Run
from lkd.training import TeacherFunction
from lkd.workers import finish_all, start_workers

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        method: The method's label.
        loss: What `build_loss` takes.
        student: The network.
        seed: Of initial weights and batches; equal seeds are paired over methods.
        reported: Whether the test split is read (a reported number) or only meta-validation (tuning).
    """

    method: str
    loss: dict[str, Any] | str
    student: ModelRecipe
    seed: int
    reported: bool


def compare(recipe: CompareRecipe, run: Run) -> list[Row]:
    """Tune, train every cell, and write `table.txt`, `cells.csv`, `comparison.png` and `picks.json`.

    Returns:
        The table's rows.
    """
    images = prepare_images(recipe.data)
    check_methods(recipe, images)
    run.say(*(introduce_network("student", student, images, run.device) for student in recipe.students))
    run.say(introduce_teacher(recipe.teacher, images, run.device))
    with start_workers(recipe.workers) as workers:
        finish_all(submit(recipe, plan_tuning(recipe), run.path, workers, str(run.device)), describe_row, "tune")
        picks = pick_options(recipe, run.path)
        finish_all(
            submit(recipe, plan_report(recipe, picks), run.path, workers, str(run.device)), describe_row, "train"
        )
    table = write_results(recipe, picks, run.path)
    run.tracker.log(0, **{f"{row['student']}/{row['method']}/test_last": row["last"][0] for row in table})
    return table


def check_methods(recipe: CompareRecipe, images: Images) -> None:
    """Build every loss once for every student, so that a mistake shows before any training.

    Raises:
        UserError: If a method, the baseline or the number of seeds is not good.
    """
    if recipe.baseline not in recipe.methods:
        raise UserError(f"baseline: {recipe.baseline!r} is not one of the methods {', '.join(recipe.methods)}")
    if recipe.seeds < 1:
        raise UserError(f"seeds: {recipe.seeds} is not at least 1")
    for method in recipe.methods.values():
        for options in expand_grid(method):
            for student in recipe.students:
                prepare_loss(options, student, recipe.teacher, images, recipe.seed)


def expand_grid(method: dict[str, Any] | str) -> list[dict[str, Any] | str]:
    """Every point of a method's grid; the method itself if it has none."""
    if isinstance(method, str) or "grid" not in method:
        return [method]
    fixed = {key: value for key, value in method.items() if key != "grid"}
    names = list(method["grid"])
    return [{**fixed, **dict(zip(names, point, strict=True))} for point in itertools.product(*method["grid"].values())]


def plan_tuning(recipe: CompareRecipe) -> list[Cell]:
    """The trainings that tuning needs: every grid point with the first seed and the first student."""
    return [
        Cell(label, options, recipe.students[0], recipe.seed, reported=False)
        for label, method in recipe.methods.items()
        for options in expand_grid(method)
        if len(expand_grid(method)) > 1
    ]


def pick_options(recipe: CompareRecipe, folder: Path) -> dict[str, dict[str, Any] | str]:
    """Each method's options: the best of its grid on meta-validation.

    By accuracy; calibrated cross-entropy breaks ties.
    """
    picks: dict[str, dict[str, Any] | str] = {}
    for label, method in recipe.methods.items():
        cells = [cell for cell in plan_tuning(recipe) if cell.method == label]
        rows = [(cell, read_json(cell_path(recipe, cell, folder))["meta_validation"]) for cell in cells]
        ranked = sorted(rows, key=lambda row: (-row[1]["top1"], row[1]["calibrated_cross_entropy"]))
        picks[label] = ranked[0][0].loss if ranked else method
    write_json(folder / "picks.json", picks)
    return picks


def plan_report(recipe: CompareRecipe, picks: dict[str, dict[str, Any] | str]) -> list[Cell]:
    """The trainings behind the table."""
    return [
        Cell(label, options, student, recipe.seed + offset, reported=True)
        for offset in range(recipe.seeds)
        for student in recipe.students
        for label, options in picks.items()
    ]


def submit(
    recipe: CompareRecipe, cells: list[Cell], folder: Path, workers: ProcessPoolExecutor, device: str
) -> "dict[Future[Any], str]":
    """Give the cells that have no result yet to the workers."""
    jobs = [(cell, cell_path(recipe, cell, folder)) for cell in cells]
    return {
        workers.submit(run_cell, recipe, cell, path, device): cell.method for cell, path in jobs if not path.exists()
    }


def cell_path(recipe: CompareRecipe, cell: Cell, folder: Path) -> Path:
    """Where a cell's result lies: named by all that decides it, so that a changed recipe never finds an old result."""
    learned = digest_of(cell.loss["name"] if isinstance(cell.loss, dict) else cell.loss)
    identity = {
        "cell": dataclasses.asdict(cell) | ({"loss": learned} if learned else {}),
        "data": dataclasses.asdict(recipe.data) | {"root": None},
        "teacher": dataclasses.asdict(recipe.teacher) | {"path": digest_of(recipe.teacher.path) or recipe.teacher.path},
        "train": dataclasses.asdict(recipe.train),
        "every": recipe.evaluate_every,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    kind = "report" if cell.reported else "tune"
    label = "".join(letter if letter.isalnum() else "-" for letter in cell.method)
    return folder / "cells" / f"{kind}-{label}-{cell.student.name}-seed{cell.seed}-{digest}.json"


def digest_of(path: str) -> str | None:
    """The hash of a file, None where there is none of that name."""
    file = Path(path)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


@lru_cache(maxsize=8)
def prepare_images_for_cells(data: str) -> Images:
    """Images, once a process; the argument is the recipe's JSON."""
    return prepare_images(DataRecipe(**json.loads(data)))


@lru_cache(maxsize=8)
def prepare_teacher_for_cells(data: str, teacher: str, device: str, stages: tuple[str, ...]) -> TeacherFunction:
    """A teacher for the losses that read these stages, once a process; the recipes are JSON."""
    images = prepare_images_for_cells(data)
    recipes = TeacherRecipe(**json.loads(teacher)), DataRecipe(**json.loads(data))
    return prepare_teacher(*recipes, images, torch.device(device), stages)


def run_cell(recipe: CompareRecipe, cell: Cell, path: Path, device: str = "cpu") -> Row:
    """Train one cell and write its result.

    The test split is read only if the cell is reported: at the last and the best epoch.
    """
    data, taught = (json.dumps(dataclasses.asdict(part)) for part in (recipe.data, recipe.teacher))
    images = prepare_images_for_cells(data)
    loss = prepare_loss(cell.loss, cell.student, recipe.teacher, images, cell.seed)
    teacher = prepare_teacher_for_cells(data, taught, device, read_teacher_stages(loss))
    place = torch.device(device)
    started = time.perf_counter()
    training = start_training(
        cell.student,
        images.train,
        loss,
        teacher,
        recipe.train,
        recipe.data.augmentation,
        cell.seed,
        place,
    )
    best: dict[str, Any] = {"top1": -1.0}
    best_weights: dict[str, torch.Tensor] = {}
    every = recipe.evaluate_every * training.batches.steps_per_epoch
    while training.step < training.total_steps:
        training.run_step()
        at_end = training.step == training.total_steps
        if at_end or (cell.reported and (training.total_steps - training.step) % every == 0):
            figures = {"step": training.step, **evaluate(training.student, images.meta_validation, place)}
            if figures["top1"] > best["top1"]:
                best = figures
                best_weights = {name: tensor.clone() for name, tensor in training.student.state_dict().items()}
    row: Row = {
        **dataclasses.asdict(cell),
        "student": cell.student.name,
        "meta_validation": figures,
        "best_step": best["step"],
        "seconds": time.perf_counter() - started,
    }
    if cell.reported:
        row["last"] = evaluate(training.student, images.test, place)
        training.student.load_state_dict(best_weights)
        row["best"] = evaluate(training.student, images.test, place)
    write_json(path, row)
    return row


def describe_row(label: str, row: Row) -> str | None:
    """One line about a finished cell."""
    figure = row["last"]["top1"] if row["reported"] else row["meta_validation"]["top1"]
    split = "test" if row["reported"] else "meta-validation"

    cell = f"{label}, {row['student']}, seed {row['seed']}, {row['loss']}"
    return f"  {cell}: {figure:.2f} % on {split} ({row['seconds']:.0f} s)"


def write_results(recipe: CompareRecipe, picks: dict[str, dict[str, Any] | str], folder: Path) -> list[Row]:
    """Write the table, the CSV and the picture from the finished cells."""
    rows = [read_json(cell_path(recipe, cell, folder)) for cell in plan_report(recipe, picks)]
    table = summarize(rows, recipe.baseline)
    write_csv(rows, folder / "cells.csv")
    write_text(folder / "table.txt", format_table(table, recipe.baseline) + "\n")
    plot_table(table, folder / "comparison.png")
    return table
