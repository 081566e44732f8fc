"""The pictures of docs/evidence/learned_loss."""

from pathlib import Path
from typing import Any

import matplotlib
from figures import LEARNED, Accuracies, find_best_hand_made, gain
from settings import SETTINGS

from lkd.core.statistics import mean_and_error
from lkd.losses.learned.file import load_loss
from lkd.losses.learned.shares import balance_surface
from lkd.meta_training.log import EXTENT, save_figure

matplotlib.use("Agg")

import matplotlib.pyplot as plt

COLORS = {"CE": "tab:blue", "KD": "0.35", "DKD": "tab:green", LEARNED: "tab:red"}
MARKERS = {"CE": "s", "KD": "D", "DKD": "^", LEARNED: "o"}


def draw_settings(accuracies: dict[str, Accuracies], fixed: str, path: Path) -> None:
    """Draw every loss in every setting, in points to the setting's best hand-made loss.

    Args:
        accuracies: Setting → accuracies.
        fixed: The KD that is the same in every setting.
        path: The picture.
    """
    figure, axis = plt.subplots(figsize=(8, 0.75 * len(accuracies) + 1.2), layout="constrained")
    labels = {"CE": "cross-entropy", fixed: f"{fixed}, one for all", "KD": "KD, tuned here", "DKD": "DKD, tuned here"}
    labels[LEARNED] = "learned here, one recipe for all"
    colors, markers = COLORS | {fixed: "tab:orange"}, MARKERS | {fixed: "v"}
    for row, found in enumerate(accuracies.values()):
        best = find_best_hand_made(found)
        for number, method in enumerate(labels):
            mean, error = gain(found, method, best)
            place = row + 0.13 * (number - 2)
            label = labels[method] if row == 0 else None
            style: dict[str, Any] = {"color": colors[method], "marker": markers[method], "label": label}
            axis.errorbar(mean, place, xerr=error, ls="", ms=8 if method == LEARNED else 6, capsize=2, **style)
    axis.axvline(0, color="0.8", lw=1, zorder=0)
    axis.set_yticks(range(len(accuracies)), [SETTINGS[name].title for name in accuracies])
    axis.set_ylim(len(accuracies) - 0.5, -0.5)
    axis.set_xlabel("test accuracy, points to the best hand-made loss there")
    axis.grid(axis="x", color="0.92")
    axis.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(fontsize=8, frameon=False, loc="outside upper center", ncols=3)
    save_figure(figure, path)


def draw_gains(accuracies: dict[str, Accuracies], path: Path) -> None:
    """Draw learned − best tuned hand-made loss of every comparison, all seeds.

    Args:
        accuracies: Comparison → accuracies; those without a learned loss of that name are left out.
        path: The picture.
    """
    shown = {name: found for name, found in accuracies.items() if LEARNED in found}
    figure, axis = plt.subplots(figsize=(8, 0.36 * len(shown) + 1.2), layout="constrained")
    for row, found in enumerate(shown.values()):
        best = found[find_best_hand_made(found)]
        differences = [value - best[seed] for seed, value in found[LEARNED].items()]
        axis.plot(differences, [row] * len(differences), ".", color="0.75", ms=5)
        mean, error = mean_and_error(differences)
        axis.errorbar(mean, row, xerr=error, fmt="o", color=COLORS[LEARNED], capsize=3)
    names = [f"{name.replace('_', ' ')}  ({find_best_hand_made(found)})" for name, found in shown.items()]
    axis.axvline(0, color="0.6", lw=1, zorder=0)
    axis.set_yticks(range(len(shown)), names)
    axis.set_ylim(len(shown) - 0.5, -0.5)
    axis.set_xlabel("learned − best hand-made loss (in brackets), points; dots: seeds")
    axis.grid(axis="x", color="0.92")
    axis.spines[["top", "right", "left"]].set_visible(False)
    save_figure(figure, path)


def draw_learned(loss_file: Path, path: Path) -> None:
    """Draw weight and temperature over both confidences, at the start, in the middle and at the end of a training."""
    loss = load_loss(loss_file)
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.2), layout="constrained", sharex=True, sharey=True)
    for column, progress in zip(axes.T, (0.0, 0.5, 1.0), strict=True):
        panels = zip(column, balance_surface(loss, progress), ("weight α", "temperature τ"), strict=True)
        for axis, surface, title in panels:
            high = 1.0 if title.startswith("weight") else 6.0
            style: dict[str, Any] = {"vmin": 0.0 if high == 1 else 1.0, "vmax": high, "cmap": "viridis"}
            picture = axis.imshow(surface.numpy(), origin="lower", extent=EXTENT, aspect="auto", **style)
            axis.set_title(f"{title}, progress {progress:g}", fontsize=10)
            if progress == 1:
                figure.colorbar(picture, ax=axis)
    for axis in axes[1]:
        axis.set_xlabel("student's probability of the label")
    for axis in axes[:, 0]:
        axis.set_ylabel("teacher's probability of the label")
    save_figure(figure, path)
