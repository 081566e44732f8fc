"""From full trainings and rollouts to correlations, a recommendation, a table and a picture."""

import itertools
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lkd.config.evaluation import FidelityRecipe
from lkd.core.files import write_json, write_text
from lkd.core.statistics import (
    REPLICATES,
    Values,
    bootstrap_correlation,
    correlate,
    mean_and_error,
    noise_ceiling,
    percentile_interval,
)
from lkd.evaluation.comparison.tables import format_csv, format_figure, format_table
from lkd.evaluation.report.page import render
from lkd.meta_training.log import save_figure
from lkd.meta_training.rollouts import OBJECTIVES
from lkd.tracking.run import Run, evidence

Row = dict[str, Any]
CRITERIA = {"accuracy": ("top1", 1), "calibrated_cross_entropy": ("calibrated_cross_entropy", -1)}
"""What full trainings are scored by: name → meta-validation figure, and the sign that makes more of it better."""

# ----------------------------------------------------------------------------------------------------------------------
# How well each kind of rollout ranks the losses, and which to meta-train with.


class Setting(NamedTuple):
    """A kind of rollout."""

    annealing: str
    objective: str
    rollout_steps: int


class SettingFidelity(NamedTuple):
    """How well the rollouts of one setting rank losses, over the ages as they would be drawn."""

    ages: list[float]
    weights: list[float]  # of the ages, in proportion to max(0, ρ)²; sum 1, or all 0 if no age ranks at all
    mean: float  # the plain mean of ρ over the ages
    rho: float  # the weighted mean, between the ends of its interval
    low: float
    high: float


def average_ages(ages: list[float], rhos: list[float], draws: list[Values]) -> SettingFidelity:
    """The fidelity of a setting, ages drawn by their own weights.

    `draws` are each age's bootstrapped ρ, made with the same resampled trainings; the weights are not drawn anew.
    """
    squares = [max(0.0, rho) ** 2 for rho in rhos]
    weights = [square / sum(squares) if sum(squares) else 0.0 for square in squares]
    weighted = sum(weight * rho for weight, rho in zip(weights, rhos, strict=True))
    return SettingFidelity(ages, weights, sum(rhos) / len(rhos), weighted, *percentile_interval(np.dot(weights, draws)))


def recommend(settings: dict[Setting, SettingFidelity], tolerance: float) -> Setting | None:
    """Choose annealing, objective and K.

    The annealing and the objective: those with the highest ρ in the plain mean over ages and K (a mean weighted by ρ
    itself would favour noise). Then K: the smallest whose weighted ρ has a lower end of its interval that is at most
    `tolerance` under the best K's; none if these do not rank the losses as full trainings do at all (no ρ is positive,
    at any age and K).
    """
    means: dict[tuple[str, str], list[float]] = {}
    for setting, found in settings.items():
        means.setdefault(setting[:2], []).append(found.mean)
    best = max(means, key=lambda pair: sum(means[pair]) / len(means[pair]))
    lows = {setting: found.low for setting, found in settings.items() if setting[:2] == best and found.rho > 0}
    near = [setting for setting, low in lows.items() if low >= max(lows.values()) - tolerance]
    return min(near, key=lambda setting: setting.rollout_steps) if near else None


@dataclass
class Fidelity:
    """What was found: ρ for every setting, age and criterion, and the fidelity of every setting by accuracy.

    `ceilings` has of each criterion `rho`, `low` and `high` of the noise ceiling: how well full trainings rank as they
    themselves do.
    """

    rows: list[Row]
    settings: dict[Setting, SettingFidelity]
    ceilings: dict[str, dict[str, float]]

    @property
    def tolerance(self) -> float:
        """How far full trainings fall short of their own ranking by chance: the ceiling above its lower end."""
        ceiling = self.ceilings["accuracy"]
        return max(0.0, ceiling["rho"] - ceiling["low"])

    @cached_property
    def recommended(self) -> Setting | None:
        """The setting to meta-train with, if any."""
        return recommend(self.settings, self.tolerance)

    @property
    def age_weights(self) -> list[list[float]]:
        """[age, weight] pairs of the recommended setting; none where nothing is recommended."""
        if self.recommended is None:
            return []
        found = self.settings[self.recommended]
        return [[age, round(weight, 4)] for age, weight in zip(found.ages, found.weights, strict=True)]

    def rows_by(self, criterion: str) -> list[Row]:
        """The rows of one criterion."""
        return [row for row in self.rows if row["criterion"] == criterion]


