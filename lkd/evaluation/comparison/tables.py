"""The table and the picture of a comparison."""

import csv
import io
import itertools
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import SEPARATING_LINE, tabulate

from lkd.config.evaluation import CompareRecipe
from lkd.core.files import write_text
from lkd.core.statistics import confidence_interval, mean_and_error
from lkd.core.tensor_files import read_result
from lkd.evaluation.comparison.trials import (
    Method,
    Row,
    choose_points,
    expand_grid,
    format_options,
    plan_report,
    plan_tuning,
    trial_path,
)
from lkd.evaluation.report.page import render
from lkd.losses.learned.file import NOT_LEARNED, mark_unlearned
from lkd.meta_training.log import save_figure
from lkd.tracking.run import shorten_paths

# ----------------------------------------------------------------------------------------------------------------------
# The picture of a comparison.


def plot_table(table: list[Row], baseline: str, path: Path) -> None:
    """Draw, for each student, test accuracy and the paired difference to the baseline, one line for each method."""
    students, methods = (list(dict.fromkeys(row[key] for row in table)) for key in ("student", "method"))
    size = 9, (1.1 + 0.32 * len(methods)) * len(students)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(students), 2, sharey="row", squeeze=False)
    for (left, right), student in zip(axes, students, strict=True):
        rows = [row for row in table if row["student"] == student]
        draw_accuracies(left, rows, baseline)
        draw_differences(right, [row for row in rows if row["method"] != baseline], methods, baseline)
        left.set_yticks(range(len(methods)), [name_method(row) for row in rows])
        left.set_ylim(len(methods) - 0.5, -0.5)
        left.set_title(f"{student}: test accuracy, last epoch", fontsize=10)
        right.set_title(f"{student}: difference to {baseline}, same seeds", fontsize=10)
        for axis in (left, right):
            axis.grid(axis="x", color="0.92")
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
    seeds = table[0]["seeds"]
    axes[-1][0].set_xlabel(f"%; mean ± standard error, {seeds} seed{'s' * (seeds > 1)}")
    axes[-1][1].set_xlabel("points; mean and 95 % interval; dots: seeds")
    save_figure(figure, path)


def name_method(row: Row) -> str:
    """The method's label, with a word if its loss was not learned."""
    return mark_unlearned(row["method"], row["learned"])


def draw_accuracies(axis: Axes, rows: list[Row], baseline: str) -> None:
    """Points with standard errors; a line through the baseline's."""
    for position, row in enumerate(rows):
        mean, error = row["last"]
        color = "0.35" if row["method"] == baseline else "tab:blue"
        axis.errorbar(mean, position, xerr=0 if math.isnan(error) else error, fmt="o", color=color, capsize=3)
        if row["method"] == baseline:
            axis.axvline(mean, color="0.6", lw=0.8, ls=":")


def draw_differences(axis: Axes, rows: list[Row], methods: list[str], baseline: str) -> None:
    """Every seed's difference as a dot, and the interval of the mean; coloured where it leaves out zero."""
    axis.axvline(0, color="0.6", lw=0.8, ls=":")
    axis.annotate(
        baseline, (0, methods.index(baseline)), ha="center", va="center", fontsize=8, color="0.35", backgroundcolor="w"
    )
    for row in rows:
        position = methods.index(row["method"])
        mean, (low, high) = row["difference"][0], row["interval"]
        color = "tab:green" if low > 0 else "tab:red" if high < 0 else "0.35"
        above = [position - 0.25] * len(row["differences"])
        axis.plot(row["differences"], above, "o", color=color, alpha=0.5, ms=3.5, mew=0)
        error = [[0.0], [0.0]] if math.isnan(low) else [[mean - low], [high - mean]]
        axis.errorbar(mean, position, xerr=error, fmt="D", ms=5, color=color, capsize=3)


# ----------------------------------------------------------------------------------------------------------------------
# The table of a comparison: its rows, and the same table as text, CSV and LaTeX.

COST = ("threads", "steps_per_second", "loss_parameters", "peak_mib")


