"""Losses × students × paired seeds, each a training of its own; finished ones are kept and never run again."""

import math
import re
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from lkd.balance.balancing import build_balance
from lkd.config.evaluation import CompareRecipe
from lkd.core.errors import UserError
from lkd.core.files import write_json, write_text
from lkd.core.tensor_files import drop_damaged, read_result
from lkd.core.workers import LeaseWatch, finish_all, start_workers
from lkd.evaluation.comparison.tables import (
    find_published,
    format_csv,
    format_latex,
    format_options,
    format_table,
    list_lines,
    list_rows,
    list_trials,
    plot_table,
    summarize,
)
from lkd.evaluation.comparison.trials import (
    Method,
    Row,
    Trial,
    World,
    balance_of,
    check_tuning,
    choose_points,
    expand_grid,
    open_world,
    run_leased,
    run_trial,
    split_method,
    trial_path,
)
from lkd.losses.build import LOSSES
from lkd.models.teacher import load_teacher_network
from lkd.tracking.run import Run, evidence
from lkd.training.build import LossBuilder, choose_student, introduce_network, introduce_teacher
from lkd.training.optimizer import build_optimizer, build_scheduler

# ----------------------------------------------------------------------------------------------------------------------
# Which trials a comparison consists of, and which options tuning picks.


def plan_tuning(recipe: CompareRecipe) -> list[Trial]:
    """The trials that tuning needs: the points of every grid, with the first seeds and the first student."""
    points = {label: choose_points(recipe, label) for label in recipe.methods}
    return [
        Trial(label, options, recipe.students[0], recipe.seed + offset, reported=False)
        for offset in range(recipe.tuning_seeds)
        for label in recipe.methods
        for options in points[label]
        if len(points[label]) > 1
    ]


def pick_options(recipe: CompareRecipe, folder: Path) -> dict[str, Method]:
    """Each method's options: the best of its points on meta-validation, in the mean over the tuning seeds.

    By accuracy; calibrated cross-entropy breaks ties.
    """
    trials = plan_tuning(recipe)
    picks: dict[str, Method] = {}
    for label in recipe.methods:
        ranked = []
        for options in choose_points(recipe, label):
            mine = [trial for trial in trials if trial.method == label and trial.loss == options]
            rows = [read_result(trial_path(recipe, trial, folder))["meta_validation"] for trial in mine]
            ranked.append(
                (-sum(row["top1"] for row in rows), sum(row["calibrated_cross_entropy"] for row in rows), options)
            )
        picks[label] = min(ranked, key=lambda entry: entry[:2])[2]
    write_json(folder / "picks.json", picks)
    return picks


def plan_report(recipe: CompareRecipe, picks: dict[str, Method]) -> list[Trial]:
    """The trials behind the table."""
    return [
        Trial(label, options, student, recipe.seed + offset, reported=True)
        for offset in range(recipe.seeds)
        for student in recipe.students
        for label, options in picks.items()
    ]


# ----------------------------------------------------------------------------------------------------------------------
# What a comparison leaves: tables, picture, notes, figures.


def write_results(recipe: CompareRecipe, picks: dict[str, Method], folder: Path) -> list[Row]:
    """Write `table.txt`, `table.csv`, `table.tex`, `cells.csv` and `comparison.png` from the finished trials."""
    rows = [read_result(trial_path(recipe, trial, folder)) for trial in plan_report(recipe, picks)]
    tuned = [trial.method for trial in plan_tuning(recipe)]
    table = [
        row | {"tuned_over": tuned.count(row["method"]), "published": published_beside(recipe, row)}
        for row in summarize(rows, recipe.baseline)
    ]
    lines, notes = list_lines(table, recipe.baseline), write_notes(recipe, picks, table, rows)
    write_text(folder / "table.txt", format_table(lines, notes))
    write_text(folder / "table.csv", format_csv(list_rows(table)))
    write_text(folder / "table.tex", format_latex(lines, notes))
    write_text(folder / "cells.csv", format_csv(list_trials(rows)))
    plot_table(table, recipe.baseline, folder / "comparison.png")
    return table


def published_beside(recipe: CompareRecipe, row: Row) -> dict[str, Any] | None:
    """The published number of a row's protocol, if there is one and the recipe changes nothing about it."""
    loss = row["loss"]["name"] if isinstance(row["loss"], dict) else row["loss"]
    epochs = split_method(row["loss"], recipe.train)[1].epochs
    if balance_of(row["loss"]) or recipe.data.label_noise or recipe.teacher.random_answers or loss not in LOSSES:
        return None
    teacher = recipe.teacher.name or load_teacher_network(recipe.teacher.path)[1]["architecture"]["name"]
    return find_published(recipe.data.name, teacher, row["student"], epochs, loss)


