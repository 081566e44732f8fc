"""One self-contained HTML page about runs."""

import base64
import csv
import dataclasses
import hashlib
import itertools
import json
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from lkd import __version__
from lkd.config.evaluation import ReportRecipe
from lkd.config.parse import COMMANDS
from lkd.core.errors import UserError
from lkd.core.files import write_text
from lkd.evaluation.comparison.tables import format_figure
from lkd.evaluation.report.charts import PROGRESS, draw_losses, list_charts
from lkd.evaluation.report.charts import SURFACE_POINTS as POINTS
from lkd.evaluation.report.runs import (
    ABSENT,
    TRAINED,
    Ancestor,
    RunRecord,
    describe_data,
    find_differences,
    format_duration,
    group_by_data,
    images_per_second,
    list_settings,
    read_dict,
    read_rows,
    read_runs,
    show_path,
    simplify,
    state_of,
    tabulate_learned,
    tabulate_trainings,
    time_shares,
    trace_run,
)

# ----------------------------------------------------------------------------------------------------------------------
# Pieces of a self-contained page. Whatever comes from a run is escaped here.


def html_table(header: Iterable[str], rows: Sequence[Sequence[str]], classes: Sequence[str] | None = None) -> str:
    """An HTML table; every cell is escaped.

    Args:
        header: Titles of the columns.
        rows: The cells.
        classes: A class for each row.
    """
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        f'<tr class="{escape(kind)}">' + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row, kind in zip(rows, classes or [""] * len(rows), strict=True)
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def embed_picture(path: Path, description: str) -> str:
    """A picture inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{escape(description)}" src="data:image/png;base64,{data}"></p>'


def embed_data(content: Any, identifier: str) -> str:
    """JSON inside the page, for its scripts to read. No text in it can end the element or open a comment.

    Raises:
        ValueError: If a number is not finite, which JSON has no word for.
    """
    text = json.dumps(content, allow_nan=False, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{escape(identifier)}">{text}</script>'


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves besides its log: tables, figures, pictures, pool.

PICTURES = ("comparison.png", "fidelity.png", "influence.png", "quickstart.png")
PICTURE_BYTES = 2_000_000  # of a page, before encoding
MOST_TRAININGS = 40  # of a pool that are drawn
EXTREMES = 5  # most helpful and most harmful images


class Album:
    """The pictures of a page, up to a number of bytes."""

    def __init__(self, left: int = PICTURE_BYTES) -> None:
        self.left = left

    def show(self, run: RunRecord) -> str:
        """The pictures of a run; of those for which no space is left, the names."""
        shown = []
        for path in (run.path / name for name in PICTURES):
            if not path.is_file():
                continue
            size = path.stat().st_size
            fits = size <= self.left
            self.left -= size * fits
            missing = f"<p>{escape(path.name)} is left out: the page has enough pictures.</p>"
            shown.append(embed_picture(path, f"{path.stem} of {run.label}") if fits else missing)
        return "".join(shown)


def describe_contents(run: RunRecord, album: Album) -> str:
    """A run's tables, figures, pictures and pool as HTML; empty for a run that only logs."""
    pieces = [*list_tables(run), draw_pool(run), album.show(run)]
    if run.command not in (*TRAINED, "meta-train", "pool"):
        pieces.insert(0, list_figures(run))
    text = "".join(pieces)
    return f"<h3>{escape(run.label)}</h3><p>lkd {escape(run.command)}: {state_of(run)}.</p>{text}" if text else ""


def list_figures(run: RunRecord) -> str:
    """The figures of `result.json`; before it is there, the last values of what was logged."""
    figures = read_dict(run.path / "result.json").get("figures")
    if not isinstance(figures, dict):
        figures = {name: curve.values[-1] for name, curve in run.log.curves.items()}
    rows = [[str(key), f"{value:.6g}" if isinstance(value, float) else str(value)] for key, value in figures.items()]
    table = f'<div class="wide">{html_table(["figure", "value"], rows)}</div>'
    return f"<details><summary>{len(rows)} figures</summary>{table}</details>" if rows else ""


