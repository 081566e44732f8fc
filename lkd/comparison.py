"""Losses × students × paired seeds, each cell a training of its own; finished cells are kept and never run again."""

import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from lkd.assembly import (
    Images,
    introduce_network,
    introduce_teacher,
    prepare_images,
    prepare_loss,
)
from lkd.balance.build import build_balance
from lkd.cells import Cell, Row, cell_path, run_cell, run_claimed
from lkd.claims import Watch
from lkd.comparison_plan import pick_options, plan_report, plan_tuning
from lkd.comparison_results import figures_of, write_results
from lkd.comparison_table import (
    format_options,
)
from lkd.config import CompareRecipe
from lkd.errors import UserError
from lkd.evidence import evidence
from lkd.files import write_json
from lkd.kept_results import drop_damaged
from lkd.optimization import build_optimizer, build_scheduler
from lkd.run import Run
from lkd.tuning import balance_of, check_tuning, expand_grid, split_method
from lkd.workers import finish_all, start_workers


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
    run.tracker.show(0, "comparison", run.path / "comparison.png")
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
                    built = prepare_loss(loss, student, recipe.teacher, images, recipe.seed)
                build_balance(balance_of(point), built)
                build_scheduler(build_optimizer([torch.zeros(1)], train), train, 1)
            except UserError as error:
                raise UserError(f"methods.{label}: {error}") from error


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
    drop_damaged(paths, run.say)
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
