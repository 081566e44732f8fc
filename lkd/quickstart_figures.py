"""The figures of the quickstart."""

from pathlib import Path
from typing import Any

from lkd.cells import Cell, cell_path
from lkd.comparison_plan import plan_report, plan_tuning
from lkd.config import CompareRecipe
from lkd.kept_results import read_result
from lkd.quickstart_recipes import SEEN, setting_folder

LABELS = {"CE": "ce", "KD": "kd", "learned": "learned"}


def figures_of(tables: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """The evidence's figures: test accuracy, percent, mean over seeds, and its standard error."""
    figures: dict[str, float] = {}
    for setting, table in tables.items():
        suffix = "" if setting == "clean" else f"_{setting}"
        for row in table:
            name = f"{LABELS[row['method']]}_{'seen' if row['student'] == SEEN.name else 'unseen'}{suffix}"
            figures[name], figures[f"{name}_se"] = (round(value, 4) for value in row["last"])
    return figures


def grid_accuracies(
    recipes: dict[str, CompareRecipe], picks: dict[str, dict[str, Any]], folder: Path
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Meta-validation accuracy of every fixed KD, of CE and of the learned loss: first seed, seen student.

    Returns:
        Fixed KD → setting → %, and method → setting → %.
    """
    grid: dict[str, dict[str, float]] = {}
    bold: dict[str, dict[str, float]] = {"CE": {}, "learned": {}}
    for setting, recipe in recipes.items():
        place = setting_folder(folder, setting)
        for cell in plan_tuning(recipe):
            options: Any = cell.loss
            label = f"KD({options['weight']:g}, {options['temperature']:g})"
            grid.setdefault(label, {})[setting] = meta_validation_accuracy(recipe, cell, place)
        for cell in plan_report(recipe, picks[setting]):
            if cell.method in bold and cell.student == SEEN and cell.seed == recipe.seed:
                bold[cell.method][setting] = meta_validation_accuracy(recipe, cell, place)
    return grid, bold


def meta_validation_accuracy(recipe: CompareRecipe, cell: Cell, folder: Path) -> float:
    """A finished cell's accuracy on meta-validation at the last step, %."""
    return read_result(cell_path(recipe, cell, folder))["meta_validation"]["top1"]


def regrets(grid: dict[str, dict[str, float]], bold: dict[str, dict[str, float]]) -> dict[str, float]:
    """For each loss, its largest gap over the settings to the best fixed KD of that setting, in points."""
    best = {setting: max(values[setting] for values in grid.values()) for setting in next(iter(grid.values()))}
    return {
        label: max(best[setting] - value for setting, value in values.items())
        for label, values in (grid | bold).items()
    }
