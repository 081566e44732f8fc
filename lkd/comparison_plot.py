"""The picture of a comparison."""

import math
from pathlib import Path
from typing import Any

import matplotlib

from lkd.files import replaced_atomically

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes


def plot_table(table: list[dict[str, Any]], baseline: str, path: Path) -> None:
    """Draw, for each student, test accuracy and the paired difference to the baseline, one line for each method.

    Args:
        table: Rows of `summarize`.
        baseline: Label of the method that differences are taken to.
        path: The picture, PNG.
    """
    students = list(dict.fromkeys(row["student"] for row in table))
    methods = list(dict.fromkeys(row["method"] for row in table))
    figure, axes = plt.subplots(
        len(students),
        2,
        figsize=(9, (1.1 + 0.32 * len(methods)) * len(students)),
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for (left, right), student in zip(axes, students, strict=True):
        rows = [row for row in table if row["student"] == student]
        draw_accuracies(left, rows, baseline)
        draw_differences(right, [row for row in rows if row["method"] != baseline], methods, baseline)
        left.set_yticks(range(len(methods)), methods)
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
    with replaced_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)


def draw_accuracies(axis: Axes, rows: list[dict[str, Any]], baseline: str) -> None:
    """Points with standard errors; a line through the baseline's."""
    for position, row in enumerate(rows):
        mean, error = row["last"]
        color = "0.35" if row["method"] == baseline else "tab:blue"
        axis.errorbar(mean, position, xerr=0 if math.isnan(error) else error, fmt="o", color=color, capsize=3)
        if row["method"] == baseline:
            axis.axvline(mean, color="0.6", lw=0.8, ls=":")


def draw_differences(axis: Axes, rows: list[dict[str, Any]], methods: list[str], baseline: str) -> None:
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
