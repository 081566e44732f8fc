"""From full trainings and rollouts to correlations, a recommendation, and the files that hold them."""

from typing import Any

import torch
from torch import Tensor

from lkd.comparison_table import format_csv
from lkd.config import FidelityRecipe
from lkd.data import seeded_generator
from lkd.evidence import evidence
from lkd.fidelity_plot import plot_fidelity
from lkd.fidelity_recommendation import (
    Setting,
    SettingFidelity,
    average_ages,
    recommend,
    setting_of,
    tolerance_of,
    weights_of,
)
from lkd.fidelity_rollouts import list_objectives
from lkd.fidelity_table import write_table
from lkd.files import write_json, write_text
from lkd.rank_correlation import REPLICATES, bootstrap_correlation, correlate, noise_ceiling, percentile_interval
from lkd.run import Run

Row = dict[str, Any]
CRITERIA = {"accuracy": ("top1", 1), "calibrated_cross_entropy": ("calibrated_cross_entropy", -1)}
"""What full trainings are scored by: name → meta-validation figure, and the sign that makes more of it better."""


def write_results(recipe: FidelityRecipe, full: list[Row], rollouts: list[Row], run: Run) -> dict[str, Any]:
    """Correlate, recommend, and write fidelity.json, result.json, table.txt, the CSV files and fidelity.png.

    Args:
        recipe: The recipe.
        full: Results of the full trainings.
        rollouts: Results of the draws.
        run: Where to write.

    Returns:
        What `fidelity.json` holds.
    """
    scores = {criterion: tabulate_trainings(recipe, full, criterion) for criterion in CRITERIA}
    values = tabulate_rollouts(recipe, rollouts)
    rows, settings = correlate_all(recipe, scores, values)
    ceilings = {
        criterion: dict(zip(("rho", "low", "high"), noise_ceiling(score, REPLICATES, draws_of(recipe)), strict=True))
        for criterion, score in scores.items()
    }
    ceiling = ceilings["accuracy"]
    recommended = recommend(settings, tolerance_of(ceiling))
    provenance = run.provenance()
    result = {
        "recommended": recommended,
        "age_weights": weights_of(settings, recommended),
        "rows": rows,
        "ceilings": ceilings,
        "commit": provenance["environment"]["commit"],
        "versions": provenance["environment"]["versions"],
        "recipe": provenance["recipe"],
    }
    write_json(run.path / "fidelity.json", result)
    figures = figures_of(rows, settings, recommended, ceiling)
    write_json(run.path / "result.json", evidence("lkd fidelity", provenance["environment"], figures))
    write_text(run.path / "table.txt", write_table(recipe, full, rows, settings, ceilings, recommended))
    write_text(run.path / "rows.csv", format_csv([list(rows[0]), *(list(row.values()) for row in rows)]))
    write_text(run.path / "trainings.csv", format_csv(list_trainings(full)))
    write_text(run.path / "rollouts.csv", format_csv(list_rollouts(rollouts)))
    by_accuracy = [row for row in rows if row["criterion"] == "accuracy"]
    plot_fidelity(by_accuracy, ceiling, recommended, result["age_weights"], run.path / "fidelity.png")
    return result


def draws_of(recipe: FidelityRecipe) -> torch.Generator:
    """The bootstrap's generator; the same for every row, so that rows are of the same resampled trainings."""
    return seeded_generator(recipe.seed, 7)


def tabulate_trainings(recipe: FidelityRecipe, full: list[Row], criterion: str) -> Tensor:
    """Scores of the full trainings, more is better, [seeds, losses]."""
    key, sign = CRITERIA[criterion]
    found = {(row["seed"], row["method"]): sign * row["meta_validation"][key] for row in full}
    seeds = sorted({row["seed"] for row in full})
    return torch.tensor([[found[seed, label] for label in recipe.losses] for seed in seeds], dtype=torch.float64)


def tabulate_rollouts(recipe: FidelityRecipe, rollouts: list[Row]) -> dict[tuple[Setting, float], Tensor]:
    """Outer values of each setting and age, negated so that more is better, [draws, losses]."""
    groups: dict[tuple[Setting, float], list[list[float]]] = {}
    for row in sorted(rollouts, key=lambda row: row["number"]):
        for objective in list_objectives(recipe):
            key = (row["annealing"], objective, row["steps"]), row["age"]
            groups.setdefault(key, []).append([-row["values"][objective][label] for label in recipe.losses])
    return {key: torch.tensor(values, dtype=torch.float64) for key, values in groups.items()}


def correlate_all(
    recipe: FidelityRecipe, scores: dict[str, Tensor], values: dict[tuple[Setting, float], Tensor]
) -> tuple[list[Row], dict[Setting, SettingFidelity]]:
    """ρ and its interval for every setting, age and criterion; the fidelity of every setting, by accuracy.

    Args:
        recipe: The recipe.
        scores: Criterion → scores of the full trainings [seeds, losses].
        values: Setting and age → outer values [draws, losses].
    """
    rows: list[Row] = []
    settings: dict[Setting, SettingFidelity] = {}
    combinations: list[Setting] = [
        (annealing, objective, steps)
        for annealing in recipe.annealing
        for objective in list_objectives(recipe)
        for steps in recipe.rollout_lengths
    ]
    for setting in combinations:
        for criterion, score in scores.items():
            rhos, draws = [], []
            for age in recipe.ages:
                rhos.append(correlate(values[setting, age], score))
                draws.append(bootstrap_correlation(score, values[setting, age], REPLICATES, draws_of(recipe)))
                low, high = percentile_interval(draws[-1])
                names = dict(zip(("annealing", "objective", "rollout_steps"), setting, strict=True))
                rows.append(names | {"age": age, "criterion": criterion, "rho": rhos[-1], "low": low, "high": high})
            if criterion == "accuracy":
                settings[setting] = average_ages(recipe.ages, rhos, draws)
    return rows, settings


def figures_of(
    rows: list[Row],
    settings: dict[Setting, SettingFidelity],
    recommended: dict[str, Any] | None,
    ceiling: dict[str, float],
) -> dict[str, float]:
    """The figures of `result.json`."""
    figures = {"ceiling": ceiling["rho"], "ceiling_low": ceiling["low"], "ceiling_high": ceiling["high"]}
    if recommended is not None:
        best = settings[setting_of(recommended)]
        figures |= {"recommended_rollout_steps": recommended["rollout_steps"]}
        figures |= {"recommended_rho": best.rho, "recommended_rho_low": best.low, "recommended_rho_high": best.high}
    for row in rows:
        if row["criterion"] == "accuracy":
            key = f"rho_{row['annealing']}_{row['objective']}_k{row['rollout_steps']}_age{row['age']:g}"
            figures[key] = row["rho"]
    return {key: round(value, 4) for key, value in figures.items()}


def list_trainings(full: list[Row]) -> list[list[object]]:
    """Every full training, under a header."""
    keys = ("top1", "cross_entropy", "calibrated_cross_entropy", "temperature")
    rows = [
        [row["method"], row["seed"], *(row["meta_validation"][key] for key in keys), row["seconds"]] for row in full
    ]
    return [["loss", "seed", *keys, "seconds"], *rows]


def list_rollouts(rollouts: list[Row]) -> list[list[object]]:
    """Every rollout's outer values, under a header."""
    keys = ("annealing", "steps", "age", "number", "student", "progress")
    return [
        [*keys, "objective", "loss", "value"],
        *(
            [*(row[key] for key in keys), objective, label, value]
            for row in rollouts
            for objective, values in row["values"].items()
            for label, value in values.items()
        ),
    ]
