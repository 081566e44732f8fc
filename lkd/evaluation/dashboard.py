"""Weights & Biases as code: a workspace for every project, a report of a comparison."""

import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from tabulate import tabulate

from lkd.config.evaluation import DashboardRecipe
from lkd.core.errors import UserError, first_line
from lkd.core.files import read_json, write_json
from lkd.evaluation.report.runs import read_comparison, read_notes
from lkd.tracking.run import shorten_paths
from lkd.tracking.tracker import read_log

# ----------------------------------------------------------------------------------------------------------------------
# What the workspace shows: sections of panels, each of metrics that runs log (docs/tracking.md).

STEP = "step"  # what every metric is drawn over; W&B's own count of log calls means nothing
Sections = dict[str, list[Any]]


def chart(title: str, *metrics: str, smoothing: float = 0.0, log_y: bool = False, **options: Any) -> Any:
    """Lines over a run's steps.

    Args:
        title: Shown above.
        *metrics: Names of what is drawn.
        smoothing: Of an exponential moving average, in [0, 1); the original stays visible.
        log_y: Logarithmic y axis.
        **options: Others of wandb-workspaces' `LinePlot`: `metric_regex`, a regular expression (RE2, of the whole name)
            of what is drawn instead, where names are open-ended; `title_y`, `range_y`, `plot_type`.
    """
    import wandb_workspaces.reports.v2 as reports

    return reports.LinePlot(
        title=title,
        x=STEP,
        title_x=STEP,
        y=list(metrics),
        log_y=log_y or None,
        smoothing_type="exponential" if smoothing else "none",
        smoothing_factor=smoothing or None,
        smoothing_show_original=True if smoothing else None,
        **{"plot_type": "line", **options},
    )


def pictures(title: str, *metrics: str) -> Any:
    """Pictures that a run has logged under these names."""
    import wandb_workspaces.reports.v2 as reports

    return reports.MediaBrowser(title=title, media_keys=list(metrics), num_columns=1, gallery_axis="step")


def show_comparison() -> list[Any]:
    """The panels of a comparison."""
    accuracy = chart("Accuracy on the test split, last epoch", metric_regex=r"^.+/test_last$", title_y="%")
    return [accuracy, pictures("Comparison", "comparison")]


def list_sections() -> Sections:
    """Heading → panels."""
    import wandb_workspaces.reports.v2 as reports

    nats: dict[str, Any] = {"title_y": "nats"}
    percent: dict[str, Any] = {"title_y": "%"}
    positive, part = (0, None), (0, 1)
    ages = ("outer/progress_least", "outer/progress", "outer/progress_most")
    shares = {"metric_regex": r"^share/.+$", "smoothing": 0.6, "range_y": part}
    times = (f"time_share/{name}" for name in ("data", "teacher", "student", "loss"))
    return {
        "Meta-training": [
            chart("Outer loss after the rollout", "outer/value", smoothing=0.8, **nats),
            chart("Reuse: cross-entropy at the best temperature", "reuse/calibrated_cross_entropy", **nats),
            chart("Reuse: accuracy on meta-validation", "reuse/top1", **percent),
            chart("Hypergradient norm, before clipping", "outer/hypergradient_norm", smoothing=0.6, log_y=True),
            chart("Signal to noise of the hypergradient", "outer/signal_to_noise", smoothing=0.8),
            chart("Updates clipped, students left out", "outer/clipped", "outer/left_out", smoothing=0.9),
            chart("Audit of first_order: cosine", "outer/audit_cosine", range_y=(-1, 1)),
            chart("Ages of the students", *ages, range_y=part),
        ],
        "Learned loss": [
            chart("Mean weight of the teacher", "loss/weight", smoothing=0.8, range_y=positive),
            chart("Mean temperature", "loss/temperature", smoothing=0.8),
            chart("Share of each term in the student's gradient", **shares),
            chart("Norm of each part's weights", metric_regex=r"^weights/.+$"),
            pictures("What the loss does to a student", "learned_loss"),
        ],
        "Distillation": [
            chart("Accuracy on meta-validation", "meta_validation/top1", **percent),
            chart(
                "Cross-entropy on meta-validation, at the best temperature",
                "meta_validation/calibrated_cross_entropy",
                **nats,
            ),
            # Of `loss/TERM` all but a meta-training's `loss/weight` and `loss/temperature`: RE2 cannot look ahead.
            chart("Terms of the loss", metric_regex=r"^loss/([^wt].*|t[^e].*)$", smoothing=0.3),
            chart("Agreement with the teacher on a training batch", "train/agreement", smoothing=0.6, **percent),
            chart("Balance λ", "balance", range_y=positive),
            chart("Share of each term in the gradient", **shares),
            chart("Gradient norm", "gradient_norm", smoothing=0.6, log_y=True),
            chart("Learning rate", "learning_rate"),
        ],
        "Comparison": [*show_comparison(), reports.RunComparer(diff_only="split")],
        "System": [
            chart("Images a second", "images_per_second", smoothing=0.6, range_y=positive),
            chart("Where the time of a step goes", *times, range_y=part, plot_type="stacked-area"),
        ],
    }


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
    images = run.glob("wandb/*run-*/files/media/images/*_*_*.*")  # NAME_STEP_HASH.png
    logged = {name for row in read_log(log) for name in row}
    return (logged - {"step", "time"}) | {path.name.rsplit("_", 2)[0] for path in images}


