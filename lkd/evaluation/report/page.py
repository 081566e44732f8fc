"""One self-contained HTML page about runs."""

import base64
import dataclasses
import hashlib
import shlex
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lkd import __version__
from lkd.config.evaluation import ReportRecipe
from lkd.config.parse import COMMANDS
from lkd.core.errors import UserError
from lkd.core.files import write_text
from lkd.evaluation.report.charts import PROGRESS, SURFACE_POINTS, draw_losses, list_charts
from lkd.evaluation.report.runs import (
    ABSENT,
    TRAINED,
    RunRecord,
    describe_data,
    find_differences,
    find_trust,
    format_value,
    group_by_data,
    list_dicts,
    list_settings,
    read_comparison,
    read_csv,
    read_dict,
    read_notes,
    read_runs,
    tabulate_learned,
    tabulate_trainings,
    tabulate_worlds,
    trace_recipe,
)

SCRIPTS = ("charts.js", "surfaces.js", "report.js")
COLORS = 8  # of the style sheet
PICTURES = ("comparison.png", "fidelity.png", "influence.png", "quickstart.png")
PICTURE_BYTES = 2_000_000  # of a page, before encoding
MOST_TRAININGS = 40  # of a pool that are drawn
EXTREMES = 5  # most helpful and most harmful images
LEFT_OUT = ("resume",)  # says how a run was gone on with, not what it is

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parents[1]),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
TEMPLATES.filters["base64"] = lambda path: base64.b64encode(path.read_bytes()).decode()
TEMPLATES.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}


def render(template: str, **fields: Any) -> str:
    """A page of a template beside this package; whatever it is given is escaped there."""
    return TEMPLATES.get_template(template).render(fields)


def write_report(recipe: ReportRecipe) -> tuple[Path, int]:
    """Write the page.

    Returns:
        The page, and how many runs it shows.

    Raises:
        UserError: If a folder is not a run, or the page cannot be written.
    """
    out = Path(recipe.out)
    if out.suffix not in (".html", ".htm"):
        raise UserError(f"out: {out} does not end in .html")
    runs = read_runs(recipe.runs)
    write_text(out, build_page(runs))
    return out, len(runs)


def build_page(runs: Sequence[RunRecord]) -> str:
    """The page's HTML."""
    places = {run.label: place for place, run in enumerate(runs)}
    groups, pictures = group_by_data(runs), choose_pictures(runs)
    sections = list_charts(groups, places)
    differing, partial = find_differences(runs)
    unusual = {row[0] for row in differing}
    script = "\n".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in SCRIPTS)
    return render(
        "report/report.html",
        runs=runs,
        groups=[
            {
                "title": describe_data(group[0]),
                "runs": group,
                "tables": list_results(group, places),
                "contents": [(run, found) for run in group if any((found := read_contents(run, pictures)).values())],
            }
            for group in groups
        ],
        sections=sections,
        differing=[(key, find_usual(values), values) for key, *values in differing],
        partial=partial,
        settings=[
            (run, list(settings.items()), ["differs" if key in unusual else "" for key in settings])
            for run, settings in ((run, list_settings(run)) for run in runs)
        ],
        lineage=[(run, trace_recipe(run.recipe, run.path, runs)) for run in runs],
        commands=[(run, command_line(run)) for run in runs],
        data={
            "runs": [{"label": run.label, "command": run.command} for run in runs],
            "colors": COLORS,
            "sections": sections,
            "losses": draw_losses(runs),
            "points": SURFACE_POINTS,
            "progress": PROGRESS,
        },
        script=Markup(script),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        made=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        version=__version__,
        colors=COLORS,
        drawn=MOST_TRAININGS,
        absent=ABSENT,
    )


def find_usual(values: Sequence[str]) -> str:
    """The most common value of a setting."""
    return Counter(value for value in values if value != ABSENT).most_common(1)[0][0]


def list_results(runs: Sequence[RunRecord], places: dict[str, int]) -> list[tuple[str, list[list[str]], list[str]]]:
    """Tables of what trainings reached: title, rows under a header, classes of the rows."""
    found = []
    for commands, tabulate, title in (
        (TRAINED, tabulate_trainings, "Students and teachers, on meta-validation"),
        (("meta-train",), tabulate_learned, "Learned losses, reused on fresh students, on meta-validation"),
    ):
        chosen = [run for run in runs if run.command in commands]
        if chosen:
            found.append((title, tabulate(chosen), [f"run c{places[run.label] % COLORS}" for run in chosen]))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves besides its log: tables, figures, pictures, pool.