def write_notes(recipe: CompareRecipe, picks: dict[str, Method], table: list[Row], rows: list[Row]) -> list[str]:
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
    notes += [f"Published, students trained on all training images: {source}" for source in sources]
    diverged = [f"{row['method']} on {row['student']}, seed {row['seed']}" for row in rows if "diverged_at" in row]
    return [*notes, *([f"Diverged, and counted as guessing: {', '.join(diverged)}."] if diverged else [])]


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


# ----------------------------------------------------------------------------------------------------------------------
# The comparison itself.


def compare(recipe: CompareRecipe, run: Run) -> list[Row]:
    """Tune, run every trial, and write tables, picture, `picks.json` and `result.json`.

    Returns:
        The table's rows.
    """
    world = open_world(recipe)
    check_methods(recipe, world)
    students = [choose_student(student, world.images.train) for student in recipe.students]
    run.say(*(introduce_network("student", student, world.images, run.device) for student in students))
    run.say(introduce_teacher(world.teacher, world.images, run.device))
    with start_workers(recipe.workers, run.device) as workers:
        finish_trials(recipe, plan_tuning(recipe), run, workers, "tune")
        picks = pick_options(recipe, run.path)
        finish_trials(recipe, plan_report(recipe, picks), run, workers, "train")
    table = write_results(recipe, picks, run.path)
    figures = figures_of(table, recipe.baseline)
    environment = run.provenance()["environment"]
    write_json(run.path / "result.json", evidence("lkd compare", environment, figures))
    run.tracker.log(0, **{f"{row['student']}/{row['method']}/test_last": row["last"][0] for row in table})
    run.tracker.show(0, "comparison", run.path / "comparison.png")
    return table


def check_methods(recipe: CompareRecipe, world: World) -> None:
    """Build every loss once for every student, and every optimiser, so that a mistake shows before any training.

    Raises:
        UserError: If a method, a student, the baseline or the tuning budget is not good.
    """
    if recipe.baseline not in recipe.methods:
        raise UserError(f"baseline: {recipe.baseline!r} is not one of the methods {', '.join(recipe.methods)}")
    names = [student.name for student in recipe.students]
    if len(set(names)) < max(1, len(names)):
        raise UserError(f"students: {', '.join(names) or 'none'}; at least one, each name once")
    check_tuning(recipe)
    for label, method in recipe.methods.items():
        for point in expand_grid(method):
            loss, train = split_method(point, recipe.train)
            try:
                losses = LossBuilder(loss, world.teacher, world.images)
                for student in recipe.students:
                    built = losses.build(choose_student(student, world.images.train), recipe.seed)
                build_balance(balance_of(point), built)
                build_scheduler(build_optimizer([torch.zeros(1)], train), train, 1)
            except UserError as error:
                raise UserError(f"methods.{label}: {error}") from error


def submit(
    recipe: CompareRecipe, trials: list[Trial], folder: Path, workers: ProcessPoolExecutor, device: str
) -> "dict[Future[Any], str]":
    """Give the trials that have no result yet to the workers."""
    jobs = [(trial, trial_path(recipe, trial, folder)) for trial in trials]
    return {
        workers.submit(run_trial, recipe, trial, path, device): trial.method
        for trial, path in jobs
        if not path.exists()
    }


def finish_trials(
    recipe: CompareRecipe, trials: list[Trial], run: Run, workers: ProcessPoolExecutor, title: str
) -> None:
    """Run the trials that have no result yet, and wait for those that others who share the run are at.

    Raises:
        Interrupted: On Ctrl-C or SIGTERM.
        UserError: If a training fails.
    """
    paths = {trial_path(recipe, trial, run.path): trial for trial in trials}
    drop_damaged(paths, run.say)
    watch = LeaseWatch()
    told = False
    while missing := [path for path in paths if not path.exists()]:
        leases = {path: lease for path in missing if (lease := watch.find_free(path))}
        jobs: dict[Future[Any], str] = {
            workers.submit(run_leased, recipe, paths[path], path, lease, str(run.device)): paths[path].method
            for path, lease in leases.items()
        }
        if jobs:
            finish_all(jobs, describe_row, title)
        else:
            if not told:
                run.say(f"waiting for {len(missing)} trainings that other processes are at")
            time.sleep(1)
        told = not jobs


def describe_row(label: str, row: Row | None) -> str | None:
    """One line about a finished trial."""
    if row is None:
        return None
    split, figures = ("test", row["last"]) if row["reported"] else ("meta-validation", row["meta_validation"])
    trial = f"{label}, {row['student']}, seed {row['seed']}, {format_options(row['loss'])}"
    if "diverged_at" in row:
        return f"  {trial}: diverged at step {row['diverged_at']} ({row['seconds']:.0f} s)"
    return f"  {trial}: {figures['top1']:.2f} % on {split} ({row['seconds']:.0f} s)"