def list_empty(sections: Sections, names: Iterable[str]) -> list[str]:
    """A line for every panel that would lack something if these names were logged: section, title, what it lacks."""
    known, lines = set(names), []
    for section, panels in sections.items():
        for panel in panels:
            wanted = getattr(panel, "y", None) or getattr(panel, "media_keys", None) or []
            missing = [metric for metric in wanted if metric not in known]
            pattern = getattr(panel, "metric_regex", None)
            if pattern and not any(re.fullmatch(pattern, name) for name in known):
                missing.append(pattern)
            if missing:
                lines.append(f"{section}: {panel.title}: {', '.join(missing)}")
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# The report of a finished `lkd compare`: its table, its notes, its recipe, and what W&B has of its run.

NEEDED = ("config.json", "table.csv", "table.txt", "result.json")
WIDTH, HEIGHT = 8, 6  # of a panel; a report has 24 columns


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
    """
    import wandb_workspaces.reports.v2 as reports

    recipe = shorten_paths(read_json(folder / "config.json")["recipe"])
    header, rows = read_comparison(folder / "table.csv")
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    blocks = [
        reports.P(describe_comparison(recipe, read_json(folder / "result.json"))),
        reports.H2("Accuracy on the test split"),
        reports.MarkdownBlock(tabulate(cells, header, tablefmt="github", disable_numparse=True)),
        reports.UnorderedList(read_notes(folder / "table.txt")),
    ]
    if any(folder.glob("wandb/*run-*")):  # it was logged there
        run, place = (folder / "wandb_run_id").read_text().strip(), {"entity": entity, "project": project}
        runs = reports.Runset(name=folder.name, filters=f"ID = '{run}'", **place if known else {})
        panels = show_comparison()
        for number, panel in enumerate(panels):
            panel.layout = reports.Layout(x=number * WIDTH, y=0, w=WIDTH, h=HEIGHT)
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


def describe_comparison(recipe: dict[str, Any], made: dict[str, Any]) -> str:
    """One sentence: what was compared, with which code."""
    methods, students = ", ".join(recipe["methods"]), ", ".join(student["name"] for student in recipe["students"])
    commit = f"commit {made['commit'][:12]}, " if made["commit"] else ""
    return (
        f"{len(recipe['methods'])} methods ({methods}) × {students} × {recipe['seeds']} paired seeds on "
        f"{recipe['data']['name']}, {recipe['train']['epochs']} epochs. Made by `{made['command']}`, {commit}"
        f"lkd {made['versions']['lkd']}, torch {made['versions']['torch']}."
    )


# ----------------------------------------------------------------------------------------------------------------------
# Make a workspace, a saved view of a project's runs, or a report: send it to W&B, or write what would be sent.


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
        empty = list_empty(list_sections(), set().union(*names))
        say("\n  ".join([f"{len(empty)} panels lack something of these runs" + ":" * bool(empty), *empty]))
    if recipe.dry_run:
        path = Path(recipe.out) / ("report.json" if recipe.report else "workspace.json")
        made = build(recipe, recipe.entity or "", known=False)
        # What `save` sends of it: wandb-workspaces has no public name for that.
        write_json(path, json.loads(made._to_model().model_dump_json(by_alias=True, exclude_none=True)))
        if recipe.report:
            say("the run's project is looked up when the report is sent; here its panels are of the report's own")
        return str(path)
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
    import wandb_workspaces.workspaces as workspaces

    sections = [
        workspaces.Section(name=title, panels=panels, is_open=True) for title, panels in list_sections().items()
    ]
    settings = workspaces.WorkspaceSettings(x_axis=STEP)
    try:
        return workspaces.Workspace(
            entity=entity, project=recipe.project, name=recipe.name, sections=sections, settings=settings
        )
    except ValueError as error:
        raise UserError(f"name: {recipe.name!r}: W&B takes no emoji and no symbols such as + = < $") from error


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
        raise UserError(
            f"dashboard: nothing was sent: {first_line(error)}; run `wandb login`, or write what would be sent with "
            "--dry_run"
        ) from error
