"""Which trainings a comparison consists of, and which options tuning picks."""

from pathlib import Path

from lkd.cells import Cell, cell_path
from lkd.config import CompareRecipe
from lkd.files import write_json
from lkd.kept_results import read_result
from lkd.tuning import Method, choose_points


def plan_tuning(recipe: CompareRecipe) -> list[Cell]:
    """The trainings that tuning needs: the points of every grid, with the first seeds and the first student."""
    points = {label: choose_points(recipe, label) for label in recipe.methods}
    return [
        Cell(label, options, recipe.students[0], recipe.seed + offset, reported=False)
        for offset in range(recipe.tuning_seeds)
        for label in recipe.methods
        for options in points[label]
        if len(points[label]) > 1
    ]


def pick_options(recipe: CompareRecipe, folder: Path) -> dict[str, Method]:
    """Each method's options: the best of its points on meta-validation, in the mean over the tuning seeds.

    By accuracy; calibrated cross-entropy breaks ties.
    """
    cells = plan_tuning(recipe)
    picks: dict[str, Method] = {}
    for label in recipe.methods:
        ranked = []
        for options in choose_points(recipe, label):
            mine = [cell for cell in cells if cell.method == label and cell.loss == options]
            rows = [read_result(cell_path(recipe, cell, folder))["meta_validation"] for cell in mine]
            ranked.append(
                (-sum(row["top1"] for row in rows), sum(row["calibrated_cross_entropy"] for row in rows), options)
            )
        picks[label] = min(ranked, key=lambda entry: entry[:2])[2]
    write_json(folder / "picks.json", picks)
    return picks


def plan_report(recipe: CompareRecipe, picks: dict[str, Method]) -> list[Cell]:
    """The trainings behind the table."""
    return [
        Cell(label, options, student, recipe.seed + offset, reported=True)
        for offset in range(recipe.seeds)
        for student in recipe.students
        for label, options in picks.items()
    ]
