"""Losses × students × paired seeds, each a training of its own; finished ones are kept and never run again."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from lkd.balance.balancing import build_balance
from lkd.config.evaluation import CompareRecipe
from lkd.core.errors import UserError
from lkd.core.files import write_json
from lkd.core.tensor_files import drop_damaged
from lkd.core.workers import LeaseWatch, finish_all, start_workers
from lkd.evaluation.comparison.tables import UNLEARNED, figure_key, figures_of, write_results
from lkd.evaluation.comparison.trials import (
    Row,
    Trial,
    TrialInputs,
    balance_of,
    check_tuning,
    describe_other_threads,
    expand_grid,
    format_options,
    open_inputs,
    pick_options,
    plan_report,
    plan_tuning,
    run_leased,
    split_method,
    trial_path,
    was_method_learned,
)
from lkd.tracking.run import Run, evidence
from lkd.training.answers import check_same_images
from lkd.training.build import LossBuilder, build_batches, choose_student
from lkd.training.introduce import introduce_images, introduce_network, introduce_teacher
from lkd.training.optimizer import MANY_STEPS, build_optimizer, build_scheduler, check_names
from lkd.training.training import check_settings


def compare(recipe: CompareRecipe, run: Run) -> list[Row]:
    """Tune, run every trial, and write tables, picture, `picks.json` and `result.json`; the table's rows."""
    check_names(recipe.train)
    inputs = open_inputs(recipe)
    check_same_images(inputs.images, run)
    check_methods(recipe, inputs, run.device)
    students = [choose_student(student, inputs.images.train) for student in recipe.students]
    run.say(introduce_images(inputs.images))
    run.say(*(introduce_network("student", student, inputs.images, run.device, recipe.train) for student in students))
    run.say(introduce_teacher(inputs.teacher, inputs.images, run.device))
    for label, method in recipe.methods.items():
        if any(was_method_learned(point) is False for point in expand_grid(method)):
            run.say(f"methods.{label}: {UNLEARNED}")
    with start_workers(recipe.workers, run.device, recipe.threads, recipe.plugins) as workers:
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


def check_methods(recipe: CompareRecipe, inputs: TrialInputs, device: torch.device) -> None:
    """Build every loss once for every student, and every optimiser, so that a mistake shows before any training."""
    if recipe.baseline not in recipe.methods:
        raise UserError(f"baseline: {recipe.baseline!r} is not one of the methods {', '.join(recipe.methods)}")
    keys: dict[str, str] = {}
    for label in recipe.methods:
        if (other := keys.setdefault(figure_key(label), label)) != label:
            raise UserError(f"methods: {other!r} and {label!r} are one name in result.json: rename one")
    names = [student.name for student in recipe.students]
    if len(set(names)) < max(1, len(names)):
        raise UserError(f"students: {', '.join(names) or 'none'}; at least one, each name once")
    check_tuning(recipe)
    networks = [choose_student(student, inputs.images.train).make() for student in recipe.students]
    for label, method in recipe.methods.items():
        for point in expand_grid(method):
            loss, train = split_method(point, recipe.train)
            try:
                losses = LossBuilder(loss, inputs.teacher, inputs.images)
                for student in recipe.students:
                    built = losses.build(choose_student(student, inputs.images.train), recipe.seed)
                balance = build_balance(balance_of(point), built)
                batches = build_batches(inputs.images.train, train, inputs.images.settings, recipe.seed, device)
                check_settings(train, batches, built, balance)
                for network in networks:
                    build_scheduler(build_optimizer(network, train), train, MANY_STEPS)
            except UserError as error:
                raise UserError(f"methods.{label}: {error}") from error


def place_trials(
    recipe: CompareRecipe, trials: list[Trial], folder: Path, say: Callable[..., None]
) -> dict[Path, Trial]:
    """Where the trials' results are, or will be: damaged ones go, and those of other numbers of threads are named."""
    paths = {trial_path(recipe, trial, folder): trial for trial in trials}
    drop_damaged(paths, say)
    say(*describe_other_threads(paths))
    return paths


def finish_trials(
    recipe: CompareRecipe, trials: list[Trial], run: Run, workers: ProcessPoolExecutor, title: str
) -> None:
    """Run the trials that have no result yet, and wait for those that others who share the run are at.

    Raises:
        Interrupted: On Ctrl-C or SIGTERM.
    """
    paths = place_trials(recipe, trials, run.path, run.say)
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