def correlate_all(recipe: FidelityRecipe, full: list[Row], rollouts: list[Row]) -> Fidelity:
    """Correlate the rollouts of every setting and age with the full trainings."""

    def generator() -> np.random.Generator:  # the same for every row: rows are of the same resampled trainings
        return np.random.default_rng([recipe.seed, 7])

    scores = {criterion: tabulate_trainings(recipe, full, criterion) for criterion in CRITERIA}
    values = tabulate_rollouts(recipe, rollouts)
    ceilings = {
        criterion: dict(zip(("rho", "low", "high"), noise_ceiling(score, generator()), strict=True))
        for criterion, score in scores.items()
    }
    found = Fidelity([], {}, ceilings)
    for kind in itertools.product(recipe.annealing, list_objectives(recipe), recipe.rollout_lengths):
        setting = Setting(*kind)
        for criterion, score in scores.items():
            rhos, draws = [], []
            for age in recipe.ages:
                rhos.append(correlate(values[setting, age], score))
                draws.append(bootstrap_correlation(score, values[setting, age], generator()))
                low, high = percentile_interval(draws[-1])
                row = {"age": age, "criterion": criterion, "rho": rhos[-1], "low": low, "high": high}
                found.rows.append(setting._asdict() | row)
            if criterion == "accuracy":
                found.settings[setting] = average_ages(recipe.ages, rhos, draws)
    return found


def list_objectives(recipe: FidelityRecipe) -> list[str]:
    """The outer objectives that rollouts are scored by."""
    return recipe.objectives or list(OBJECTIVES)


def tabulate_trainings(recipe: FidelityRecipe, full: list[Row], criterion: str) -> Values:
    """Scores of the full trainings, more is better, [seeds, losses]."""
    key, sign = CRITERIA[criterion]
    found = {(row["seed"], row["method"]): sign * row["meta_validation"][key] for row in full}
    seeds = sorted({row["seed"] for row in full})
    return np.array([[found[seed, label] for label in recipe.losses] for seed in seeds])


def tabulate_rollouts(recipe: FidelityRecipe, rollouts: list[Row]) -> dict[tuple[Setting, float], Values]:
    """Outer values of each setting and age, negated so that more is better, [draws, losses]."""
    groups: dict[tuple[Setting, float], list[list[float]]] = {}
    for row in sorted(rollouts, key=lambda row: row["number"]):
        for objective, values in row["values"].items():
            key = Setting(row["annealing"], objective, row["steps"]), row["age"]
            groups.setdefault(key, []).append([-values[label] for label in recipe.losses])
    return {key: np.array(values) for key, values in groups.items()}


# ----------------------------------------------------------------------------------------------------------------------
# The files: fidelity.json, result.json, table.txt, CSV, and the picture.


def write_results(recipe: FidelityRecipe, full: list[Row], rollouts: list[Row], run: Run) -> Row:
    """Correlate, recommend, and write tables, CSV files, picture and fidelity.json, whose content is returned."""
    found = correlate_all(recipe, full, rollouts)
    provenance = run.provenance()
    result = {
        "recommended": found.recommended and found.recommended._asdict(),
        "age_weights": found.age_weights,
        "rows": found.rows,
        "ceilings": found.ceilings,
        "commit": provenance["environment"]["commit"],
        "versions": provenance["environment"]["versions"],
        "recipe": provenance["recipe"],
    }
    write_json(run.path / "fidelity.json", result)
    figures = list_figures(found)
    write_json(run.path / "result.json", evidence("lkd fidelity", provenance["environment"], figures))
    texts = {"losses": format_table(tabulate_losses(recipe, full)), "replicates": REPLICATES, "format_rho": format_rho}
    rows = {criterion: format_table(tabulate_rows(recipe, found, criterion)) for criterion in CRITERIA}
    write_text(run.path / "table.txt", render("fidelity.txt", recipe=recipe, found=found, rows=rows, **texts) + "\n")
    tables = {"rows": found.rows, "trainings": list_trainings(full), "rollouts": list_rollouts(rollouts)}
    for name, records in tables.items():
        write_text(run.path / f"{name}.csv", format_csv(records))
    plot_fidelity(found, run.path / "fidelity.png")
    run.tracker.log(0, **figures)
    run.tracker.show(0, "fidelity", run.path / "fidelity.png")
    return result


def list_figures(found: Fidelity) -> dict[str, float]:
    """The figures of `result.json`."""
    ceiling = found.ceilings["accuracy"]
    figures = {"ceiling": ceiling["rho"], "ceiling_low": ceiling["low"], "ceiling_high": ceiling["high"]}
    if found.recommended:
        best = found.settings[found.recommended]
        figures |= {"recommended_rollout_steps": found.recommended.rollout_steps}
        figures |= {"recommended_rho": best.rho, "recommended_rho_low": best.low, "recommended_rho_high": best.high}
    for row in found.rows_by("accuracy"):
        figures[f"rho_{row['annealing']}_{row['objective']}_k{row['rollout_steps']}_age{row['age']:g}"] = row["rho"]
    return {key: round(value, 4) for key, value in figures.items()}


def list_trainings(full: list[Row]) -> list[Row]:
    """Every full training."""
    keys = ("top1", "cross_entropy", "calibrated_cross_entropy", "temperature")
    return [
        {"loss": row["method"], "seed": row["seed"]}
        | {key: row["meta_validation"][key] for key in keys}
        | {"seconds": row["seconds"]}
        for row in full
    ]


def list_rollouts(rollouts: list[Row]) -> list[Row]:
    """Every rollout's outer values."""
    keys = ("annealing", "steps", "age", "number", "student", "progress")
    return [
        {key: row[key] for key in keys} | {"objective": objective, "loss": label, "value": value}
        for row in rollouts
        for objective, values in row["values"].items()
        for label, value in values.items()
    ]