def list_tables(run: RunRecord) -> list[str]:
    """The tables of a comparison (or its finished trainings), a quickstart, influence; of other runs the text."""
    if run.command == "quickstart":
        found = sorted(run.path.glob("*/table.csv"))
        return [f"<h4>{escape(path.parent.name)}</h4>{show_comparison(path)}" for path in found]
    if run.command == "influence":
        return [show_extremes(run.path / "influence.csv")]
    if run.command == "compare" and (run.path / "table.csv").is_file():
        return [show_comparison(run.path / "table.csv"), show_notes(run.path / "table.txt")]
    if run.command == "compare":
        return [show_cells(run)]
    text = run.path / "table.txt"
    return [f"<pre>{escape(text.read_text(errors='replace'))}</pre>"] if text.is_file() else []


def show_comparison(path: Path) -> str:
    """The table of a comparison, with the differences to its baseline."""
    header = ["student", "method", "last epoch %", "best epoch %", "difference of last", "95 % interval", "seeds"]
    rows = []
    for row in read_csv(path):
        low, high = read_float(row, "interval_low"), read_float(row, "interval_high")
        interval = "" if math.isnan(low) else f"[{low:+.2f}, {high:+.2f}]".replace("-", "−")
        figures = [(read_float(row, name), read_float(row, f"{name}_se")) for name in ("last", "best", "difference")]
        texts = [format_figure(figure, signed) for figure, signed in zip(figures, (False, False, True), strict=True)]
        if figures[2] == (0, 0):  # to itself
            texts[2], interval = "baseline", ""
        rows.append([str(row.get("student")), str(row.get("method")), *texts, interval, str(row.get("seeds"))])
    return f'<div class="wide">{html_table(header, rows)}</div>'


def show_notes(path: Path) -> str:
    """What is below a table in its text form."""
    notes = path.read_text(errors="replace").partition("\n\n")[2] if path.is_file() else ""
    return "".join(f'<p class="note">{escape(line)}</p>' for line in notes.splitlines())


def show_cells(run: RunRecord) -> str:
    """The trainings that an unfinished comparison has finished, one by one: no means before all are there."""
    cells = [read_dict(path) for path in sorted((run.path / "cells").glob("*.json"))]
    rows = [
        [
            *(str(cell.get(key)) for key in ("student", "method", "seed")),
            *(read_top1(cell, key) for key in ("last", "best")),
        ]
        for cell in cells
        if cell.get("reported")
    ]
    table = html_table(["student", "method", "seed", "last epoch %", "best epoch %"], rows)
    tuning = sum(not cell.get("reported") for cell in cells)
    return f'<p>Finished: {len(rows)} reported trainings, {tuning} for tuning.</p><div class="wide">{table}</div>'


def read_top1(cell: dict[str, Any], key: str) -> str:
    """A test accuracy of a finished training."""
    top1 = cell[key].get("top1") if isinstance(cell.get(key), dict) else None
    return f"{top1:.2f}" if isinstance(top1, float) else ""


def show_extremes(path: Path) -> str:
    """The most helpful and the most harmful images of an influence table."""
    rows = [list(row.values()) for row in read_csv(path)]
    if not rows:
        return ""
    chosen = rows if len(rows) <= 2 * EXTREMES else [*rows[:EXTREMES], *rows[-EXTREMES:]]
    table = html_table(read_csv(path)[0], [[str(cell) for cell in row] for row in chosen])
    return f'<p>Most helpful first, most harmful last, of {len(rows):,}.</p><div class="wide">{table}</div>'


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none if it is not there."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        return list(csv.DictReader(file))


def read_float(row: dict[str, str], key: str) -> float:
    """A number of a row; NaN where there is none."""
    try:
        return float(row.get(key) or "nan")
    except ValueError:
        return math.nan


