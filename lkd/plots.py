"""Pictures of meta-training and of what a loss learned."""

from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import nn

from lkd.files import replaced_atomically
from lkd.losses import LearnedLoss
from lkd.surfaces import balance_surface, gradient_surface

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

EXTENT = (0.0, 1.0, 0.0, 1.0)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG and close it."""
    with replaced_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    plt.close(figure)


def plot_meta_training(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw meta-validation value, hypergradient norm, balance and temperature over the outer steps.

    Args:
        curves: Setting → rows of the meta-training log.
        path: The picture.
    """
    panels = {
        "outer/value": "meta-validation loss after the rollout",
        "outer/hypergradient_norm": "hypergradient norm",
        "loss/weight": "mean weight of the teacher, α",
        "loss/temperature": "mean temperature, τ",
    }
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.2), layout="constrained")
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for setting, rows in curves.items():
            (line,) = axis.plot([row["step"] for row in rows], [row[key] for row in rows], lw=0.8, alpha=0.4)
            values = torch.tensor([row[key] for row in rows], dtype=torch.float64)
            smooth = [values[max(0, i - 4) : i + 1].mean().item() for i in range(len(values))]
            axis.plot([row["step"] for row in rows], smooth, lw=1.8, color=line.get_color(), label=setting)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("outer step")
    axes[1].set_yscale("log")
    axes[0].legend(frameon=False, fontsize=9)
    save_figure(figure, path)


def plot_learned_loss(loss: LearnedLoss, kd: nn.Module, kd_label: str, path: Path, progress: float = 0.5) -> None:
    """Draw the learned loss's gradient at the student's target logit beside KD's, and its weight and temperature."""
    weight, temperature = balance_surface(loss, progress)
    learned, hand_made = gradient_surface(loss, progress), gradient_surface(kd, progress)
    bound = max(float(learned.abs().max()), float(hand_made.abs().max()))
    panels: list[tuple[str, torch.Tensor, dict[str, Any]]] = [
        ("learned: gradient at the target logit", learned, {"cmap": "RdBu_r", "vmin": -bound, "vmax": bound}),
        (f"{kd_label}: gradient at the target logit", hand_made, {"cmap": "RdBu_r", "vmin": -bound, "vmax": bound}),
        ("learned: weight of the teacher, α", weight, {"cmap": "viridis", "vmin": 0, "vmax": 1}),
        ("learned: temperature, τ", temperature, {"cmap": "viridis", "vmin": 1}),
    ]
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.4), layout="constrained")
    for axis, (title, surface, style) in zip(axes, panels, strict=True):
        picture = axis.imshow(surface.numpy(), origin="lower", extent=EXTENT, aspect="auto", **style)
        figure.colorbar(picture, ax=axis)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("student's probability of the label")
    axes[0].set_ylabel("teacher's probability of the label")
    save_figure(figure, path)


def plot_settings(
    grid: dict[str, dict[str, float]],
    bold: dict[str, dict[str, float]],
    tables: dict[str, list[dict[str, Any]]],
    path: Path,
) -> None:
    """Draw the one picture of the quickstart.

    Args:
        grid: Fixed loss → setting → meta-validation accuracy, %.
        bold: Method → the same, for the methods to stress.
        tables: Setting → rows of its comparison table.
        path: The picture.
    """
    settings = list(tables)
    names = [setting.replace("_", " ") for setting in settings]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained", width_ratios=[1, 1.25])
    for number, values in enumerate(grid.values()):
        label = f"KD, each of {len(grid)} fixed (weight, temperature)" if number == 0 else None
        left.plot(names, [values[s] for s in settings], color="0.7", lw=1, marker=".", label=label)
    for (method, values), color in zip(bold.items(), ("tab:blue", "tab:red"), strict=False):
        left.plot(names, [values[s] for s in settings], lw=2.2, marker="o", color=color, label=method)
    left.set_ylabel("meta-validation accuracy, %")
    left.set_title("one line for each fixed choice, first seed", fontsize=10)
    left.legend(fontsize=8, frameon=False, loc="lower left")
    methods = list(dict.fromkeys(row["method"] for row in tables[settings[0]]))
    students = list(dict.fromkeys(row["student"] for row in tables[settings[0]]))
    colors = dict(zip(methods, ("tab:blue", "0.45", "tab:red", "tab:green"), strict=False))
    ticks: dict[float, str] = {}
    for place, (setting, student) in enumerate((s, n) for s in settings for n in students):
        for offset, method in enumerate(methods):
            (row,) = (r for r in tables[setting] if r["student"] == student and r["method"] == method)
            mean, error = row["last"]
            right.errorbar(
                place + 0.2 * (offset - (len(methods) - 1) / 2),
                mean,
                0 if error != error else error,
                fmt="o",
                capsize=3,
                color=colors[method],
                label=method if place == 0 else None,
            )
        ticks[place] = f"{setting.replace('_', ' ')}\n{student}"
    right.set_xticks(list(ticks), list(ticks.values()), fontsize=7)
    right.set_ylabel("test accuracy, %")
    right.set_title("fresh students, mean ± standard error over paired seeds", fontsize=10)
    right.legend(fontsize=8, frameon=False)
    save_figure(figure, path)
