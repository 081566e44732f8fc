"""The picture of ranking fidelity."""

from pathlib import Path
from typing import Any

import matplotlib

from lkd.plots import save_figure

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes


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
