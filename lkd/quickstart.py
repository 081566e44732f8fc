"""The whole path on embedded images: learn a loss in three settings, reuse it on fresh students, compare, report."""

import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from lkd.artifact import load_loss, read_provenance
from lkd.assembly import introduce_network, introduce_teacher, prepare_images
from lkd.comparison import submit
from lkd.comparison_plan import pick_options, plan_report, plan_tuning
from lkd.comparison_results import write_results
from lkd.config import MetaTrainRecipe, QuickstartRecipe
from lkd.evidence import evidence
from lkd.files import read_json, write_json, write_text
from lkd.losses.build import build_loss
from lkd.meta_training import meta_train
from lkd.plots import plot_learned_loss, plot_meta_training, plot_settings
from lkd.quickstart_figures import figures_of, grid_accuracies, regrets
from lkd.quickstart_recipes import SETTINGS, compare_recipe, loss_path, meta_recipe, setting_folder
from lkd.report import compare_regrets, write_quickstart_report
from lkd.run import Run, open_run
from lkd.workers import finish_all, start_workers


def quickstart(recipe: QuickstartRecipe, run: Run) -> Path:
    """Run everything that has not been run yet.

    Returns:
        The HTML page.
    """
    started = time.time()
    meta_recipes = {setting: meta_recipe(recipe, setting, run.path) for setting in SETTINGS}
    compare_recipes = {setting: compare_recipe(recipe, setting, run.path) for setting in SETTINGS}
    first = compare_recipes["clean"]
    images = prepare_images(first.data)
    networks = [
        introduce_teacher(first.teacher, images, run.device),
        *(introduce_network("student", student, images, run.device) for student in first.students),
    ]
    run.say(*networks)
    run.say(
        f"{len(images.train):,} training, {len(images.meta_validation):,} meta-validation, "
        f"{len(images.test):,} test images; three settings, one recipe, {recipe.seeds} paired seeds"
    )
    phases: dict[str, float] = {}
    device = str(run.device)
    with start_workers(recipe.workers) as workers:
        jobs: dict[Future[Any], str] = {
            workers.submit(learn_in_worker, meta): setting
            for setting, meta in meta_recipes.items()
            if not loss_path(run.path, setting).exists()
        }
        for setting, compare in compare_recipes.items():
            jobs |= submit(compare, plan_tuning(compare), setting_folder(run.path, setting), workers, device)
        finish_all(jobs, describe_job, "learn losses, tune KD")
        phases["learn_and_tune"] = time.time() - started
        picks = {
            setting: pick_options(compare, setting_folder(run.path, setting))
            for setting, compare in compare_recipes.items()
        }
        for setting, pick in picks.items():
            run.say(f"{setting}: KD's pick on meta-validation: {pick['KD']}")
        reported: dict[Future[Any], str] = {}
        for setting, compare in compare_recipes.items():
            cells = plan_report(compare, picks[setting])
            reported |= submit(compare, cells, setting_folder(run.path, setting), workers, device)
        finish_all(reported, lambda label, row: None, "train fresh students")
    phases["train_fresh_students"] = time.time() - started - phases["learn_and_tune"]
    tables = {
        setting: write_results(compare, picks[setting], setting_folder(run.path, setting))
        for setting, compare in compare_recipes.items()
    }
    curves = {setting: read_provenance(loss_path(run.path, setting))["curve"] for setting in SETTINGS}
    plot_meta_training(curves, run.path / "meta-training.png")
    for setting, pick in picks.items():
        path = setting_folder(run.path, setting) / "learned-loss.png"
        kd: Any = build_loss(pick["KD"])
        label = f"KD({kd.weight:g}, {kd.temperature:g})"
        learned: Any = load_loss(loss_path(run.path, setting))
        plot_learned_loss(learned, kd, label, path)
    grid, bold = grid_accuracies(compare_recipes, picks, run.path)
    plot_settings(grid, bold, tables, run.path / "quickstart.png")
    regret = compare_regrets(regrets(grid, bold))
    write_text(run.path / "regret.txt", regret + "\n")
    phases["report"] = time.time() - started - sum(phases.values())
    phases = add_earlier_phases(phases, run.path / "phases.json")
    result = evidence(
        "lkd quickstart" + (" --short" if recipe.short else ""),
        run.provenance()["environment"],
        figures_of(tables) | {"seeds": recipe.seeds, "seconds_total": round(sum(phases.values()), 1)},
    )
    write_json(run.path / "result.json", result)
    run.tracker.log(0, **result["figures"])
    page = write_quickstart_report(recipe, run, networks, tables, picks, phases, regret)
    return page


def add_earlier_phases(phases: dict[str, float], path: Path) -> dict[str, float]:
    """Seconds of each phase, with those of earlier sessions of a run that was gone on with."""
    earlier = read_json(path) if path.exists() else {}
    total = {name: seconds + earlier.get(name, 0.0) for name, seconds in phases.items()}
    write_json(path, total)
    return total


def learn_in_worker(recipe: MetaTrainRecipe) -> dict[str, Any]:
    """Meta-train in a worker process."""
    started = time.perf_counter()
    with open_run(recipe, "meta-train", quiet=True) as run:
        path = meta_train(recipe, run)
    return {"path": str(path), "seconds": time.perf_counter() - started}


def describe_job(label: str, result: dict[str, Any]) -> str | None:
    """One line about a learned loss; tuning cells are silent."""
    if "path" not in result:
        return None
    curve = read_provenance(result["path"])["curve"]
    weight, temperature = ([row[f"loss/{name}"] for row in curve] for name in ("weight", "temperature"))
    return (
        f"{label}: loss learned in {result['seconds']:.0f} s: mean weight of the teacher "
        f"{weight[0]:.2f} → {weight[-1]:.2f}, temperature {temperature[0]:.1f} → {temperature[-1]:.1f}"
    )