def tabulate_losses(recipe: FidelityRecipe, full: list[Row]) -> list[list[str]]:
    """The losses, the best on top."""
    lines = []
    for label in recipe.losses:
        mine = [row["meta_validation"] for row in full if row["method"] == label]
        accuracy = mean_and_error([row["top1"] for row in mine])
        mean, error = mean_and_error([row["calibrated_cross_entropy"] for row in mine])
        lines.append((accuracy[0], [label, format_figure(accuracy), f"{mean:.4f} ± {error:.4f}"]))
    ranked = [line for _, line in sorted(lines, key=lambda entry: -entry[0])]
    return [["loss", "accuracy %", "calibrated cross-entropy"], *ranked]


def tabulate_rows(recipe: FidelityRecipe, found: Fidelity, criterion: str) -> list[list[str]]:
    """One line a setting, one column an age, and the mean over ages drawn by their weights where it is known."""
    weighted = criterion == "accuracy"
    header = ["annealing", "objective", "K", *(f"age {age:g}" for age in recipe.ages)]
    lines = {setting: [*map(str, setting)] for setting in found.settings}
    for row in found.rows_by(criterion):
        lines[Setting(*(row[key] for key in Setting._fields))].append(format_rho(row))
    for setting, line in lines.items() if weighted else ():
        line.append(format_rho(found.settings[setting]._asdict()))
    return [[*header, "ages by weight"] if weighted else header, *lines.values()]


def format_rho(row: Row) -> str:
    """ρ and its interval."""
    return f"{row['rho']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]".replace("-", "−")


def plot_fidelity(found: Fidelity, path: Path) -> None:
    """Draw ρ against age, one colour a rollout length, one panel for each annealing and objective."""
    rows = found.rows_by("accuracy")
    annealings, objectives, ages, lengths = (
        list(dict.fromkeys(row[key] for row in rows)) for key in ("annealing", "objective", "age", "rollout_steps")
    )
    figure = Figure(figsize=(1.2 + 3.9 * len(objectives), 0.9 + 2.7 * len(annealings)), layout="constrained")
    axes = figure.subplots(len(annealings), len(objectives), sharex=True, sharey=True, squeeze=False)
    for line, annealing in zip(axes, annealings, strict=True):
        for axis, objective in zip(line, objectives, strict=True):
            mine = [row for row in rows if (row["annealing"], row["objective"]) == (annealing, objective)]
            rate = "annealed (cosine)" if annealing == "cosine" else "constant"
            title = f"{rate} rate, {objective.replace('_', ' ')}"
            chosen = found.recommended is not None and found.recommended[:2] == (annealing, objective)
            if found.recommended and chosen:
                title += f"\nrecommended: K = {found.recommended.rollout_steps}"
            axis.set_title(title, fontsize=9.5, fontweight="bold" if chosen else "normal")
            draw_panel(axis, mine, ages, lengths, found.ceilings["accuracy"])
            for age, weight in found.age_weights if chosen else []:
                place = ages.index(age), -1.2
                axis.annotate(f"drawn: {100 * weight:.0f} %", place, ha="center", fontsize=8, color="0.3")
    for axis in axes[-1]:
        axis.set_xticks(range(len(ages)), [f"{age:g}" for age in ages])
        axis.set_xlabel("age of the student that the rollout starts from")
    for axis in axes[:, 0]:
        axis.set_ylabel("Spearman's ρ")
    handles, labels = axes[0][0].get_legend_handles_labels()
    title = "How alike do short rollouts and full trainings rank the losses? 1: equally, 0: not at all"
    figure.suptitle(title, fontsize=11)
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    save_figure(figure, path)


def draw_panel(axis: Axes, rows: list[Row], ages: list[float], lengths: list[int], ceiling: dict[str, float]) -> None:
    """One panel: the ceiling as a band, and each rollout length's ρ with its interval beside the others'."""
    axis.axhspan(ceiling["low"], ceiling["high"], color="0.92", lw=0)
    axis.axhline(ceiling["rho"], color="0.55", lw=1, ls="--", label="full trainings among themselves (band: 95 %)")
    axis.axhline(0, color="0.3", lw=0.8)
    colors = matplotlib.colormaps["viridis"]
    for number, steps in enumerate(lengths):
        mine = [row for row in rows if row["rollout_steps"] == steps]
        shift = 0.16 * (number - (len(lengths) - 1) / 2)
        places = [ages.index(row["age"]) + shift for row in mine]
        color = colors(0.15 + 0.65 * number / max(1, len(lengths) - 1))
        axis.vlines(places, [row["low"] for row in mine], [row["high"] for row in mine], color=color, lw=1.6)
        axis.plot(places, [row["rho"] for row in mine], "o", color=color, ms=5.5, label=f"K = {steps}")
    axis.set_ylim(-1.25, 1.08)
    axis.set_xlim(-0.5, len(ages) - 0.5)
    axis.spines[["top", "right"]].set_visible(False)
