"""The whole path on embedded images: learn a loss in three settings, reuse it on fresh students, compare, report."""

import dataclasses
import json
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from lkd.config.evaluation import CompareRecipe, QuickstartRecipe
from lkd.config.meta_training import MetaSettings, MetaTrainRecipe, PoolSettings
from lkd.config.parts import DataRecipe, ModelRecipe, TeacherRecipe, TrainRecipe
from lkd.core.files import read_json, write_json, write_text
from lkd.core.tensor_files import read_result
from lkd.core.workers import count_threads, finish_all, start_workers
from lkd.evaluation.comparison.compare import submit
from lkd.evaluation.comparison.tables import UNLEARNED, format_figure, name_method, write_results
from lkd.evaluation.comparison.trials import describe_other_threads, pick_options, plan_report, plan_tuning, trial_path
from lkd.evaluation.report.page import render
from lkd.losses.build import build_loss
from lkd.losses.learned.file import NOT_LEARNED, SUFFIX, load_loss, mark_unlearned, read_provenance
from lkd.meta_training.log import find_kept_row, plot_learned_loss, plt, save_figure
from lkd.meta_training.meta_train import meta_train
from lkd.tracking.run import Run, evidence, open_run
from lkd.training.build import choose_student, introduce_network, introduce_teacher, open_teacher, prepare_images

# ----------------------------------------------------------------------------------------------------------------------
# The recipes of the quickstart: three settings, one recipe; the balance that suits one of them fails in another.
# Clean labels; 40 % of the training labels flipped; clean labels with a teacher that answers at random on 60 % of the
# images.

SETTINGS: dict[str, dict[str, float]] = {
    "clean": {},
    "noisy": {"label_noise": 0.4},
    "bad_teacher": {"random_answers": 0.6},
}
SEEN, UNSEEN = ModelRecipe("small_cnn"), ModelRecipe("small_mobilenet")
LEARNING_RATE = 0.2  # of all losses here: better for each of them than 0.1
GRID = {"weight": [0.2, 0.5, 0.8, 1.0], "temperature": [1.0, 2.0, 4.0, 8.0]}


def meta_recipe(recipe: QuickstartRecipe, setting: str, folder: Path) -> MetaTrainRecipe:
    """The recipe of one setting's meta-training: the defaults, but for the setting itself and the short form."""
    learned = MetaTrainRecipe(
        run_dir=str(loss_path(folder, setting).parent),
        resume="auto",
        wandb=dataclasses.replace(recipe.wandb, name=f"{Path(recipe.run_dir).name}-{setting}"),
        student=SEEN,
        **share_fields(recipe, setting),
    )
    if recipe.short:
        learned.pool = PoolSettings(students=1, snapshots=2)
        learned.meta = MetaSettings(
            outer_steps=2, students_per_step=1, rollout_steps=4, outer_batch_size=200, reuse_every=0
        )
    return learned


def compare_recipe(recipe: QuickstartRecipe, setting: str, folder: Path) -> CompareRecipe:
    """The recipe of one setting's comparison."""
    grid = {"weight": [0.5, 1.0], "temperature": [4.0]} if recipe.short else GRID
    losses: dict[str, Any] = {"CE": {"name": "cross_entropy"}, "KD": {"name": "kd", "grid": grid}}
    return CompareRecipe(
        run_dir=str(folder / setting),
        methods=losses | {"learned": str(loss_path(folder, setting))},
        students=[SEEN, UNSEEN],
        seeds=recipe.seeds,
        evaluate_every=4,
        **share_fields(recipe, setting),
    )


def share_fields(recipe: QuickstartRecipe, setting: str) -> dict[str, Any]:
    """What both have in common: a setting's labels and teacher, and the student's training."""
    size, values = 640 if recipe.short else 4000, SETTINGS[setting]
    train = TrainRecipe(learning_rate=LEARNING_RATE)
    return {
        "seed": recipe.seed,
        "device": recipe.device,
        "threads": recipe.threads,
        "train": dataclasses.replace(train, epochs=2) if recipe.short else train,
        "data": DataRecipe(train_size=size, meta_validation_size=size, label_noise=values.get("label_noise", 0.0)),
        "teacher": TeacherRecipe(random_answers=values.get("random_answers", 0.0)),
    }


def loss_path(folder: Path, setting: str) -> Path:
    """A setting's learned-loss file."""
    return folder / setting / "meta-train" / f"loss{SUFFIX}"