def read_contents(run: RunRecord, pictures: dict[Path, bool]) -> dict[str, Any]:
    """What a run left, by kind; all of it is empty for a run that only logs."""
    tables, text = list_tables(run), run.path / "table.txt"
    figures: Any = {}
    if run.command not in (*TRAINED, "meta-train", "pool"):  # before there are figures, the last values of the log
        figures = read_dict(run.path / "result.json").get("figures")
        if not isinstance(figures, dict):
            figures = {name: curve.values[-1] for name, curve in run.log.curves.items()}
    ages: dict[Any, list[float]] = {}
    for entry in list_dicts(read_dict(run.path / "pool" / "index.json").get("students")):
        if isinstance(entry.get("progress"), int | float):
            ages.setdefault(entry.get("training"), []).append(float(entry["progress"]))
    return {
        "figures": [(key, f"{value:.6g}" if isinstance(value, float) else value) for key, value in figures.items()],
        "trust": find_trust(run),
        "tables": tables,
        "text": text.read_text(errors="replace") if not tables and text.is_file() else "",
        "pool": list(ages.values()),
        "pictures": [(path, fits) for path, fits in pictures.items() if path.parent == run.path],
    }


def choose_pictures(runs: Sequence[RunRecord]) -> dict[Path, bool]:
    """The pictures that runs left, and whether the page has space for them."""
    chosen: dict[Path, bool] = {}
    left = PICTURE_BYTES
    for path in (run.path / name for run in runs for name in PICTURES if (run.path / name).is_file()):
        chosen[path] = path.stat().st_size <= left
        left -= path.stat().st_size * chosen[path]
    return chosen


def list_tables(run: RunRecord) -> list[dict[str, Any]]:
    """The tables of a comparison (or its finished trainings), a quickstart, influence."""
    table = run.path / "table.csv"
    if run.command == "quickstart":
        found = sorted(run.path.glob("*/table.csv"))
        return [make_table(*read_comparison(path), title=path.parent.name) for path in found]
    if run.command == "influence" and (images := read_csv(run.path / "influence.csv")):
        rows = [list(image.values()) for image in images]
        chosen = rows if len(rows) <= 2 * EXTREMES else [*rows[:EXTREMES], *rows[-EXTREMES:]]
        return [make_table(list(images[0]), chosen, above=f"Most helpful first, most harmful last, of {len(rows):,}.")]
    if run.command == "meta-train" and (worlds := tabulate_worlds(run)):
        return [make_table(worlds[0], worlds[1:], title="Worlds")]
    if run.command == "compare" and table.is_file():
        return [make_table(*read_comparison(table), notes=read_notes(run.path / "table.txt"))]
    if run.command == "compare":  # no means before all trainings are there
        cells = [read_dict(path) for path in sorted((run.path / "cells").glob("*.json"))]
        reported = [cell for cell in cells if cell.get("reported")]
        rows = [
            [
                *(str(cell.get(key)) for key in ("student", "method", "seed")),
                *map(format_top1, (cell.get("last"), cell.get("best"))),
            ]
            for cell in reported
        ]
        above = f"Finished: {len(reported)} reported trainings, {len(cells) - len(reported)} for tuning."
        return [make_table(["student", "method", "seed", "last epoch %", "best epoch %"], rows, above=above)]
    return []


def make_table(
    header: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "", above: str = "", notes: Sequence[str] = ()
) -> dict[str, Any]:
    """A table with what stands above and below it."""
    return {"header": header, "rows": rows, "title": title, "above": above, "notes": notes}


def format_top1(figures: Any) -> str:
    """The accuracy among a finished training's figures."""
    top1 = figures.get("top1") if isinstance(figures, dict) else None
    return f"{top1:.2f}" if isinstance(top1, float) else ""


def command_line(run: RunRecord) -> str:
    """The shortest line that gives a run's settings: those that are not the defaults."""
    return shlex.join(["lkd", run.command, *list_options(COMMANDS[run.command][0](), run.recipe)])


def list_options(default: Any, recipe: dict[str, Any], prefix: str = "") -> list[str]:
    """The options by which a recipe differs from a default dataclass of its kind."""
    words = []
    for field in dataclasses.fields(default):
        key, usual = prefix + field.name, getattr(default, field.name)
        value = recipe.get(field.name, usual)
        if dataclasses.is_dataclass(usual) and isinstance(value, dict):
            words += list_options(usual, value, f"{key}.")
        elif key not in LEFT_OUT and value != usual:
            words += [f"--{key}", format_value(value)]
    return words