def summarize(rows: list[Row], baseline: str) -> list[Row]:
    """Average the results of reported trials over seeds.

    Returns:
        One row for each method and student. `last`, `best` and `difference` (of last, to the baseline, seed by seed)
        are (mean, standard error) in percent or points of test accuracy, `interval` is the difference's at 95 %. The
        cost is the median training's, `peak_mib` None where it was not measured; `learned` None of a hand-made loss.
    """
    groups: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        groups.setdefault((row["student"], row["method"]), {})[row["seed"]] = row
    table = []
    for (student, method), seeds in groups.items():
        base = groups[student, baseline]
        differences = [row["last"]["top1"] - base[seed]["last"]["top1"] for seed, row in seeds.items()]
        trials = list(seeds.values())
        peaks = [row["peak_mib"] for row in trials if row["peak_mib"] is not None]
        table.append(
            {
                "student": student,
                "method": method,
                "loss": trials[0]["loss"],
                "learned": trials[0].get("learned"),
                "seeds": len(seeds),
                "last": mean_and_error([row["last"]["top1"] for row in trials]),
                "best": mean_and_error([row["best"]["top1"] for row in trials]),
                "difference": (0.0, 0.0) if method == baseline else mean_and_error(differences),
                "interval": confidence_interval(differences),
                "differences": differences,
                "threads": trials[0].get("threads"),
                "steps_per_second": statistics.median(row["steps_per_second"] for row in trials),
                "loss_parameters": trials[0]["loss_parameters"],
                "peak_mib": statistics.median(peaks) if peaks else None,
            }
        )
    return table


def list_lines(table: list[Row], baseline: str) -> list[list[str]]:
    """The header and the rows as words."""
    lines: list[dict[str, str]] = []
    for row in table:
        compared, (low, high) = row["method"] != baseline, row["interval"]
        interval = f"[{low:+.2f}, {high:+.2f}]".replace("-", "−") if compared and not math.isnan(low) else ""
        lines.append(
            {
                "student": row["student"],
                "method": name_method(row),
                "last epoch %": format_figure(row["last"]),
                "best epoch %": format_figure(row["best"]),
                f"last − {baseline}": format_figure(row["difference"], True) if compared else "",
                "95 % interval": interval,
                "seeds": str(row["seeds"]),
                "tuned over": str(row["tuned_over"]),
                "steps/s": f"{row['steps_per_second']:.1f}",
                "loss parameters": f"{row['loss_parameters']:,}",
                "peak MiB": "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
            }
        )
    return [list(lines[0]), *(list(line.values()) for line in lines)]


def format_table(lines: list[list[str]], notes: Sequence[str] = ()) -> str:
    """A table for the terminal, with notes below."""
    text = tabulate(lines, tablefmt="plain", disable_numparse=True)
    return "\n".join([*(line.rstrip() for line in text.splitlines()), *([""] if notes else []), *notes]) + "\n"


def format_latex(lines: list[list[str]], notes: Sequence[str] = ()) -> str:
    r"""A LaTeX `tabular` (needs `\usepackage{booktabs}`), with the notes as comments and a rule between the groups."""
    header, *body = lines
    rows: list[Any] = []
    for before, line in zip([None, *body], body, strict=False):
        rows += [line] if before is None or before[0] == line[0] else [SEPARATING_LINE, line]
    alignment = ["left", "left", *["right"] * (len(header) - 2)]
    text = tabulate(rows, header, tablefmt="latex_booktabs", disable_numparse=True, colalign=alignment)
    for sign, command in (("−", "$-$"), ("±", r"$\pm$"), ("[", "{[}"), ("]", "{]}")):  # `[` after `\\` is an option
        text = text.replace(sign, command)
    return "\n".join([*(f"% {note}" for note in notes), text, ""])


def format_csv(records: Sequence[Mapping[str, object]]) -> str:
    """Records as CSV; their keys are the header."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()


def list_rows(table: list[Row]) -> list[Row]:
    """The table's numbers, unrounded; nothing where there is none."""
    records = []
    for row in table:
        record = {name: row[name] for name in ("student", "method", "learned")}
        for name in ("last", "best", "difference"):
            record |= {name: row[name][0], f"{name}_se": row[name][1]}
        record |= {"interval_low": row["interval"][0], "interval_high": row["interval"][1]}
        record |= {name: row[name] for name in ("seeds", "tuned_over", *COST)}
        records.append({name: None if value != value else value for name, value in record.items()})
    return records


def list_trials(rows: list[Row]) -> list[Row]:
    """Every seed's figures."""
    records = []
    for row in rows:
        loss, peak = shorten_paths(row["loss"]), row["peak_mib"]
        record = {name: row[name] for name in ("method", "student", "seed")}
        record |= {"loss": json.dumps(loss) if isinstance(loss, dict) else loss}
        record |= {f"test_{name}": f"{row[name]['top1']:.4f}" for name in ("last", "best")}
        record |= {"meta_validation_last": f"{row['meta_validation']['top1']:.4f}", "best_step": row["best_step"]}
        record |= {"diverged_at": row.get("diverged_at", ""), "seconds": f"{row['seconds']:.1f}"}
        record |= {"threads": row.get("threads", ""), "device": row.get("device", "")}
        record |= {"steps_per_second": f"{row['steps_per_second']:.2f}"}
        record |= {"loss_parameters": row["loss_parameters"], "peak_mib": "" if peak is None else f"{peak:.1f}"}
        records.append(record)
    return records


