"""Weights & Biases as code: a workspace for every project, a report of a comparison."""

import csv
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lkd.config.evaluation import DashboardRecipe
from lkd.core.errors import UserError
from lkd.core.files import read_json, write_json
from lkd.tracking.run import shorten_paths
from lkd.tracking.tracker import read_log

# ----------------------------------------------------------------------------------------------------------------------
# What the workspace shows, as data: sections of panels, each of metrics that runs log (docs/tracking.md).

STEP = "step"  # what every metric is drawn over; W&B's own count of log calls means nothing


@dataclass(frozen=True)
class Chart:
    """Lines over a run's steps.

    Attributes:
        title: Shown above.
        metrics: Names of what is drawn.
        pattern: Regular expression (RE2, of the whole name) of what is drawn instead, where names are open-ended.
        unit: Label of the y axis.
        smoothing: Of an exponential moving average, in [0, 1); the original stays visible.
        log_y: Logarithmic y axis.
        bounds: Of the y axis; None leaves it free.
        stacked: Areas on top of each other.
    """

    title: str
    metrics: tuple[str, ...] = ()
    pattern: str | None = None
    unit: str | None = None
    smoothing: float = 0.0
    log_y: bool = False
    bounds: tuple[float | None, float | None] = (None, None)
    stacked: bool = False


@dataclass(frozen=True)
class Pictures:
    """Pictures that a run has logged.

    Attributes:
        title: Shown above.
        metrics: Names that they were logged under.
    """

    title: str
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class Differences:
    """A table of the runs' configs and figures, only what differs."""

    title: str = "What differs between the runs"
    metrics: tuple[str, ...] = ()


Panel = Chart | Pictures | Differences


@dataclass(frozen=True)
class Section:
    """Panels under a heading."""

    title: str
    panels: tuple[Panel, ...]


COMPARISON: tuple[Panel, ...] = (
    Chart("Accuracy on the test split, last epoch", pattern=r"^.+/test_last$", unit="%"),
    Pictures("Comparison", ("comparison",)),
)
SECTIONS = (
    Section(
        "Meta-training",
        (
            Chart("Outer loss after the rollout", ("outer/value",), unit="nats", smoothing=0.8),
            Chart("Reuse: cross-entropy at the best temperature", ("reuse/calibrated_cross_entropy",), unit="nats"),
            Chart("Reuse: accuracy on meta-validation", ("reuse/top1",), unit="%"),
            Chart("Hypergradient norm, before clipping", ("outer/hypergradient_norm",), smoothing=0.6, log_y=True),
            Chart("Signal to noise of the hypergradient", ("outer/signal_to_noise",), smoothing=0.8),
            Chart("Updates clipped, students left out", ("outer/clipped", "outer/left_out"), smoothing=0.9),
            Chart("Audit of first_order: cosine", ("outer/audit_cosine",), bounds=(-1, 1)),
            Chart(
                "Ages of the students", ("outer/progress_least", "outer/progress", "outer/progress_most"), bounds=(0, 1)
            ),
        ),
    ),
    Section(
        "Learned loss",
        (
            Chart("Mean weight of the teacher", ("loss/weight",), smoothing=0.8, bounds=(0, None)),
            Chart("Mean temperature", ("loss/temperature",), smoothing=0.8),
            Chart("Share of each term in the student's gradient", pattern=r"^share/.+$", smoothing=0.6, bounds=(0, 1)),
            Chart("Norm of each part's weights", pattern=r"^weights/.+$"),
            Pictures("What the loss does to a student", ("learned_loss",)),
        ),
    ),
    Section(
        "Distillation",
        (
            Chart("Accuracy on meta-validation", ("meta_validation/top1",), unit="%"),
            Chart(
                "Cross-entropy on meta-validation, at the best temperature",
                ("meta_validation/calibrated_cross_entropy",),
                unit="nats",
            ),
            # Of `loss/TERM` all but a meta-training's `loss/weight` and `loss/temperature`: RE2 cannot look ahead.
            Chart("Terms of the loss", pattern=r"^loss/([^wt].*|t[^e].*)$", smoothing=0.3),
            Chart("Agreement with the teacher on a training batch", ("train/agreement",), unit="%", smoothing=0.6),
            Chart("Balance λ", ("balance",), bounds=(0, None)),
            Chart("Share of each term in the gradient", pattern=r"^share/.+$", smoothing=0.6, bounds=(0, 1)),
            Chart("Gradient norm", ("gradient_norm",), smoothing=0.6, log_y=True),
            Chart("Learning rate", ("learning_rate",)),
        ),
    ),
    Section("Comparison", (*COMPARISON, Differences())),
    Section(
        "System",
        (
            Chart("Images a second", ("images_per_second",), smoothing=0.6, bounds=(0, None)),
            Chart(
                "Where the time of a step goes",
                ("time_share/data", "time_share/teacher", "time_share/student", "time_share/loss"),
                bounds=(0, 1),
                stacked=True,
            ),
        ),
    ),
)


