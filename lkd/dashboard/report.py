"""The report of a finished `lkd compare`: its table, its notes, its recipe, and what W&B has of its run."""

import csv
from pathlib import Path
from typing import Any

import yaml

from lkd.dashboard.panels import build_panel
from lkd.dashboard.sections import COMPARISON
from lkd.errors import UserError
from lkd.files import read_json
from lkd.run import shorten_paths

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
