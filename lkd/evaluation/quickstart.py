"""The whole path on embedded images: the universal loss in three settings beside CE and a KD grid, then adapted."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lkd.config.evaluation import CompareRecipe, QuickstartRecipe
from lkd.config.meta_training import MetaSettings, MetaTrainRecipe, PoolSettings
from lkd.config.parts import DataRecipe, ModelRecipe, TeacherRecipe, TrainRecipe
from lkd.core.files import read_json, write_json, write_text
from lkd.core.tensor_files import read_result
from lkd.core.workers import count_threads, finish_all, start_workers
from lkd.evaluation.comparison.compare import place_trials
from lkd.evaluation.comparison.tables import format_figure, name_method, write_results
from lkd.evaluation.comparison.trials import (
    Trial,
    pick_options,
    plan_report,
    plan_tuning,
    run_trial,
    trial_path,
)
from lkd.evaluation.report.page import render
from lkd.losses.build import build_loss
from lkd.losses.learned.file import SUFFIX, load_loss, read_provenance
from lkd.losses.learned.trust import Trust, TrustFigures
from lkd.meta_training.log import plot_learned_loss, save_figure
from lkd.meta_training.meta_train import meta_train
from lkd.tracking.run import Run, evidence, open_run
from lkd.training.build import choose_student, open_teacher, prepare_images
from lkd.training.introduce import introduce_network, introduce_teacher

# ----------------------------------------------------------------------------------------------------------------------
# The recipes of the quickstart: three settings; the balance that suits one of them fails in another. Clean labels; 40 %
# of the training labels flipped; clean labels with a teacher that answers at random on 60 % of the images.

SETTINGS: dict[str, dict[str, float]] = {
    "clean": {},
    "noisy": {"label_noise": 0.4},
    "bad_teacher": {"random_answers": 0.6},
}
SEEN, UNSEEN = ModelRecipe("small_cnn"), ModelRecipe("small_mobilenet")
LEARNING_RATE = 0.2  # of all losses here: better for each of them than 0.1
GRID = {"weight": [0.2, 0.5, 0.8, 1.0], "temperature": [1.0, 2.0, 4.0]}
ADAPTED = "noisy"  # the setting in which a second student is trained, and the universal loss adapted
UNIVERSAL, GONE_ON = "universal", "adapted"
LEARNING = "learning"


def adapt_recipe(recipe: QuickstartRecipe, folder: Path) -> MetaTrainRecipe:
    """The recipe that goes on learning the universal loss, as configs/embedded/adapt.yaml does."""
    return MetaTrainRecipe(
        run_dir=str(adapted_path(folder).parent),
        resume="auto",
        wandb=dataclasses.replace(recipe.wandb, name=f"{Path(recipe.run_dir).name}-adapted"),
        student=SEEN,
        pool=PoolSettings(students=1, snapshots=2 if recipe.short else 5, max_age=0.8),
        meta=MetaSettings(
            start=UNIVERSAL,
            outer_steps=2 if recipe.short else 8,
            students_per_step=1 if recipe.short else 2,
            rollout_steps=4 if recipe.short else 30,
            outer_batch_size=200 if recipe.short else MetaSettings().outer_batch_size,
            learning_rate=0.01,
            estimator="first_order",
            reuse_every=0 if recipe.short else 8,
            reuse_students=1,
        ),
        **share_fields(recipe, ADAPTED),
    )


def compare_recipe(recipe: QuickstartRecipe, setting: str, folder: Path) -> CompareRecipe:
    """The recipe of one setting's comparison."""
    grid = {"weight": [0.5, 1.0], "temperature": [4.0]} if recipe.short else GRID
    losses: dict[str, Any] = {"CE": "cross_entropy", "KD": {"name": "kd", "grid": grid}, UNIVERSAL: UNIVERSAL}
    if setting == ADAPTED and not was_start_kept(folder):
        losses[GONE_ON] = str(adapted_path(folder))
    return CompareRecipe(
        run_dir=str(folder / setting),
        methods=losses,
        students=[SEEN, UNSEEN] if setting == ADAPTED else [SEEN],
        seeds=recipe.seeds,
        evaluate_every=13,
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


def adapted_path(folder: Path) -> Path:
    """The file of the adapted loss."""
    return folder / "adapted" / f"loss{SUFFIX}"


def was_start_kept(folder: Path) -> bool:
    """Whether adapting made nothing better, so that the adapted loss is the universal one."""
    path = adapted_path(folder)
    return path.exists() and read_provenance(path).get("kept_step") == 0


def figures_of(tables: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """The evidence's figures: test accuracy, percent, mean over seeds, less tuned KD's; and standard errors."""
    figures: dict[str, float] = {}
    for setting, table in tables.items():
        for row in table:
            if row["method"] != "KD":
                name = f"{row['method'].lower()}_{setting}" + ("" if row["student"] == SEEN.name else "_unseen")
                figures[name], figures[f"{name}_se"] = (round(value, 4) for value in row["difference"][:2])
    names = [f"{ADAPTED}{end}" for end in ("", "_unseen") if f"{GONE_ON}_{ADAPTED}{end}" in figures]
    gains = [figures[f"{GONE_ON}_{name}"] - figures[f"{UNIVERSAL}_{name}"] for name in names]
    return figures | {"adapted_gain": round(sum(gains) / len(gains), 4) if gains else 0.0}  # 0 where the start was kept


def grid_accuracies(
    recipes: dict[str, CompareRecipe], picks: dict[str, dict[str, Any]], folder: Path
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Meta-validation accuracy of every fixed KD, of CE and of the universal loss: first seed and student, last step.

    Returns:
        Fixed KD → setting → %, and method → setting → %.
    """
    grid: dict[str, dict[str, float]] = {}
    bold: dict[str, dict[str, float]] = {"CE": {}, UNIVERSAL: {}}
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
        adapted=GONE_ON in picks[ADAPTED],
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
    """Learned losses minus tuned KD and minus CE, by setting and student, whichever way they fell."""
    rows = []
    for setting, table in tables.items():
        last = {(row["student"], row["method"]): row["last"][0] for row in table}
        for row in table:
            if row["method"] not in ("CE", "KD"):
                over_ce = f"{row['last'][0] - last[row['student'], 'CE']:+.2f}"
                difference = format_figure(row["difference"], True)
                rows.append([NAMES[setting], row["student"], row["method"], difference, over_ce])
    return rows


def list_table(table: list[dict[str, Any]]) -> list[list[str]]:
    """One setting's table."""
    return [
        [
            row["student"],
            name_method(row),
            format_figure(row["last"]),
            "" if row["method"] == "KD" else format_figure(row["difference"], True),
        ]
        for row in table
    ]


def compare_regrets(regret: dict[str, float]) -> str:
    """What a fixed choice costs at worst, from the numbers."""
    fixed = {label: value for label, value in regret.items() if label.startswith("KD")}
    steadiest = min(fixed, key=lambda label: fixed[label])
    gap = regret[UNIVERSAL]
    own = f"{gap:.1f} points" if gap >= 0 else f"none, it is at least {-gap:.1f} points better in each"
    return (
        "Largest gap, over the three settings, to the best KD of the setting (meta-validation, first seed): "
        f"the universal loss {own}, without tuning; "
        f"the steadiest of {len(fixed)} fixed KDs, {steadiest}, {fixed[steadiest]:.1f}; "
        f"the worst of them {max(fixed.values()):.1f}; cross-entropy {regret['CE']:.1f}."
    )


def quickstart(recipe: QuickstartRecipe, run: Run) -> Path:
    """Run everything that has not been run yet.

    Returns:
        The HTML page.
    """
    with keep_times(run.path / "phases.json") as begin:
        return run_phases(recipe, run, begin)


@contextmanager
def keep_times(path: Path) -> Iterator[Callable[[str], dict[str, float]]]:
    """Keep the seconds of each phase in a file, to which a run that goes on adds its own.

    Gives what begins a phase, or none by an empty name, and returns the seconds so far.
    """
    seconds: dict[str, float] = read_json(path) if path.exists() else {}
    phase, started = "", 0.0

    def begin(name: str) -> dict[str, float]:
        nonlocal phase, started
        now = time.monotonic()
        if phase:
            seconds[phase] = seconds.get(phase, 0.0) + now - started
            write_json(path, seconds)
        phase, started = name, now
        return seconds

    try:
        yield begin
    finally:
        begin("")


def run_phases(recipe: QuickstartRecipe, run: Run, begin: Callable[[str], dict[str, float]]) -> Path:
    """Tune, train, adapt, report; see `keep_times`."""
    begin("tune_KD")
    compare_recipes = {setting: compare_recipe(recipe, setting, run.path) for setting in SETTINGS}
    first = compare_recipes["clean"]
    images = prepare_images(first.data)
    networks = [
        introduce_teacher(open_teacher(first.teacher, images.train), images, run.device),
        *(
            introduce_network("student", choose_student(student, images.train), images, run.device, first.train)
            for student in (SEEN, UNSEEN)
        ),
    ]
    run.say(*networks)
    run.say(
        f"{len(images.train):,} training, {len(images.meta_validation):,} meta-validation, "
        f"{len(images.test):,} test images; three settings, {recipe.seeds} paired seeds"
    )
    adapted = adapted_path(run.path)
    with start_workers(recipe.workers, run.device, recipe.threads, recipe.plugins) as workers:

        def start(trials: dict[str, list[Trial]]) -> dict[Future[Any], str]:
            """Give the workers what has no result yet."""
            jobs: dict[Future[Any], str] = {}
            for setting, own in trials.items():
                compare = compare_recipes[setting]
                for path, trial in place_trials(compare, own, run.path / setting, run.say).items():
                    if not path.exists():
                        jobs[workers.submit(run_trial, compare, trial, path, str(run.device))] = trial.method
            return jobs

        def describe(label: str, result: dict[str, Any]) -> str | None:
            """Once the loss is adapted, students are trained with it, unless it is the universal one still."""
            if label != LEARNING:
                return None
            waiting = [trial for trial in trials[ADAPTED] if trial.method == GONE_ON]
            if kept := was_start_kept(run.path):
                compare_recipes[ADAPTED] = compare_recipe(recipe, ADAPTED, run.path)
                del picks[ADAPTED][GONE_ON]
            else:
                jobs.update(start({ADAPTED: waiting}))
            better = "was no better on held-out images: the universal loss is kept" if kept else "is adapted"
            return f"{ADAPTED}: the universal loss went on learning for {result['seconds']:.0f} s and {better}"

        jobs = start({setting: plan_tuning(compare) for setting, compare in compare_recipes.items()})
        finish_all(jobs, lambda *_: None, "tune KD")
        begin("train_students_and_adapt")
        picks = {setting: pick_options(compare, run.path / setting) for setting, compare in compare_recipes.items()}
        trials = {setting: plan_report(compare, picks[setting]) for setting, compare in compare_recipes.items()}
        trials[ADAPTED].sort(key=lambda trial: trial.student == SEEN)  # the longest first: no worker is left alone
        jobs = {}
        if not adapted.exists():
            jobs[workers.submit(learn_in_worker, adapt_recipe(recipe, run.path))] = LEARNING
        ready = {
            setting: [trial for trial in own if trial.method != GONE_ON or not jobs]
            for setting, own in sorted(trials.items(), key=lambda pair: pair[0] != ADAPTED)
        }
        jobs |= start(ready)
        finish_all(jobs, describe, "train students, adapt the universal loss")
    begin("report")
    tables = {}
    for setting, compare in compare_recipes.items():
        tables[setting] = write_results(compare, picks[setting], run.path / setting)
        run.say(f"{setting}: {NAMES[setting]}")
        run.say(*(f"  {row['student']}, {row['method']}: {format_figure(row['last'])} %" for row in tables[setting]))
    for setting, pick in picks.items():
        run.say(f"{setting}: picture of the universal loss")
        kd: Any = build_loss(pick["KD"])
        label = f"KD({kd.weight:g}, {kd.temperature:g})"
        told = next(trial for trial in trials[setting] if trial.method == UNIVERSAL)
        figures = read_result(trial_path(compare_recipes[setting], told, run.path / setting))["trust"]
        loss: Any = load_loss(UNIVERSAL, Trust(TrustFigures.from_json(figures)))
        plot_learned_loss(loss, kd, label, run.path / setting / "learned-loss.png", UNIVERSAL)
    run.say("all settings in one picture, and the page")
    grid, bold = grid_accuracies(compare_recipes, picks, run.path)
    plot_settings(grid, bold, tables, run.path / "quickstart.png")
    regret = compare_regrets(regrets(grid, bold))
    write_text(run.path / "regret.txt", regret + "\n")
    phases = begin("")
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
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
    for number, values in enumerate(grid.values()):
        label = f"KD, each of {len(grid)} fixed (weight, temperature)" if number == 0 else None
        left.plot(names, [values[s] for s in settings], color="0.7", lw=1, marker=".", label=label)
    for (method, values), color in zip(bold.items(), ("tab:blue", "tab:red"), strict=False):
        left.plot(names, [values[s] for s in settings], lw=2.2, marker="o", color=color, label=method)
    left.set_ylabel("meta-validation accuracy, %")
    left.set_title("one line for each fixed choice, first seed", fontsize=10)
    left.legend(fontsize=8, frameon=False, loc="lower left")
    methods = list(dict.fromkeys(row["method"] for table in tables.values() for row in table))
    pairs = list(dict.fromkeys((setting, row["student"]) for setting, table in tables.items() for row in table))
    colors = dict(zip(methods, ("tab:blue", "0.45", "tab:red", "tab:green"), strict=False))
    ticks = {place: f"{setting.replace('_', ' ')}\n{student}" for place, (setting, student) in enumerate(pairs)}
    labelled: set[str] = set()
    for place, (setting, student) in enumerate(pairs):
        for row in (row for row in tables[setting] if row["student"] == student):
            mean, error = row["last"]
            right.errorbar(
                place + 0.2 * (methods.index(row["method"]) - (len(methods) - 1) / 2),
                mean,
                0 if error != error else error,
                fmt="osD^"[methods.index(row["method"])],
                capsize=3,
                color=colors[row["method"]],
                label=None if row["method"] in labelled else row["method"],
            )
            labelled.add(row["method"])
    right.set_xticks(list(ticks), list(ticks.values()), fontsize=7)
    right.set_ylabel("test accuracy, %")
    right.set_title("fresh students, mean ± standard error over paired seeds", fontsize=10)
    right.legend(fontsize=8, frameon=False)
    save_figure(figure, path)
