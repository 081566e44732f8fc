"""One self-contained HTML page about runs."""

import base64
import csv
import dataclasses
import hashlib
import math
import re
import shlex
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import mode
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from lkd import __version__
from lkd.config.evaluation import ReportRecipe
from lkd.config.parse import COMMANDS
from lkd.core.errors import UserError
from lkd.core.files import write_text
from lkd.evaluation.report.charts import PROGRESS, SURFACE_POINTS, draw_losses, find_trust, list_charts
from lkd.evaluation.report.runs import (
    ABSENT,
    RESULTS,
    TRAINED,
    Curve,
    Point,
    RunRecord,
    describe_data,
    describe_loss,
    find_best,
    find_differences,
    format_value,
    group_by_data,
    list_dicts,
    list_settings,
    read_dict,
    read_header,
    read_part,
    read_runs,
    trace_recipe,
)
from lkd.losses.learned.file import NOT_LEARNED, was_learned

SCRIPTS = ("charts.js", "surfaces.js", "report.js")
COLORS = 8  # of the style sheet
PICTURES = ("comparison.png", "fidelity.png", "quickstart.png")
PICTURE_BYTES = 2_000_000  # of a page, before encoding
MOST_TRAININGS = 40  # of a pool that are drawn
EXTREMES = 5  # most helpful and most harmful images
LEFT_OUT = ("resume",)  # says how a run was gone on with, not what it is

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parents[1]),
    autoescape=select_autoescape(["html"]),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
TEMPLATES.filters["base64"] = lambda path: base64.b64encode(path.read_bytes()).decode()
TEMPLATES.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}


def render(template: str, **fields: Any) -> str:
    """A page, or a text, of a template beside this package; whatever a page is given is escaped there."""
    return TEMPLATES.get_template(template).render(fields)


def write_report(recipe: ReportRecipe) -> tuple[Path, int]:
    """Write the page; its path, and how many runs it shows."""
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
    differing = find_differences(runs)
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
        differing=[(key, mode(value for value in values if value != ABSENT), values) for key, *values in differing],
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
# What trainings and meta-trainings reached, by their logs.

Table = list[list[str]]
REUSED = "reuse/calibrated_cross_entropy"


def tabulate_trainings(runs: Sequence[RunRecord]) -> Table:
    """A header and a row for each student and teacher: meta-validation at the last and at the best epoch."""
    header = ["run", "network", "loss", "top-1 last %", "top-1 best %", "calibrated CE last", "best"]
    rows = []
    for run in runs:
        top1 = run.log.curves.get("meta_validation/top1")
        calibrated = run.log.curves.get("meta_validation/calibrated_cross_entropy")
        figures = [*last_and_best(top1, max, "{:.2f}"), *last_and_best(calibrated, min, "{:.4f}")]
        loss = describe_loss(run.recipe.get("loss"), run.path) if run.command == "distill" else "cross_entropy"
        done = f"{len(run.epochs) if run.epochs else 0} of {run.settings.get('train.epochs', ABSENT)}"
        rows.append([run.label, run.network, loss, *figures, done, run.duration, run.state])
    return [[*header, "epochs", "time", "state"], *rows]


def tabulate_learned(runs: Sequence[RunRecord]) -> Table:
    """A header and a row for each meta-training: its loss when reused on fresh students, and which was kept."""
    header = ["run", "students", "reuse: calibrated CE first", "best", "last", "top-1 at best %", "loss kept"]
    rows = []
    for run in runs:
        reuse, outer, kept = run.log.curves.get(REUSED), run.log.curves.get("outer/value"), find_kept_step(run)
        last, best = last_and_best(reuse, min, "{:.4f}")
        first = f"{reuse[0].value:.4f}" if reuse else ABSENT
        at_best = show(value_at(run.log.curves.get("reuse/top1"), kept), "{:.2f}")
        initial = "the start" if run.settings.get("meta.start") else f"the initial one: {NOT_LEARNED}"
        taught = bool(run.settings.get("meta.start")) or was_learned(read_header(run.path / RESULTS["meta-train"]))
        whose = {None: initial if reuse or not taught else "the last", 0: initial}.get(kept, f"after step {kept}")
        done = f"{outer[-1].step} of {run.settings.get('meta.outer_steps', ABSENT)}" if outer else ABSENT
        rows.append([run.label, run.network, first, best, last, at_best, whose, done, run.duration, run.state])
    return [[*header, "outer steps", "time", "state"], *rows]