def draw_pool(run: RunRecord) -> str:
    """The ages of a pool's students, a line for each training."""
    ages: dict[Any, list[float]] = {}
    for entry in read_rows(read_dict(run.path / "pool" / "index.json").get("students")):
        if isinstance(entry.get("progress"), int | float):
            ages.setdefault(entry.get("training"), []).append(float(entry["progress"]))
    if not ages:
        return ""
    shown = list(ages.items())[:MOST_TRAININGS]
    dots = "".join(
        f'<circle cx="{40 + 340 * age:.1f}" cy="{12 + 12 * row}" r="3.5"><title>{age:.3f}</title></circle>'
        for row, (_, progress) in enumerate(shown)
        for age in progress
    )
    bottom = 12 * len(shown) + 20
    ticks = "".join(f'<text x="{40 + 340 * age:.0f}" y="{bottom}">{age:g}</text>' for age in (0, 0.25, 0.5, 0.75, 1))
    left = f", of which {MOST_TRAININGS} are drawn" if len(ages) > MOST_TRAININGS else ""
    count = sum(map(len, ages.values()))
    return (
        f"<p>Pool: {count} students of {len(ages)} trainings{left}, by age (0 untrained, 1 fully trained).</p>"
        f'<svg class="pool" viewBox="0 0 420 {bottom + 6}" role="img" aria-label="ages of the pool">{dots}{ticks}</svg>'
    )


# ----------------------------------------------------------------------------------------------------------------------
# The command line that makes a run again.

LEFT_OUT = ("resume",)  # says how a run was gone on with, not what it is


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
            words += [f"--{key}", format_option(value)]
    return words


def format_option(value: Any) -> str:
    """A value as the command line takes it."""
    return show_path(value) if isinstance(value, str) else json.dumps(simplify(value), ensure_ascii=False)


# ----------------------------------------------------------------------------------------------------------------------
# The sections of the page, as HTML.

COLORS = 8  # of the style sheet


def show_results(runs: Sequence[RunRecord], places: dict[str, int], album: Album) -> str:
    """Tables of what runs reached, and what those that do more than log have left."""
    pieces = []
    for commands, tabulate, title in (
        (TRAINED, tabulate_trainings, "Students and teachers, on meta-validation"),
        (("meta-train",), tabulate_learned, "Learned losses, reused on fresh students, on meta-validation"),
    ):
        chosen = [run for run in runs if run.command in commands]
        if chosen:
            header, *rows = tabulate(chosen)
            table = html_table(header, rows, [color_class(places[run.label]) for run in chosen])
            pieces.append(f'<h3>{title}</h3><div class="wide">{table}</div>')
    return "".join([*pieces, *(describe_contents(run, album) for run in runs)])


def color_class(place: int) -> str:
    """The class of what belongs to a run."""
    return f"run c{place % COLORS}"


def show_timing(runs: Sequence[RunRecord]) -> str:
    """Which parts of the steps took the time."""
    rows = []
    for run in runs:
        shares = time_shares(run)
        if not shares:
            continue
        parts = "".join(
            f'<span class="p{place % COLORS}" style="width:{100 * share:.1f}%" title="{escape(name)}"></span>'
            for place, (name, share) in enumerate(shares.items())
        )
        words = ", ".join(
            f'<i class="p{place % COLORS}"></i>{escape(name)} {share:.0%}'
            for place, (name, share) in enumerate(shares.items())
        )
        rows.append(
            f"<tr><td>{escape(run.label)}</td><td>{images_per_second(run)} images/s</td><td>{format_duration(run)}</td>"
            f'<td class="shares"><div class="bar">{parts}</div>{words}</td></tr>'
        )
    table = f'<div class="wide"><table>{"".join(rows)}</table></div>'
    return f"<h3>Where the steps' time went</h3>{table}" if rows else ""


def show_settings(runs: Sequence[RunRecord]) -> str:
    """What differs between the runs, then all settings of each."""
    rows, partial = find_differences(runs)
    differing = {row[0] for row in rows}
    header = ["setting", *(run.label for run in runs)]
    pieces = [
        f"<p>What differs; values that are not the most common one are bold.</p>{mark_unusual(header, rows)}"
        if rows
        else ""
    ]
    if not rows and len(runs) > 1:
        pieces.append("<p>All settings that the runs share are the same.</p>")
    if partial:
        table = f'<div class="wide">{html_table(header, partial)}</div>'
        pieces.append(f"<details><summary>{len(partial)} settings that not all have</summary>{table}</details>")
    for run in runs:
        settings = list_settings(run)
        marks = ["differs" if key in differing else "" for key in settings]
        every = html_table(["setting", "value"], [list(pair) for pair in settings.items()], marks)
        pieces.append(
            f'<details><summary>All settings of {escape(run.label)}</summary><div class="wide">{every}</div></details>'
        )
    return "".join(pieces)