# ----------------------------------------------------------------------------------------------------------------------
# Do panels name what runs log?


def read_names(run: Path) -> set[str]:
    """Names of the metrics that a run has logged, and of the pictures that W&B has kept of it.

    Args:
        run: A run directory.

    Raises:
        UserError: If it holds no log.
    """
    log = run / "log.jsonl"
    if not log.exists():
        raise UserError(f"runs: {run} holds no log.jsonl; give run directories, such as runs/student")
    pictures = run.glob("wandb/*run-*/files/media/images/*_*_*.*")  # NAME_STEP_HASH.png
    logged = {name for row in read_log(log) for name in row}
    return (logged - {"step", "time"}) | {path.name.rsplit("_", 2)[0] for path in pictures}


def find_empty(panel: Panel, names: Iterable[str]) -> list[str]:
    """Which of a panel's metrics, or its pattern, are none of these names."""
    known = set(names)
    missing = [metric for metric in panel.metrics if metric not in known]
    if isinstance(panel, Chart) and panel.pattern and not any(re.fullmatch(panel.pattern, name) for name in known):
        missing.append(panel.pattern)
    return missing


def list_empty(sections: Iterable[Section], names: Iterable[str]) -> list[str]:
    """A line for every panel that would lack something: section, title, what it lacks."""
    known = set(names)
    return [
        f"{section.title}: {panel.title}: {', '.join(missing)}"
        for section in sections
        for panel in section.panels
        if (missing := find_empty(panel, known))
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Panels, as wandb-workspaces has them.

WIDTH, HEIGHT = 8, 6  # of a report's 24 columns


def build_panel(panel: Panel, place: int = 0) -> Any:
    """Build a panel; `place` is its number in a report, which has three in a row."""
    import wandb_workspaces.reports.v2 as reports

    layout = reports.Layout(x=place % 3 * WIDTH, y=place // 3 * HEIGHT, w=WIDTH, h=HEIGHT)
    if isinstance(panel, Pictures):
        return reports.MediaBrowser(
            title=panel.title, media_keys=list(panel.metrics), num_columns=1, gallery_axis="step", layout=layout
        )
    if not isinstance(panel, Chart):
        return reports.RunComparer(diff_only="split", layout=layout)
    return reports.LinePlot(
        title=panel.title,
        x=STEP,
        y=list(panel.metrics),
        metric_regex=panel.pattern,
        title_x=STEP,
        title_y=panel.unit,
        range_y=panel.bounds,
        log_y=panel.log_y or None,
        smoothing_type="exponential" if panel.smoothing else "none",
        smoothing_factor=panel.smoothing or None,
        smoothing_show_original=True if panel.smoothing else None,
        plot_type="stacked-area" if panel.stacked else "line",
        layout=layout,
    )


# ----------------------------------------------------------------------------------------------------------------------
# The report of a finished `lkd compare`: its table, its notes, its recipe, and what W&B has of its run.

NEEDED = ("config.json", "table.csv", "table.txt", "result.json")
COLUMNS = ("student", "method", "last epoch %", "best epoch %", "difference", "95 % interval", "seeds", "tuned over")


def check_comparison(folder: Path) -> None:
    """Check that a folder holds a finished comparison.

    Raises:
        UserError: If it does not.
    """
    missing = [name for name in NEEDED if not (folder / name).exists()]
    if missing:
        raise UserError(f"report: {folder} is no finished comparison, {', '.join(missing)} missing: run lkd compare")
    command = read_json(folder / "config.json")["command"]
    if command != "compare":
        raise UserError(f"report: {folder} is a run of `lkd {command}`; give one of `lkd compare`")


def build_report(folder: Path, entity: str, project: str, known: bool) -> Any:
    """Build the report; nothing is sent.

    Args:
        folder: Run directory of the comparison.
        entity: User or team.
        project: Project name.
        known: Whether W&B can be asked for the project, which ties the panels to it. Else they show the project of the
            report itself.

    Returns:
        wandb-workspaces' `Report`. It has panels only where the comparison was logged to W&B.

    Raises:
        UserError: If the folder holds no finished comparison.
    """
    import wandb_workspaces.reports.v2 as reports

    check_comparison(folder)
    recipe = shorten_paths(read_json(folder / "config.json")["recipe"])
    made = read_json(folder / "result.json")
    blocks = [
        reports.P(describe_comparison(recipe, made)),
        reports.H2("Accuracy on the test split"),
        reports.MarkdownBlock(format_markdown(folder / "table.csv", recipe["baseline"])),
        reports.UnorderedList(read_notes(folder / "table.txt")),
    ]
    if run := find_run(folder):
        project_of_runs = {"entity": entity, "project": project} if known else {}
        runs = reports.Runset(name=folder.name, filters=f"ID = '{run}'", **project_of_runs)
        panels = [build_panel(panel, place) for place, panel in enumerate(COMPARISON)]
        blocks += [reports.H2("As logged"), reports.PanelGrid(runsets=[runs], panels=panels)]
    blocks += [reports.H2("The recipe"), reports.CodeBlock(yaml.safe_dump(recipe, sort_keys=False), language="yaml")]
    return reports.Report(
        entity=entity,
        project=project,
        title=f"Comparison {folder.name}"[:128],
        description=f"Differences to {recipe['baseline']}, seed by seed",
        blocks=blocks,
        width="fluid",
    )


def find_run(folder: Path) -> str | None:
    """The id of the comparison's W&B run; None if it was not logged there."""
    logged = any(folder.glob("wandb/*run-*"))
    return (folder / "wandb_run_id").read_text().strip() if logged else None


def describe_comparison(recipe: dict[str, Any], made: dict[str, Any]) -> str:
    """One sentence: what was compared, with which code."""
    methods, students = ", ".join(recipe["methods"]), ", ".join(student["name"] for student in recipe["students"])
    commit = f"commit {made['commit'][:12]}, " if made["commit"] else ""
    return (
        f"{len(recipe['methods'])} methods ({methods}) × {students} × {recipe['seeds']} paired seeds on "
        f"{recipe['data']['name']}, {recipe['train']['epochs']} epochs. Made by `{made['command']}`, {commit}"
        f"lkd {made['versions']['lkd']}, torch {made['versions']['torch']}."
    )


def format_markdown(path: Path, baseline: str) -> str:
    """The comparison's `table.csv` as a Markdown table."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            compared = row["method"] != baseline
            lines.append(
                (
                    *(row["student"], row["method"], show(row, "{:.2f}", "last"), show(row, "{:.2f}", "best")),
                    show(row, "{:+.2f}", "difference") if compared else "",
                    show(row, "{:+.2f} to {:+.2f}", "interval_low", "interval_high") if compared else "",
                    *(row["seeds"], row["tuned_over"]),
                )
            )
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def show(row: dict[str, str], form: str, *keys: str) -> str:
    """Numbers of a row, with the standard error where there is one; nothing where a number is missing."""
    if not all(row[key] for key in keys):
        return ""
    error = row.get(f"{keys[0]}_se")
    return form.format(*(float(row[key]) for key in keys)) + (f" ± {float(error):.2f}" if error else "")


def read_notes(path: Path) -> list[str]:
    """What `table.txt` says below its table."""
    _, _, notes = path.read_text(encoding="utf-8").partition("\n\n")
    return [line.strip() for line in notes.splitlines() if line.strip()]


# ----------------------------------------------------------------------------------------------------------------------
# The workspace: a saved view of a project's runs.


def build_workspace(entity: str, project: str, name: str, sections: Iterable[Section] = SECTIONS) -> Any:
    """Build the view; nothing is sent.

    Args:
        entity: User or team.
        project: Project name.
        name: The view's name.
        sections: What it shows.

    Returns:
        wandb-workspaces' `Workspace`.
    """
    import wandb_workspaces.workspaces as workspaces

    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            workspaces.Section(
                name=section.title, panels=[build_panel(panel) for panel in section.panels], is_open=True
            )
            for section in sections
        ],
        settings=workspaces.WorkspaceSettings(x_axis=STEP),
    )


# ----------------------------------------------------------------------------------------------------------------------
# Make a workspace or a report: send it to W&B, or write what would be sent.


def make_dashboard(recipe: DashboardRecipe, say: Callable[[str], None] = print) -> str:
    """Make what the recipe asks for.

    Returns:
        The file of a dry run, else the address.

    Raises:
        UserError: If wandb-workspaces is not installed, W&B does not answer or nobody is logged in, or a folder is
            not what it should be.
    """
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise UserError("dashboard: wandb-workspaces is not installed: pip install 'lkd[dashboard]'")
    names = [read_names(Path(run)) for run in recipe.runs]
    if recipe.report:
        check_comparison(Path(recipe.report))
    if names:
        empty = list_empty(SECTIONS, set().union(*names))
        say("\n  ".join([f"{len(empty)} panels lack something of these runs" + ":" * bool(empty), *empty]))
    if recipe.dry_run:
        return write_spec(recipe, say)
    with explained_failures():
        made = build(recipe, recipe.entity or find_entity(), known=True)
        made.save()
        return str(made.url)


def build(recipe: DashboardRecipe, entity: str, known: bool) -> Any:
    """The recipe's report or workspace; for `known` see `build_report`.

    Raises:
        UserError: If wandb-workspaces refuses the name.
    """
    if recipe.report:
        return build_report(Path(recipe.report), entity, recipe.project, known)
    try:
        return build_workspace(entity, recipe.project, recipe.name)
    except ValueError as error:
        raise UserError(f"name: {recipe.name!r}: W&B takes no emoji and no symbols such as + = < $") from error


def write_spec(recipe: DashboardRecipe, say: Callable[[str], None]) -> str:
    """Write what would be sent; the file."""
    path = Path(recipe.out) / ("report.json" if recipe.report else "workspace.json")
    write_json(path, read_spec(build(recipe, recipe.entity or "", known=False)))
    if recipe.report:
        say("the run's project is looked up when the report is sent: its panels here are of the report's own project")
    return str(path)


def read_spec(made: Any) -> Any:
    """What `save` sends of a workspace or report: wandb-workspaces has no public name for it."""
    return json.loads(made._to_model().model_dump_json(by_alias=True, exclude_none=True))


def find_entity() -> str:
    """Who is logged in.

    Raises:
        UserError: If W&B does not say.
    """
    import wandb

    entity = wandb.Api().default_entity
    if not entity:
        raise UserError("entity: W&B names no default for who is logged in; give --entity USER_OR_TEAM")
    return str(entity)


@contextmanager
def explained_failures() -> Iterator[None]:
    """Tell in one line why W&B took nothing; its libraries raise bare `Exception`s."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"dashboard: nothing was sent: {first}; run `wandb login`, or write what would be sent with --dry_run"
        ) from error
