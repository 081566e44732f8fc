"""From full trainings and rollouts to correlations, a recommendation, a table and a picture."""

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from lkd.config.evaluation import FidelityRecipe
from lkd.core.files import write_json, write_text
from lkd.core.random import seeded_generator
from lkd.core.statistics import (
    REPLICATES,
    bootstrap_correlation,
    correlate,
    mean_and_error,
    noise_ceiling,
    percentile_interval,
)
from lkd.evaluation.comparison.tables import format_csv, format_figure, format_table
from lkd.meta_training.log import save_figure
from lkd.meta_training.rollouts import OBJECTIVES
from lkd.tracking.run import Run, evidence

# ----------------------------------------------------------------------------------------------------------------------
# The picture of ranking fidelity.

matplotlib.use("Agg")


def plot_fidelity(
    rows: list[dict[str, Any]],
    ceiling: dict[str, float],
    recommended: dict[str, Any] | None,
    age_weights: list[list[float]],
    path: Path,
) -> None:
    """Draw ρ against age, one colour a rollout length, one panel for each annealing and objective.

    Args:
        rows: `annealing`, `objective`, `rollout_steps`, `age`, `rho`, `low`, `high`.
        ceiling: `rho`, `low`, `high` of the noise ceiling.
        recommended: The recommended `annealing`, `objective` and `rollout_steps`; its panel is marked.
        age_weights: [age, weight] pairs of the recommended setting, written into its panel.
        path: The picture, PNG.
    """
    annealings, objectives, ages, lengths = (
        list(dict.fromkeys(row[key] for row in rows)) for key in ("annealing", "objective", "age", "rollout_steps")
    )
    figure, axes = plt.subplots(
        len(annealings),
        len(objectives),
        figsize=(1.2 + 3.9 * len(objectives), 0.9 + 2.7 * len(annealings)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for line, annealing in zip(axes, annealings, strict=True):
        for axis, objective in zip(line, objectives, strict=True):
            panel = {"annealing": annealing, "objective": objective}
            mine = [row for row in rows if panel.items() <= row.items()]
            title = (
                f"{'annealed (cosine)' if annealing == 'cosine' else 'constant'} rate, {objective.replace('_', ' ')}"
            )
            chosen = recommended is not None and panel.items() <= recommended.items()
            if recommended is not None and chosen:
                title += f"\nrecommended: K = {recommended['rollout_steps']}"
            axis.set_title(title, fontsize=9.5, fontweight="bold" if chosen else "normal")
            draw_panel(axis, mine, ages, lengths, ceiling)
            for age, weight in age_weights if chosen else []:
                axis.annotate(
                    f"drawn: {100 * weight:.0f} %", (ages.index(age), -1.2), ha="center", fontsize=8, color="0.3"
                )
    for axis in axes[-1]:
        axis.set_xticks(range(len(ages)), [f"{age:g}" for age in ages])
        axis.set_xlabel("age of the student that the rollout starts from")
    for axis in axes[:, 0]:
        axis.set_ylabel("Spearman's ρ")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.suptitle(
        "How alike do short rollouts and full trainings rank the losses? 1: equally, 0: not at all", fontsize=11
    )
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    save_figure(figure, path)


def draw_panel(
    axis: Axes, rows: list[dict[str, Any]], ages: list[float], lengths: list[int], ceiling: dict[str, float]
) -> None:
    """One panel: the ceiling as a band, and each rollout length's ρ with its interval beside the others'."""
    axis.axhspan(ceiling["low"], ceiling["high"], color="0.92", lw=0)
    axis.axhline(ceiling["rho"], color="0.55", lw=1, ls="--", label="full trainings among themselves (band: 95 %)")
    axis.axhline(0, color="0.3", lw=0.8)
    colors = plt.get_cmap("viridis")
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


# ----------------------------------------------------------------------------------------------------------------------
# Which rollouts to meta-train with, from how well each setting ranked the losses.

Setting = tuple[str, str, int]
"""Annealing, objective, K."""


class SettingFidelity(NamedTuple):
    """How well the rollouts of one setting rank losses, over the ages as they would be drawn.

    Attributes:
        ages: The ages.
        weights: With which each age would be drawn; they sum to 1, or are all 0 if no age ranks at all.
        mean: The plain mean of ρ over the ages.
        rho: The weighted mean of ρ over the ages.
        low: Lower end of its interval.
        high: Upper end.
    """

    ages: list[float]
    weights: list[float]
    mean: float
    rho: float
    low: float
    high: float


def weigh_ages(rhos: list[float]) -> list[float]:
    """Weights proportional to max(0, ρ)², which sum to 1; all 0 if no ρ is positive."""
    squares = [max(0.0, rho) ** 2 for rho in rhos]
    total = sum(squares)
    return [square / total if total else 0.0 for square in squares]


def average_ages(ages: list[float], rhos: list[float], draws: list[Tensor]) -> SettingFidelity:
    """The fidelity of a setting, ages drawn by their own weights.

    Args:
        ages: The ages.
        rhos: ρ of each age.
        draws: Bootstrap draws of each age's ρ, [replicates] each, made with the same resampled trainings. The weights
            are not drawn anew.
    """
    weights = weigh_ages(rhos)
    low, high = percentile_interval(torch.stack([w * draw for w, draw in zip(weights, draws, strict=True)]).sum(0))
    weighted = sum(w * rho for w, rho in zip(weights, rhos, strict=True))
    return SettingFidelity(ages, weights, sum(rhos) / len(rhos), weighted, low, high)


def recommend(settings: dict[Setting, SettingFidelity], tolerance: float) -> dict[str, Any] | None:
    """Choose annealing, objective and K.

    The annealing and the objective: those with the highest ρ in the plain mean over ages and K (a mean weighted by ρ
    itself would favour noise). Then K: the smallest whose weighted ρ has a lower end of its interval that is at most
    `tolerance` under the best K's.

    Args:
        settings: The fidelity of each setting.
        tolerance: Differences in ρ that mean nothing, as `tolerance_of` has them.

    Returns:
        `annealing`, `objective` and `rollout_steps`; None if these do not rank the losses as full trainings do at all
        (no ρ is positive, at any age and K).
    """
    means: dict[tuple[str, str], list[float]] = {}
    for (annealing, objective, _), found in settings.items():
        means.setdefault((annealing, objective), []).append(found.mean)
    annealing, objective = max(means, key=lambda pair: sum(means[pair]) / len(means[pair]))
    lows = {
        steps: found.low
        for (*pair, steps), found in settings.items()
        if pair == [annealing, objective] and found.rho > 0
    }
    if not lows:
        return None
    steps = min(steps for steps, low in lows.items() if low >= max(lows.values()) - tolerance)
    return {"rollout_steps": steps, "objective": objective, "annealing": annealing}


def tolerance_of(ceiling: dict[str, float]) -> float:
    """How far full trainings fall short of their own ranking by chance: the noise ceiling above its lower end."""
    return max(0.0, ceiling["rho"] - ceiling["low"])


def weights_of(settings: dict[Setting, SettingFidelity], recommended: dict[str, Any] | None) -> list[list[float]]:
    """[age, weight] pairs of the recommended setting; none where nothing is recommended."""
    if recommended is None:
        return []
    found = settings[setting_of(recommended)]
    return [[age, round(weight, 4)] for age, weight in zip(found.ages, found.weights, strict=True)]


def setting_of(row: dict[str, Any]) -> Setting:
    """The setting of a row or of a recommendation."""
    return row["annealing"], row["objective"], row["rollout_steps"]


# ----------------------------------------------------------------------------------------------------------------------
# The table of ranking fidelity, with its recommendation in words.

TableRow = dict[str, Any]


def write_table(
    recipe: FidelityRecipe,
    full: list[TableRow],
    rows: list[TableRow],
    settings: dict[Setting, SettingFidelity],
    ceilings: dict[str, dict[str, float]],
    recommended: dict[str, Any] | None,
) -> str:
    """Everything as text."""
    parts = [
        f"Full trainings on meta-validation, mean ± standard error over {recipe.full_seeds} seeds",
        format_table(tabulate_losses(recipe, full)),
    ]
    for criterion, ceiling in ceilings.items():
        name = criterion.replace("_", " ")
        mine = [row for row in rows if row["criterion"] == criterion]
        parts += [
            f"Spearman's ρ of rollouts with the {name} of full trainings, 95 % interval",
            format_table(tabulate_rows(recipe, mine, settings if criterion == "accuracy" else None)),
            f"Noise ceiling (two halves of the full trainings, by {name}): {format_rho(ceiling)}\n",
        ]
    return "\n".join([*parts, *write_notes(recipe, settings, ceilings["accuracy"], recommended), ""])


def tabulate_losses(recipe: FidelityRecipe, full: list[TableRow]) -> list[list[str]]:
    """The losses, the best on top."""
    lines = []
    for label in recipe.losses:
        mine = [row["meta_validation"] for row in full if row["method"] == label]
        accuracy = mean_and_error([row["top1"] for row in mine])
        mean, error = mean_and_error([row["calibrated_cross_entropy"] for row in mine])
        lines.append((accuracy[0], [label, format_figure(accuracy), f"{mean:.4f} ± {error:.4f}"]))
    ranked = [line for _, line in sorted(lines, key=lambda entry: -entry[0])]
    return [["loss", "accuracy %", "calibrated cross-entropy"], *ranked]


def tabulate_rows(
    recipe: FidelityRecipe, rows: list[TableRow], settings: dict[Setting, SettingFidelity] | None
) -> list[list[str]]:
    """One line a setting, one column an age, and the mean over ages drawn by their weights where it is known."""
    header = ["annealing", "objective", "K", *(f"age {age:g}" for age in recipe.ages)]
    lines = [[*header, "ages by weight"] if settings else header]
    groups: dict[Setting, list[TableRow]] = {}
    for row in rows:
        groups.setdefault(setting_of(row), []).append(row)
    for setting, mine in groups.items():
        line = [*map(str, setting), *map(format_rho, mine)]
        lines.append([*line, format_rho(settings[setting]._asdict())] if settings else line)
    return lines


def format_rho(row: dict[str, Any]) -> str:
    """ρ and its interval."""
    return f"{row['rho']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]".replace("-", "−")


def write_notes(
    recipe: FidelityRecipe,
    settings: dict[Setting, SettingFidelity],
    ceiling: dict[str, float],
    recommended: dict[str, Any] | None,
) -> list[str]:
    """The recommendation, and what a reader of the table must know."""
    notes = [
        f"Intervals: percentile bootstrap over rollout draws and seeds ({REPLICATES} replicates): what other draws and "
        "seeds would change, not what other losses would. Resampling adds noise, so an interval may lie low.",
        "Ages by weight: mean over ages with weights proportional to max(0, ρ)².",
        "Rule: the annealing and objective with the highest ρ (plain mean over ages and K); of these the smallest K "
        "whose ρ (ages by weight) has a lower end that is at most the ceiling's distance to its own lower end "
        f"({tolerance_of(ceiling):.2f}) under the best K's.",
    ]
    if recommended is None:
        return [
            "Recommended: nothing. No rollout ranks these losses as full trainings do: try longer rollouts, younger "
            "students, or losses further apart.",
            *notes,
        ]
    found = settings[setting_of(recommended)]
    weights = ", ".join(f"{age:g}: {weight:.2f}" for age, weight in weights_of(settings, recommended))
    annealing, objective, steps = setting_of(recommended)
    lines = [
        f"Recommended: --meta.rollout_steps {steps} --meta.annealing {annealing} --meta.objective {objective} "
        f"--meta.rollout_epochs {recipe.rollout_epochs}",
        f"Weights for drawing ages (age: weight): {weights}; expected ρ {format_rho(found._asdict())}",
    ]
    if found.low <= 0:
        lines.append(
            "Doubtful: the interval of this ρ reaches 0, so that these rollouts may not rank losses at all; take more "
            "rollouts and full_seeds, or longer rollouts."
        )
    return [*lines, *notes]


# ----------------------------------------------------------------------------------------------------------------------
# From full trainings and rollouts to correlations, a recommendation, and the files that hold them.

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
        for objective in recipe.objectives or list(OBJECTIVES):
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
        for objective in recipe.objectives or list(OBJECTIVES)
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
