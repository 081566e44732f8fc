"""What a comparison leaves: tables, picture, notes, figures."""

import math
import re
from pathlib import Path
from typing import Any

from lkd.cells import Row, cell_path
from lkd.comparison_plan import plan_report, plan_tuning
from lkd.comparison_plot import plot_table
from lkd.comparison_table import (
    format_csv,
    format_latex,
    format_options,
    format_table,
    list_cells,
    list_rows,
    summarize,
    tabulate,
)
from lkd.config import CompareRecipe
from lkd.files import write_text
from lkd.kept_results import read_result
from lkd.losses.build import LOSSES
from lkd.published import find_published
from lkd.teacher import load_teacher_network
from lkd.tuning import Method, balance_of, split_method


def write_results(recipe: CompareRecipe, picks: dict[str, Method], folder: Path) -> list[Row]:
    """Write `table.txt`, `table.csv`, `table.tex`, `cells.csv` and `comparison.png` from the finished cells."""
    rows = [read_result(cell_path(recipe, cell, folder)) for cell in plan_report(recipe, picks)]
    tuned = [cell.method for cell in plan_tuning(recipe)]
    table = [
        row | {"tuned_over": tuned.count(row["method"]), "published": published_beside(recipe, row)}
        for row in summarize(rows, recipe.baseline)
    ]
    lines, notes = tabulate(table, recipe.baseline), write_notes(recipe, picks, table) + note_diverged(rows)
    write_text(folder / "table.txt", format_table(lines, notes))
    write_text(folder / "table.csv", format_csv(list_rows(table)))
    write_text(folder / "table.tex", format_latex(lines, notes))
    write_text(folder / "cells.csv", format_csv(list_cells(rows)))
    plot_table(table, recipe.baseline, folder / "comparison.png")
    return table


def published_beside(recipe: CompareRecipe, row: Row) -> dict[str, Any] | None:
    """The published number of a row's protocol, if there is one and the recipe changes nothing about it."""
    loss = row["loss"]["name"] if isinstance(row["loss"], dict) else row["loss"]
    epochs = split_method(row["loss"], recipe.train)[1].epochs
    if balance_of(row["loss"]) or recipe.data.label_noise or recipe.teacher.random_answers or loss not in LOSSES:
        return None
    teacher = recipe.teacher.name or load_teacher_network(recipe.teacher.path)[1]["architecture"]["name"]
    return find_published(recipe.data.name, teacher, row["student"], epochs, loss)


def write_notes(recipe: CompareRecipe, picks: dict[str, Method], table: list[Row]) -> list[str]:
    """What a reader of the table must know."""
    notes = [
        f"Test accuracy, mean ± standard error over {recipe.seeds} paired seeds; 95 % interval of the paired "
        "difference by Student's t. Best: the epoch that is best on meta-validation.",
        "Cost: medians over seeds; steps/s and peak memory of the training steps alone, evaluation left out, on a "
        "machine shared by all workers; peak above what images, teacher and loss take.",
    ]
    tuned = {row["method"]: row["tuned_over"] for row in table}
    if any(tuned.values()):
        notes.append(
            f"Tuned over: trainings on {recipe.students[0].name}, {recipe.tuning_seeds} for each point (one a seed), "
            "from which the options below were picked on meta-validation"
            + (f"; the budget was {recipe.tuning_trainings} for each." if recipe.tuning_trainings else ".")
        )
        short = [f"{label} ({count})" for label, count in tuned.items() if count < recipe.tuning_trainings]
        if short:
            notes.append(f"Less than the budget, because there is no more to choose from: {', '.join(short)}.")
        notes += [f"  {label}: {format_options(picks[label])}" for label, count in tuned.items() if count]
    sources = {row["published"]["source"]: None for row in table if row["published"]}
    return [*notes, *(f"Published, students trained on all training images: {source}" for source in sources)]


def note_diverged(rows: list[Row]) -> list[str]:
    """Say which seeds diverged."""
    diverged = [row for row in rows if "diverged_at" in row]
    cells = ", ".join(f"{row['method']} on {row['student']}, seed {row['seed']}" for row in diverged)
    return [f"Diverged, and counted as guessing: {cells}."] if diverged else []


def figures_of(table: list[Row], baseline: str) -> dict[str, float]:
    """The figures of `result.json`: test accuracy, percent, last epoch; the first student's have no student's name."""
    first = table[0]["student"]
    figures: dict[str, float] = {"methods": len({row["method"] for row in table}), "seeds": table[0]["seeds"]}
    for row in table:
        key = figure_key(row["method"]) + ("" if row["student"] == first else f"_{figure_key(row['student'])}")
        minus = f"{key}_minus_{figure_key(baseline)}"
        figures[f"{key}_accuracy"], figures[f"{key}_se"] = row["last"]
        figures[minus] = row["difference"][0]
        figures[f"{minus}_low"], figures[f"{minus}_high"] = row["interval"]
    return {key: round(value, 4) for key, value in figures.items() if not math.isnan(value)}


def figure_key(label: str) -> str:
    """A label as the key of a figure: lower case, underscores for everything but letters and digits."""
    return re.sub(r"\W+", "_", label.lower())