def mark_unusual(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of settings in which the values that are not their row's most common one are marked."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = []
    for key, *values in rows:
        usual = Counter(value for value in values if value != ABSENT).most_common(1)[0][0]
        marks = ['<td class="unusual">' if value not in (usual, ABSENT) else "<td>" for value in values]
        cells = "".join(f"{mark}{escape(value)}</td>" for mark, value in zip(marks, values, strict=True))
        body.append(f"<tr><td>{escape(key)}</td>{cells}</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def show_lineage(runs: Sequence[RunRecord]) -> str:
    """What each run was made of."""
    items = [f"<li><b>{escape(run.label)}</b>{list_ancestors(trace_run(run, runs))}</li>" for run in runs]
    return f'<ul class="lineage">{"".join(items)}</ul>'


def list_ancestors(ancestors: Sequence[Ancestor]) -> str:
    """Ancestors, and theirs, as nested lists."""
    items = []
    for ancestor in ancestors:
        by = [f"made by {ancestor.run}"] if ancestor.run else []
        facts = escape("; ".join([*by, *ancestor.facts]))
        name = f"{escape(ancestor.role)}: <code>{escape(ancestor.name)}</code> {facts}"
        items.append(f"<li>{name}{list_ancestors(ancestor.ancestors)}</li>")
    return f"<ul>{''.join(items)}</ul>" if items else ""


def show_commands(runs: Sequence[RunRecord]) -> str:
    """How to make each run again."""
    pieces = []
    for run in runs:
        versions = run.environment.get("versions")
        known = versions.items() if isinstance(versions, dict) else ()
        software = ", ".join(
            itertools.chain(
                [f"commit {run.environment.get('commit')}"], (f"{name} {version}" for name, version in known)
            )
        )
        pieces.append(
            f"<h3>{escape(run.label)}</h3><pre><code>{escape(command_line(run))}</code></pre>"
            f'<p class="note">{escape(software)}</p>'
        )
    return "".join(pieces)


# ----------------------------------------------------------------------------------------------------------------------
# One self-contained HTML page about runs.

TEMPLATES = Path(__file__).parent
SCRIPTS = ("report_charts.js", "report_surfaces.js", "report.js")
APART = (
    '<p class="warning"><b>These runs do not share their data.</b> Runs over different data sets, splits or label '
    "noise are shown apart; figures of one part say nothing about those of another.</p>"
)


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
    groups, album = group_by_data(runs), Album()
    sections = list_charts(groups, places)
    losses = draw_losses(runs)
    data = {
        "runs": [{"label": run.label, "command": run.command} for run in runs],
        "colors": COLORS,
        "sections": sections,
        "losses": [dataclasses.asdict(loss) for loss in losses],
        "points": POINTS,
        "progress": PROGRESS,
    }
    parts = []
    for number, group in enumerate(groups):
        charts = [
            f'<h3>Curves over {section["axis"]}s</h3><div class="curves" data-section="{place}"></div>'
            for place, section in enumerate(sections)
            if section["data"] == number
        ]
        title = describe_data(group[0]) if len(groups) == 1 else f"Data {number + 1}: {describe_data(group[0])}"
        pieces = [show_results(group, places, album), *charts, show_timing(group)]
        parts.append(f'<section id="data-{number + 1}"><h2>{escape(title)}</h2>{"".join(pieces)}</section>')
    script = "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(f"\n{script}\n".encode()).digest()).decode()
    return Template((TEMPLATES / "report.html").read_text(encoding="utf-8")).substitute(
        title=escape(", ".join(run.label for run in runs[:3]) + (" …" if len(runs) > 3 else "")),
        count=f"{len(runs)} run{'s' * (len(runs) > 1)}",
        made=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        version=escape(__version__),
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        style=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
        warning=APART if len(groups) > 1 else "",
        parts="".join(parts),
        losses='<section id="losses"><h2>Losses</h2><div id="surfaces"></div></section>' if losses else "",
        settings=show_settings(runs),
        lineage=show_lineage(runs),
        commands=show_commands(runs),
        data=embed_data(data, "data"),
        script=script,
    )
