"""What a run leaves besides its log: tables, figures, pictures, pool."""

import csv
import math
from html import escape
from pathlib import Path
from typing import Any

from lkd.comparison_table import format_figure
from lkd.reporting.html import embed_picture, html_table
from lkd.reporting.results import TRAINED, state_of
from lkd.reporting.runs import RunRecord, read_dict, read_rows

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
