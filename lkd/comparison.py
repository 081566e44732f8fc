"""Losses × students × paired seeds, each cell a training of its own; finished cells are kept and never run again."""

import dataclasses
import hashlib
import json
import math
import re
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
from lkd.claims import Watch, claimed
from lkd.comparison_plot import plot_table
from lkd.comparison_table import (
    format_csv,
    format_latex,
    format_options,
    format_table,
    list_cells,
    list_rows,
    summarize,
    tabulate,
)
from lkd.config import CompareRecipe, DataRecipe, ModelRecipe, TeacherRecipe
from lkd.cost import Cost
from lkd.distillation import start_training
from lkd.errors import UserError
from lkd.evaluation import evaluate, guess
from lkd.evidence import evidence
from lkd.files import read_json, write_json, write_text
from lkd.losses.build import LOSSES
from lkd.published import find_published
from lkd.run import Run
from lkd.teacher import load_teacher_network
from lkd.training import DivergedError, TeacherFunction, build_optimizer, build_scheduler
from lkd.tuning import Method, check_tuning, choose_points, expand_grid, split_method
from lkd.workers import finish_all, own_device, start_workers

Row = dict[str, Any]
ROW_FORMAT = 2  # of a cell's result; results of another format are not read


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        method: The method's label.
        loss: What `build_loss` takes, with a `train` of its own where the method has one.
        student: The network.
        seed: Of initial weights and batches; equal seeds are paired over methods.
        reported: Whether the test split is read (a reported number) or only meta-validation (tuning).
    """

    method: str
    loss: Method
    student: ModelRecipe
    seed: int
    reported: bool


def compare(recipe: CompareRecipe, run: Run) -> list[Row]:
    """Tune, train every cell, and write tables, picture, `picks.json` and `result.json`.

    Returns:
        The table's rows.
    """
    images = prepare_images(recipe.data)
    check_methods(recipe, images)
    run.say(*(introduce_network("student", student, images, run.device) for student in recipe.students))
    run.say(introduce_teacher(recipe.teacher, images, run.device))
    on_gpus = run.device.type == "cuda" and run.device.index is None
    with start_workers(recipe.workers or (torch.cuda.device_count() if on_gpus else 0)) as workers:
        finish_cells(recipe, plan_tuning(recipe), run, workers, "tune")
        picks = pick_options(recipe, run.path)
        finish_cells(recipe, plan_report(recipe, picks), run, workers, "train")
    table = write_results(recipe, picks, run.path)
    figures = figures_of(table, recipe.baseline)
    environment = run.provenance()["environment"]
    write_json(run.path / "result.json", evidence("lkd compare", environment, figures))
    run.tracker.log(0, **{f"{row['student']}/{row['method']}/test_last": row["last"][0] for row in table})
    return table


def check_methods(recipe: CompareRecipe, images: Images) -> None:
    """Build every loss once for every student, and every optimiser, so that a mistake shows before any training.

    Raises:
        UserError: If a method, a student, the baseline, the number of seeds or the tuning budget is not good.
    """
    if recipe.baseline not in recipe.methods:
        raise UserError(f"baseline: {recipe.baseline!r} is not one of the methods {', '.join(recipe.methods)}")
    for name in ("seeds", "evaluate_every"):
        if getattr(recipe, name) < 1:
            raise UserError(f"{name}: {getattr(recipe, name)} is not at least 1")
    names = [student.name for student in recipe.students]
    if len(set(names)) < max(1, len(names)):
        raise UserError(f"students: {', '.join(names) or 'none'}; at least one, each name once")
    check_tuning(recipe)
    for label, method in recipe.methods.items():
        for point in expand_grid(method):
            loss, train = split_method(point, recipe.train)
            try:
                for student in recipe.students:
                    prepare_loss(loss, student, recipe.teacher, images, recipe.seed)
                build_scheduler(build_optimizer([torch.zeros(1)], train), train, 1)
            except UserError as error:
                raise UserError(f"methods.{label}: {error}") from error


def plan_tuning(recipe: CompareRecipe) -> list[Cell]:
    """The trainings that tuning needs: the points of every grid, with the first seeds and the first student."""
    points = {label: choose_points(recipe, label) for label in recipe.methods}
    return [
        Cell(label, options, recipe.students[0], recipe.seed + offset, reported=False)
        for offset in range(recipe.tuning_seeds)
        for label in recipe.methods
        for options in points[label]
        if len(points[label]) > 1
    ]


def pick_options(recipe: CompareRecipe, folder: Path) -> dict[str, Method]:
    """Each method's options: the best of its points on meta-validation, in the mean over the tuning seeds.

    By accuracy; calibrated cross-entropy breaks ties.
    """
    cells = plan_tuning(recipe)
    picks: dict[str, Method] = {}
    for label in recipe.methods:
        ranked = []
        for options in choose_points(recipe, label):
            mine = [cell for cell in cells if cell.method == label and cell.loss == options]
            rows = [read_json(cell_path(recipe, cell, folder))["meta_validation"] for cell in mine]
            ranked.append(
                (-sum(row["top1"] for row in rows), sum(row["calibrated_cross_entropy"] for row in rows), options)
            )
        picks[label] = min(ranked, key=lambda entry: entry[:2])[2]
    write_json(folder / "picks.json", picks)
    return picks


def plan_report(recipe: CompareRecipe, picks: dict[str, Method]) -> list[Cell]:
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


def finish_cells(recipe: CompareRecipe, cells: list[Cell], run: Run, workers: ProcessPoolExecutor, title: str) -> None:
    """Train the cells that have no result yet, and wait for those that others who share the run train.

    Raises:
        Interrupted: On Ctrl-C or SIGTERM.
        UserError: If a training fails.
    """
    paths = {cell_path(recipe, cell, run.path): cell for cell in cells}
    watch = Watch()
    told = False
    while missing := [path for path in paths if not path.exists()]:
        claims = {path: claim for path in missing if (claim := watch.free_claim(path))}
        jobs: dict[Future[Any], str] = {
            workers.submit(run_claimed, recipe, paths[path], path, claim, str(run.device)): paths[path].method
            for path, claim in claims.items()
        }
        if jobs:
            finish_all(jobs, describe_row, title)
            told = False
        else:
            if not told:
                run.say(f"waiting for {len(missing)} trainings that other processes are at")
            told = True
            time.sleep(1)


def run_claimed(recipe: CompareRecipe, cell: Cell, path: Path, claim: Path, device: str) -> Row | None:
    """Train one cell if nobody else does; None if someone does, or did."""
    with claimed(path, claim) as ours:
        return run_cell(recipe, cell, path, device) if ours else None


def cell_path(recipe: CompareRecipe, cell: Cell, folder: Path) -> Path:
    """Where a cell's result lies: named by all that decides it, so that a changed recipe never finds an old result."""
    learned = digest_of(cell.loss["name"] if isinstance(cell.loss, dict) else cell.loss)
    identity = {
        "format": ROW_FORMAT,
        "cell": dataclasses.asdict(cell) | ({"loss": learned} if learned else {}),
        "data": dataclasses.asdict(recipe.data) | {"root": None},
        "teacher": dataclasses.asdict(recipe.teacher) | {"path": digest_of(recipe.teacher.path) or recipe.teacher.path},
        "train": dataclasses.asdict(split_method(cell.loss, recipe.train)[1]),
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

    The test split is read only if the cell is reported: at the last and the best epoch. A training that diverges is a
    result too: that of guessing.
    """
    device = own_device(device)
    data, taught = (json.dumps(dataclasses.asdict(part)) for part in (recipe.data, recipe.teacher))
    images = prepare_images_for_cells(data)
    specification, train = split_method(cell.loss, recipe.train)
    loss = prepare_loss(specification, cell.student, recipe.teacher, images, cell.seed)
    teacher = prepare_teacher_for_cells(data, taught, device, read_teacher_stages(loss))
    place = torch.device(device)
    started = time.perf_counter()
    cost = Cost(place)
    training = start_training(
        cell.student, images.train, loss, teacher, train, recipe.data.augmentation, cell.seed, place
    )
    best: dict[str, Any] = {"top1": -1.0}
    best_weights: dict[str, torch.Tensor] = {}
    every = recipe.evaluate_every * training.batches.steps_per_epoch if cell.reported else training.total_steps
    diverged_at = None
    while training.step < training.total_steps:
        left = training.total_steps - training.step
        try:
            with cost.measured():
                for _ in range((left - 1) % every + 1):
                    training.run_step()
        except DivergedError:
            diverged_at = training.step
            figures = {"step": training.step, **guess(images.meta_validation)}
            break
        figures = {"step": training.step, **evaluate(training.student, images.meta_validation, place)}
        if figures["top1"] > best["top1"]:
            best = figures
            best_weights = {name: tensor.clone() for name, tensor in training.student.state_dict().items()}
    row: Row = {
        **dataclasses.asdict(cell),
        "student": cell.student.name,
        "meta_validation": figures,
        "best_step": best.get("step", 0),
        "seconds": time.perf_counter() - started,
        "steps_per_second": training.step / cost.seconds,
        "loss_parameters": sum(parameter.numel() for parameter in training.loss.parameters()),
        "peak_mib": cost.peak_mib,
    }
    if diverged_at is not None:
        row["diverged_at"] = diverged_at
    if cell.reported:
        row["last"] = row["best"] = guess(images.test)
        if diverged_at is None:
            row["last"] = evaluate(training.student, images.test, place)
        if best_weights:
            training.student.load_state_dict(best_weights)
            row["best"] = evaluate(training.student, images.test, place)
    write_json(path, row)
    return row


def describe_row(label: str, row: Row | None) -> str | None:
    """One line about a finished cell."""
    if row is None:
        return None
    figure = row["last"]["top1"] if row["reported"] else row["meta_validation"]["top1"]
    split = "test" if row["reported"] else "meta-validation"
    cell = f"{label}, {row['student']}, seed {row['seed']}, {format_options(row['loss'])}"
    if "diverged_at" in row:
        return f"  {cell}: diverged at step {row['diverged_at']} ({row['seconds']:.0f} s)"
    return f"  {cell}: {figure:.2f} % on {split} ({row['seconds']:.0f} s)"


def write_results(recipe: CompareRecipe, picks: dict[str, Method], folder: Path) -> list[Row]:
    """Write `table.txt`, `table.csv`, `table.tex`, `cells.csv` and `comparison.png` from the finished cells."""
    rows = [read_json(cell_path(recipe, cell, folder)) for cell in plan_report(recipe, picks)]
    tuned = [cell.method for cell in plan_tuning(recipe)]
    table = [
        row | {"tuned_over": tuned.count(row["method"]), "published": published_beside(recipe, row)}
        for row in summarize(rows, recipe.baseline)
    ]
    lines, notes = tabulate(table, recipe.baseline), write_notes(recipe, picks, table) + note_diverged(rows)
    write_text(folder / "table.txt", format_table(lines, notes))
    write_text(folder / "table.csv", format_csv(list_rows(table)))
    write_text(folder / "table.tex", format_latex(lines, notes))
    write_text(folder / "cells.csv", format_csv(list_cells(rows)))
    plot_table(table, recipe.baseline, folder / "comparison.png")
    return table


def published_beside(recipe: CompareRecipe, row: Row) -> dict[str, Any] | None:
    """The published number of a row's protocol, if there is one and the recipe changes nothing about it."""
    loss = row["loss"]["name"] if isinstance(row["loss"], dict) else row["loss"]
    epochs = split_method(row["loss"], recipe.train)[1].epochs
    if recipe.data.label_noise or recipe.teacher.random_answers or loss not in LOSSES:
        return None
    teacher = recipe.teacher.name or load_teacher_network(recipe.teacher.path)[1]["architecture"]["name"]
    return find_published(recipe.data.name, teacher, row["student"], epochs, loss)


def write_notes(recipe: CompareRecipe, picks: dict[str, Method], table: list[Row]) -> list[str]:
    """What a reader of the table must know."""
    notes = [
        f"Test accuracy, mean ± standard error over {recipe.seeds} paired seeds; 95 % interval of the paired "
        "difference by Student's t. Best: the epoch that is best on meta-validation.",
        "Cost: medians over seeds; steps/s and peak memory of the training steps alone, evaluation left out, on a "
        "machine shared by all workers; peak above what images, teacher and loss take.",
    ]
    tuned = {row["method"]: row["tuned_over"] for row in table}
    if any(tuned.values()):
        notes.append(
            f"Tuned over: trainings on {recipe.students[0].name}, {recipe.tuning_seeds} for each point (one a seed), "
            "from which the options below were picked on meta-validation"
            + (f"; the budget was {recipe.tuning_trainings} for each." if recipe.tuning_trainings else ".")
        )
        short = [f"{label} ({count})" for label, count in tuned.items() if count < recipe.tuning_trainings]
        if short:
            notes.append(f"Less than the budget, because there is no more to choose from: {', '.join(short)}.")
        notes += [f"  {label}: {format_options(picks[label])}" for label, count in tuned.items() if count]
    sources = {row["published"]["source"]: None for row in table if row["published"]}
    return [*notes, *(f"Published, students trained on all training images: {source}" for source in sources)]


def note_diverged(rows: list[Row]) -> list[str]:
    """Say which seeds diverged."""
    diverged = [row for row in rows if "diverged_at" in row]
    cells = ", ".join(f"{row['method']} on {row['student']}, seed {row['seed']}" for row in diverged)
    return [f"Diverged, and counted as guessing: {cells}."] if diverged else []


def figures_of(table: list[Row], baseline: str) -> dict[str, float]:
    """The figures of `result.json`: test accuracy, percent, last epoch; the first student's have no student's name."""
    first = table[0]["student"]
    figures: dict[str, float] = {"methods": len({row["method"] for row in table}), "seeds": table[0]["seeds"]}
    for row in table:
        key = figure_key(row["method"]) + ("" if row["student"] == first else f"_{figure_key(row['student'])}")
        minus = f"{key}_minus_{figure_key(baseline)}"
        figures[f"{key}_accuracy"], figures[f"{key}_se"] = row["last"]
        figures[minus] = row["difference"][0]
        figures[f"{minus}_low"], figures[f"{minus}_high"] = row["interval"]
    return {key: round(value, 4) for key, value in figures.items() if not math.isnan(value)}


def figure_key(label: str) -> str:
    """A label as the key of a figure: lower case, underscores for everything but letters and digits."""
    return re.sub(r"\W+", "_", label.lower())
