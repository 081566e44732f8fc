"""The table of ranking fidelity, with its recommendation in words."""

from typing import Any

from lkd.comparison_table import format_figure, format_table
from lkd.config import FidelityRecipe
from lkd.fidelity_recommendation import Setting, SettingFidelity, setting_of, tolerance_of, weights_of
from lkd.intervals import mean_and_error
from lkd.rank_correlation import REPLICATES

Row = dict[str, Any]


def write_table(
    recipe: FidelityRecipe,
    full: list[Row],
    rows: list[Row],
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


def tabulate_rows(
    recipe: FidelityRecipe, rows: list[Row], settings: dict[Setting, SettingFidelity] | None
) -> list[list[str]]:
    """One line a setting, one column an age, and the mean over ages drawn by their weights where it is known."""
    header = ["annealing", "objective", "K", *(f"age {age:g}" for age in recipe.ages)]
    lines = [[*header, "ages by weight"] if settings else header]
    groups: dict[Setting, list[Row]] = {}
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