def tabulate_worlds(run: RunRecord) -> Table:
    """A header, the mean, and a row for each world of a meta-training: what fresh students reached with the kept loss.

    The worst regret is first; without a reference loss the worlds are as they were logged. Empty without worlds.
    """
    curves, kept = run.log.curves, find_kept_step(run)
    names = [
        match[1] for key in curves if (match := re.fullmatch(r"reuse/world/([^/]+)/calibrated_cross_entropy", key))
    ]
    if not names or kept is None:
        return []
    metrics = {"regret": "{:+.4f}", "calibrated_cross_entropy": "{:.4f}", "top1": "{:.2f}"}
    found = {
        name: [value_at(curves.get(f"reuse/{place}{metric}"), kept) for metric in metrics]
        for name, place in (("mean", ""), *((name, f"world/{name}/") for name in names))
    }
    if "reuse/regret" in curves:
        names.sort(key=lambda name: -found[name][0])
    rows = [[name, *map(show, found[name], metrics.values())] for name in ("mean", *names)]
    return [["world", f"regret of the loss after outer step {kept}", "calibrated CE", "top-1 %"], *rows]


def find_kept_step(run: RunRecord) -> int | None:
    """The outer step after which a meta-training's loss was best when reused; None if there was no look that says."""
    best = find_best(run.log.curves.get(REUSED), min)
    return best and best.step


def value_at(curve: Curve | None, step: int | None) -> float:
    """What was logged at a step, or NaN."""
    return next((point.value for point in curve or () if point.step == step), math.nan)


def show(value: float, form: str) -> str:
    """A number in a table's form."""
    return ABSENT if math.isnan(value) else form.format(value)


def last_and_best(curve: Curve | None, best: Callable[..., Point], form: str) -> tuple[str, str]:
    """The last value of a curve, and the first of its best with its step; `ABSENT` where there is none."""
    if not curve:
        return ABSENT, ABSENT
    found = find_best(curve, best)
    return form.format(curve[-1].value), f"{form.format(found.value)} (step {found.step})" if found else ABSENT


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves besides its log: tables, figures, pictures, pool.


def read_contents(run: RunRecord, pictures: dict[Path, bool]) -> dict[str, Any]:
    """What a run left, by kind; all of it is empty for a run that only logs."""
    figures: Any = {}
    if run.command not in (*TRAINED, "meta-train", "pool"):  # before there are figures, the last values of the log
        figures = read_dict(run.path / "result.json").get("figures")
        if not isinstance(figures, dict):
            figures = {name: curve[-1].value for name, curve in run.log.curves.items()}
    texts = sorted(run.path.glob("*/table.txt" if run.command == "quickstart" else "table.txt"))
    ages: dict[Any, list[float]] = {}
    for entry in list_dicts(read_dict(run.path / "pool" / "index.json").get("students")):
        if isinstance(entry.get("progress"), int | float):
            ages.setdefault(entry.get("training"), []).append(float(entry["progress"]))
    return {
        "figures": [(key, f"{value:.6g}" if isinstance(value, float) else value) for key, value in figures.items()],
        "trust": str(find_trust(run) or ""),
        "tables": list_tables(run),
        "texts": [(path.relative_to(run.path), path.read_text(errors="replace")) for path in texts],
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


def list_tables(run: RunRecord) -> list[tuple[str, Sequence[str], Table]]:
    """Tables of influence, of a meta-training's worlds, of a comparison's finished trainings: title, header, rows."""
    if run.command == "influence" and (run.path / "influence.csv").is_file():
        with (run.path / "influence.csv").open(newline="", encoding="utf-8", errors="replace") as file:
            header, *rows = [*csv.reader(file)] or [[]]
        chosen = rows if len(rows) <= 2 * EXTREMES else [*rows[:EXTREMES], *rows[-EXTREMES:]]
        return [(f"Most helpful first, most harmful last, of {len(rows):,}.", header, chosen)]
    if run.command == "meta-train" and (worlds := tabulate_worlds(run)):
        return [("Worlds", worlds[0], worlds[1:])]
    if run.command == "compare" and not (run.path / "table.txt").is_file():  # no means before all trainings are there
        cells = [read_dict(path) for path in sorted((run.path / "cells").glob("*.json"))]
        reported = [cell for cell in cells if cell.get("reported")]
        rows = [
            [str(cell.get(key)) for key in ("student", "method", "seed")]
            + [f"{read_part(cell, key).get('top1', math.nan):.2f}" for key in ("last", "best")]
            for cell in reported
        ]
        title = f"Finished: {len(reported)} reported trainings, {len(cells) - len(reported)} for tuning."
        return [(title, ["student", "method", "seed", "last epoch %", "best epoch %"], rows)]
    return []


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