def figures_of(tables: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """The evidence's figures: test accuracy, percent, mean over seeds, and its standard error."""
    figures: dict[str, float] = {}
    for setting, table in tables.items():
        suffix = "" if setting == "clean" else f"_{setting}"
        for row in table:
            name = f"{row['method'].lower()}_{'seen' if row['student'] == SEEN.name else 'unseen'}{suffix}"
            figures[name], figures[f"{name}_se"] = (round(value, 4) for value in row["last"])
    return figures


def grid_accuracies(
    recipes: dict[str, CompareRecipe], picks: dict[str, dict[str, Any]], folder: Path
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Meta-validation accuracy of every fixed KD, of CE and of the learned loss: first seed, seen student, last step.

    Returns:
        Fixed KD → setting → %, and method → setting → %.
    """
    grid: dict[str, dict[str, float]] = {}
    bold: dict[str, dict[str, float]] = {"CE": {}, "learned": {}}
    for setting, recipe in recipes.items():
        for trial in [*plan_tuning(recipe), *plan_report(recipe, picks[setting])]:
            fixed: Any = trial.loss
            if not trial.reported:
                rows = grid.setdefault(f"KD({fixed['weight']:g}, {fixed['temperature']:g})", {})
            elif trial.method in bold and trial.student == SEEN and trial.seed == recipe.seed:
                rows = bold[trial.method]
            else:
                continue
            rows[setting] = read_result(trial_path(recipe, trial, folder / setting))["meta_validation"]["top1"]
    return grid, bold


def regrets(grid: dict[str, dict[str, float]], bold: dict[str, dict[str, float]]) -> dict[str, float]:
    """For each loss, its largest gap over the settings to the best fixed KD of that setting, in points."""
    best = {setting: max(values[setting] for values in grid.values()) for setting in next(iter(grid.values()))}
    return {
        label: max(best[setting] - value for setting, value in values.items())
        for label, values in (grid | bold).items()
    }


# ----------------------------------------------------------------------------------------------------------------------
# The quickstart's page: one self-contained HTML file, no network.

NAMES = {
    "clean": "Clean labels",
    "noisy": "40 % of the training labels flipped",
    "bad_teacher": "Teacher answers at random on 60 % of the images",
}


def write_page(
    recipe: QuickstartRecipe,
    run: Run,
    networks: list[str],
    tables: dict[str, list[dict[str, Any]]],
    picks: dict[str, dict[str, Any]],
    phases: dict[str, float],
    regret: str,
) -> Path:
    """Write RUN_DIR/report.html: `tables` and `picks` are by setting, `phases` are seconds."""
    seconds = phases | {"total": sum(phases.values())}
    page = render(
        "quickstart.html",
        recipe=recipe,
        run=run,
        summary=summarize(tables),
        regret=regret,
        seen=SEEN.name,
        unseen=UNSEEN.name,
        settings=[(setting, NAMES[setting], list_table(tables[setting]), picks[setting]["KD"]) for setting in tables],
        networks=networks,
        phases=[(name.replace("_", " "), f"{value:.0f}") for name, value in seconds.items()],
        config=json.dumps({"recipe": dataclasses.asdict(recipe), **run.provenance()["environment"]}, indent=2),
    )
    write_text(run.path / "report.html", page)
    return run.path / "report.html"


def summarize(tables: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """Learned loss minus tuned KD and minus CE, by setting and student, whichever way they fell."""
    rows = []
    for setting, table in tables.items():
        last = {(row["student"], row["method"]): row["last"][0] for row in table}
        for row in table:
            if row["method"] == "learned":
                over_ce = f"{row['last'][0] - last[row['student'], 'CE']:+.2f}"
                name = mark_unlearned(NAMES[setting], row["learned"])
                rows.append([name, row["student"], format_figure(row["difference"], True), over_ce])
    return rows


def list_table(table: list[dict[str, Any]]) -> list[list[str]]:
    """One setting's table."""
    return [
        [
            row["student"],
            name_method(row),
            format_figure(row["last"]),
            format_figure(row["best"]),
            "" if row["method"] == "KD" else format_figure(row["difference"], True),
        ]
        for row in table
    ]


def compare_regrets(regret: dict[str, float]) -> str:
    """What a fixed choice costs at worst, from the numbers."""
    fixed = {label: value for label, value in regret.items() if label.startswith("KD")}
    steadiest = min(fixed, key=lambda label: fixed[label])
    return (
        "Largest gap, over the three settings, to the best KD of the setting (meta-validation, first seed): "
        f"the learned loss {regret['learned']:.1f} points, without tuning; "
        f"the steadiest of {len(fixed)} fixed KDs, {steadiest}, {fixed[steadiest]:.1f}; "
        f"the worst of them {max(fixed.values()):.1f}; cross-entropy {regret['CE']:.1f}."
    )


def quickstart(recipe: QuickstartRecipe, run: Run) -> Path:
    """Run everything that has not been run yet.

    Returns:
        The HTML page.
    """
    started = time.time()
    compare_recipes = {setting: compare_recipe(recipe, setting, run.path) for setting in SETTINGS}
    first = compare_recipes["clean"]
    images = prepare_images(first.data)
    networks = [
        introduce_teacher(open_teacher(first.teacher, images.train), images, run.device),
        *(
            introduce_network("student", choose_student(student, images.train), images, run.device)
            for student in first.students
        ),
    ]
    run.say(*networks)
    run.say(
        f"{len(images.train):,} training, {len(images.meta_validation):,} meta-validation, "
        f"{len(images.test):,} test images; three settings, one recipe, {recipe.seeds} paired seeds"
    )
    phases: dict[str, float] = {}
    device = str(run.device)
    with start_workers(recipe.workers, threads=recipe.threads) as workers:
        jobs: dict[Future[Any], str] = {
            workers.submit(learn_in_worker, meta_recipe(recipe, setting, run.path)): setting
            for setting in SETTINGS
            if not loss_path(run.path, setting).exists()
        }
        for setting, compare in compare_recipes.items():
            paths = [trial_path(compare, trial, run.path / setting) for trial in plan_tuning(compare)]
            run.say(*describe_other_threads(paths))
            jobs |= submit(compare, plan_tuning(compare), run.path / setting, workers, device)
        finish_all(jobs, describe_job, "learn losses, tune KD")
        phases["learn_and_tune"] = time.time() - started
        picks = {setting: pick_options(compare, run.path / setting) for setting, compare in compare_recipes.items()}
        for setting, pick in picks.items():
            run.say(f"{setting}: KD's pick on meta-validation: {pick['KD']}")
        reported: dict[Future[Any], str] = {}
        for setting, compare in compare_recipes.items():
            trials = plan_report(compare, picks[setting])
            reported |= submit(compare, trials, run.path / setting, workers, device)
        finish_all(reported, lambda label, row: None, "train fresh students")
    phases["train_fresh_students"] = time.time() - started - phases["learn_and_tune"]
    tables = {
        setting: write_results(compare, picks[setting], run.path / setting)
        for setting, compare in compare_recipes.items()
    }
    learned = {setting: read_provenance(loss_path(run.path, setting)) for setting in SETTINGS}
    plot_meta_training({setting: found["curve"] for setting, found in learned.items()}, run.path / "meta-training.png")
    for setting, pick in picks.items():
        kd: Any = build_loss(pick["KD"])
        loss: Any = load_loss(loss_path(run.path, setting))
        label, name = f"KD({kd.weight:g}, {kd.temperature:g})", "learned"
        if not learned[setting].get("learned", True):
            name = NOT_LEARNED
        plot_learned_loss(loss, kd, label, run.path / setting / "learned-loss.png", name)
    grid, bold = grid_accuracies(compare_recipes, picks, run.path)
    plot_settings(grid, bold, tables, run.path / "quickstart.png")
    regret = compare_regrets(regrets(grid, bold))
    write_text(run.path / "regret.txt", regret + "\n")
    phases["report"] = time.time() - started - sum(phases.values())
    earlier = run.path / "phases.json"  # of a run that was gone on with
    if earlier.exists():
        phases = {name: seconds + read_json(earlier).get(name, 0.0) for name, seconds in phases.items()}
    write_json(earlier, phases)
    result = evidence(
        "lkd quickstart" + (" --short" if recipe.short else ""),
        run.provenance()["environment"],
        figures_of(tables)
        | {
            "seeds": recipe.seeds,
            "threads": count_threads(recipe.threads),
            "seconds_total": round(sum(phases.values()), 1),
        },
    )
    write_json(run.path / "result.json", result)
    run.tracker.log(0, **result["figures"])
    return write_page(recipe, run, networks, tables, picks, phases, regret)


def learn_in_worker(recipe: MetaTrainRecipe) -> dict[str, Any]:
    """Meta-train in a worker process."""
    started = time.perf_counter()
    with open_run(recipe, "meta-train", quiet=True) as run:
        path = meta_train(recipe, run)
    return {"path": str(path), "seconds": time.perf_counter() - started}


def describe_job(label: str, result: dict[str, Any]) -> str | None:
    """One line about a learned loss; tuning trials are silent."""
    if "path" not in result:
        return None
    provenance = read_provenance(result["path"])
    if not provenance.get("learned", True):
        return f"{label}: {UNLEARNED} ({result['seconds']:.0f} s)"
    rows = provenance["curve"][0], find_kept_row(provenance["curve"], provenance.get("kept_step"))
    weight, temperature = ([row[f"loss/{name}"] for row in rows] for name in ("weight", "temperature"))
    return (
        f"{label}: loss learned in {result['seconds']:.0f} s: mean weight of the teacher "
        f"{weight[0]:.2f} → {weight[1]:.2f}, temperature {temperature[0]:.1f} → {temperature[1]:.1f}"
    )


def plot_meta_training(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw meta-validation value, hypergradient norm, balance and temperature over the outer steps.

    Args:
        curves: Setting → rows of the meta-training log.
        path: The picture.
    """
    panels = {
        "outer/value": "meta-validation loss after the rollout",
        "outer/hypergradient_norm": "hypergradient norm",
        "loss/weight": "mean weight of the teacher, α",
        "loss/temperature": "mean temperature, τ",
    }
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.2), layout="constrained")
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for setting, rows in curves.items():
            (line,) = axis.plot([row["step"] for row in rows], [row[key] for row in rows], lw=0.8, alpha=0.4)
            values = torch.tensor([row[key] for row in rows], dtype=torch.float64)
            smooth = [values[max(0, i - 4) : i + 1].mean().item() for i in range(len(values))]
            axis.plot([row["step"] for row in rows], smooth, lw=1.8, color=line.get_color(), label=setting)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("outer step")
    axes[1].set_yscale("log")
    axes[0].legend(frameon=False, fontsize=9)
    save_figure(figure, path)


def plot_settings(
    grid: dict[str, dict[str, float]],
    bold: dict[str, dict[str, float]],
    tables: dict[str, list[dict[str, Any]]],
    path: Path,
) -> None:
    """Draw the one picture of the quickstart.

    Args:
        grid: Fixed loss → setting → meta-validation accuracy, %.
        bold: Method → the same, for the methods to stress.
        tables: Setting → rows of its comparison table.
        path: The picture.
    """
    settings = list(tables)
    names = [setting.replace("_", " ") for setting in settings]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained", width_ratios=[1, 1.25])
    for number, values in enumerate(grid.values()):
        label = f"KD, each of {len(grid)} fixed (weight, temperature)" if number == 0 else None
        left.plot(names, [values[s] for s in settings], color="0.7", lw=1, marker=".", label=label)
    for (method, values), color in zip(bold.items(), ("tab:blue", "tab:red"), strict=False):
        left.plot(names, [values[s] for s in settings], lw=2.2, marker="o", color=color, label=method)
    left.set_ylabel("meta-validation accuracy, %")
    left.set_title("one line for each fixed choice, first seed", fontsize=10)
    left.legend(fontsize=8, frameon=False, loc="lower left")
    methods = list(dict.fromkeys(row["method"] for row in tables[settings[0]]))
    students = list(dict.fromkeys(row["student"] for row in tables[settings[0]]))
    colors = dict(zip(methods, ("tab:blue", "0.45", "tab:red", "tab:green"), strict=False))
    ticks: dict[float, str] = {}
    for place, (setting, student) in enumerate((s, n) for s in settings for n in students):
        for offset, method in enumerate(methods):
            (row,) = (r for r in tables[setting] if r["student"] == student and r["method"] == method)
            mean, error = row["last"]
            right.errorbar(
                place + 0.2 * (offset - (len(methods) - 1) / 2),
                mean,
                0 if error != error else error,
                fmt="o",
                capsize=3,
                color=colors[method],
                label=method if place == 0 else None,
            )
        ticks[place] = f"{setting.replace('_', ' ')}\n{student}"
    right.set_xticks(list(ticks), list(ticks.values()), fontsize=7)
    right.set_ylabel("test accuracy, %")
    right.set_title("fresh students, mean ± standard error over paired seeds", fontsize=10)
    right.legend(fontsize=8, frameon=False)
    save_figure(figure, path)
