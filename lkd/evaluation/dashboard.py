"""Weights & Biases as code: a workspace for every project, a report of a comparison."""

import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from lkd.config.evaluation import DashboardRecipe
from lkd.core.errors import UserError, first_line
from lkd.core.files import read_json, write_json
from lkd.tracking.run import shorten_paths
from lkd.tracking.tracker import read_log

# ----------------------------------------------------------------------------------------------------------------------
# What the workspace shows: sections of panels.

STEP = "step"  # what every metric is drawn over; W&B's own count of log calls means nothing
Panels = dict[str, list[dict[str, Any]]]


def read_panels() -> Panels:
    """Section → panels, as `dashboard.yaml` has them."""
    panels: Panels = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return panels


def build_panel(
    title: str, pictures: Sequence[str] = (), smoothing: float = 0.0, place: int = 0, **options: Any
) -> Any:
    """wandb-workspaces' panel of an entry of `dashboard.yaml`; `place` is its number in a report."""
    import wandb_workspaces.reports.v2 as reports

    layout = reports.Layout(x=place * WIDTH, y=0, w=WIDTH, h=HEIGHT)
    if pictures:
        return reports.MediaBrowser(
            title=title, media_keys=list(pictures), num_columns=1, gallery_axis="step", layout=layout
        )
    options["y"] = options.pop("metrics", [])
    if smoothing:
        options |= {"smoothing_type": "exponential", "smoothing_factor": smoothing, "smoothing_show_original": True}
    return reports.LinePlot(title=title, x=STEP, title_x=STEP, layout=layout, **{"plot_type": "line", **options})


def read_names(run: Path) -> set[str]:
    """Names of the metrics that a run has logged, and of the pictures that W&B has kept of it."""
    log = run / "log.jsonl"
    if not log.exists():
        raise UserError(f"runs: {run} holds no log.jsonl; give run directories, such as runs/student")
    images = run.glob("wandb/*run-*/files/media/images/*_*_*.*")  # NAME_STEP_HASH.png
    logged = {name for row in read_log(log) for name in row}
    return (logged - {"step", "time"}) | {path.name.rsplit("_", 2)[0] for path in images}


def list_empty(panels: Panels, names: Iterable[str]) -> list[str]:
    """A line for every panel that would lack something if these names were logged: section, title, what it lacks."""
    known, lines = set(names), []
    for section, panel in ((name, panel) for name, entries in panels.items() for panel in entries):
        missing = [name for key in ("metrics", "pictures") for name in panel.get(key, ()) if name not in known]
        pattern = panel.get("metric_regex")
        if pattern and not any(re.fullmatch(pattern, name) for name in known):
            missing.append(pattern)
        if missing:
            lines.append(f"{section}: {panel['title']}: {', '.join(missing)}")
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# The report of a finished `lkd compare`: its table, its notes, its recipe, and what W&B has of its run.

NEEDED = ("config.json", "table.txt")
WIDTH, HEIGHT = 8, 6  # of a panel; a report has 24 columns


def check_comparison(folder: Path) -> None:
    """Check that a folder holds a finished comparison."""
    missing = [name for name in NEEDED if not (folder / name).exists()]
    if missing:
        raise UserError(f"report: {folder} is no finished comparison, {', '.join(missing)} missing: run lkd compare")
    command = read_json(folder / "config.json")["command"]
    if command != "compare":
        raise UserError(f"report: {folder} is a run of `lkd {command}`; give one of `lkd compare`")


def build_report(folder: Path, entity: str, project: str, known: bool) -> Any:
    """Build the report of a comparison's run directory; nothing is sent.

    It has panels only where the comparison was logged to W&B. `known` is whether W&B can be asked for the project,
    which ties them to it; else they show the project of the report itself.
    """
    import wandb_workspaces.reports.v2 as reports

    recipe = shorten_paths(read_json(folder / "config.json")["recipe"])
    blocks = [
        reports.H2("Accuracy on the test split"),
        reports.CodeBlock((folder / "table.txt").read_text(encoding="utf-8")),
    ]
    if any(folder.glob("wandb/*run-*")):  # it was logged there
        run, place = (folder / "wandb_run_id").read_text().strip(), {"entity": entity, "project": project}
        runs = reports.Runset(name=folder.name, filters=f"ID = '{run}'", **place if known else {})
        panels = [build_panel(**panel, place=place) for place, panel in enumerate(read_panels()["Comparison"])]
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


# ----------------------------------------------------------------------------------------------------------------------
# Make a workspace, a saved view of a project's runs, or a report: send it to W&B, or write what would be sent.


def make_dashboard(recipe: DashboardRecipe, say: Callable[[str], None] = print) -> str:
    """Make what the recipe asks for; the file of a dry run, else the address."""
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise UserError("dashboard: wandb-workspaces is not installed: pip install wandb-workspaces")
    names = [read_names(Path(run)) for run in recipe.runs]
    if recipe.report:
        check_comparison(Path(recipe.report))
    if names:
        empty = list_empty(read_panels(), set().union(*names))
        say("\n  ".join([f"{len(empty)} panels lack something of these runs" + ":" * bool(empty), *empty]))
    if recipe.dry_run:
        path = Path(recipe.out) / ("report.json" if recipe.report else "workspace.json")
        made = build(recipe, recipe.entity or "", known=False)
        # What `save` sends of it: wandb-workspaces has no public name for that.
        write_json(path, json.loads(made._to_model().model_dump_json(by_alias=True, exclude_none=True)))
        if recipe.report:
            say("the run's project is looked up when the report is sent; here its panels are of the report's own")
        return str(path)
    import wandb

    try:
        entity = recipe.entity or wandb.Api().default_entity
        if not entity:
            raise UserError("entity: W&B names no default for who is logged in; give --entity USER_OR_TEAM")
        made = build(recipe, entity, known=True)
        made.save()
        return str(made.url)
    except UserError:
        raise
    except Exception as error:  # a bare one, of W&B's libraries
        line = f"dashboard: nothing was sent: {first_line(error)}"
        raise UserError(f"{line}; run `wandb login`, or write what would be sent with --dry_run") from error


def build(recipe: DashboardRecipe, entity: str, known: bool) -> Any:
    """The recipe's report or workspace; for `known` see `build_report`."""
    if recipe.report:
        return build_report(Path(recipe.report), entity, recipe.project, known)
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    panels = {section: [build_panel(**panel) for panel in entries] for section, entries in read_panels().items()}
    panels["Comparison"].append(reports.RunComparer(diff_only="split"))
    sections = [workspaces.Section(name=name, panels=shown, is_open=True) for name, shown in panels.items()]
    settings = workspaces.WorkspaceSettings(x_axis=STEP)
    try:
        return workspaces.Workspace(
            entity=entity, project=recipe.project, name=recipe.name, sections=sections, settings=settings
        )
    except ValueError as error:
        raise UserError(f"name: {recipe.name!r}: W&B takes no emoji and no symbols such as + = < $") from error