def format_figure(figure: tuple[float, float], signed: bool = False) -> str:
    """Mean ± standard error; no ± where there is one seed only."""
    mean, error = figure
    text = f"{mean:+.2f}" if signed else f"{mean:.2f}"
    return (text if math.isnan(error) else f"{text} ± {error:.2f}").replace("-", "−")


# ----------------------------------------------------------------------------------------------------------------------
# What a comparison leaves: tables, picture, notes, figures.


def write_results(recipe: CompareRecipe, picks: dict[str, Method], folder: Path) -> list[Row]:
    """Write `table.txt`, `table.csv`, `table.tex`, `cells.csv` and `comparison.png` from the finished trials."""
    rows = [read_result(trial_path(recipe, trial, folder)) for trial in plan_report(recipe, picks)]
    tuned = [trial.method for trial in plan_tuning(recipe)]
    table = [row | {"tuned_over": tuned.count(row["method"])} for row in summarize(rows, recipe.baseline)]
    lines, notes = list_lines(table, recipe.baseline), write_notes(recipe, picks, table, rows)
    write_text(folder / "table.txt", format_table(lines, notes))
    write_text(folder / "table.csv", format_csv(list_rows(table)))
    write_text(folder / "table.tex", format_latex(lines, notes))
    write_text(folder / "cells.csv", format_csv(list_trials(rows)))
    plot_table(table, recipe.baseline, folder / "comparison.png")
    return table


UNLEARNED = f"{NOT_LEARNED}: its file holds the initial loss; no look at reuse was better, or no hypergradient counted."


def write_notes(recipe: CompareRecipe, picks: dict[str, Method], table: list[Row], rows: list[Row]) -> list[str]:
    """What a reader of the table must know."""
    tuned = {row["method"]: row["tuned_over"] for row in table}
    short = {label: count for label, count in tuned.items() if count < recipe.tuning_trainings}
    rounded = {
        label: count
        for label, count in short.items()
        if len(choose_points(recipe, label)) < len(expand_grid(recipe.methods[label]))
    }
    text = render(
        "comparison/notes.txt",
        recipe=recipe,
        threads=sorted({str(row.get("threads", "not written")) for row in rows}),
        devices=sorted({row.get("device", "not written") for row in rows}),
        picks={label: format_options(picks[label]) for label, count in tuned.items() if count},
        short={label: count for label, count in short.items() if label not in rounded},
        rounded=rounded,
        unlearned=list(dict.fromkeys(row["method"] for row in table if row["learned"] is False)),
        warning=UNLEARNED,
        diverged=[f"{row['method']} on {row['student']}, seed {row['seed']}" for row in rows if "diverged_at" in row],
    )
    return text.splitlines()


def figures_of(table: list[Row], baseline: str) -> dict[str, float]:
    """The figures of `result.json`: test accuracy, percent, last epoch; the first student's have no student's name.

    Where a label looks like that of another method with its student, the later one is numbered.
    """
    first = table[0]["student"]
    figures: dict[str, float] = {"methods": len({row["method"] for row in table}), "seeds": table[0]["seeds"]}
    if table[0]["threads"]:
        figures["threads"] = table[0]["threads"]
    for row in table:
        own = figure_key(row["method"]) + ("" if row["student"] == first else f"_{figure_key(row['student'])}")
        names = itertools.chain([own], (f"{own}_{number}" for number in itertools.count(2)))
        key = next(name for name in names if f"{name}_accuracy" not in figures)
        minus = f"{key}_minus_{figure_key(baseline)}"
        figures[f"{key}_accuracy"], figures[f"{key}_se"] = row["last"]
        if row["learned"] is False:
            figures[f"{key}_learned"] = 0
        figures[minus] = row["difference"][0]
        figures[f"{minus}_low"], figures[f"{minus}_high"] = row["interval"]
    return {key: round(value, 4) for key, value in figures.items() if not math.isnan(value)}


def figure_key(label: str) -> str:
    """A label as the key of a figure: lower case, underscores for everything but letters and digits."""
    return re.sub(r"\W+", "_", label.lower())
