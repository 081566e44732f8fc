"""From the rows of the comparisons to the figures: gains over the best hand-made loss, seed by seed."""

import csv
from pathlib import Path

from lkd.core.statistics import mean_and_error

Accuracies = dict[str, dict[int, float]]
"""Method → seed → test accuracy of the last epoch, percent."""

HAND_MADE = ("CE", "KD(0.5, 4)", "KD", "DKD", "DIST")
NOT_LEARNED = "not learned"
"""The learned loss before meta-training; as a fixed case of DKD it is no rival of its own."""
LEARNED, FORMER = "learned", "learned, K = 100"
"""By the defaults of `lkd meta-train`, about 15 trainings; by those of version 0.1, about 41: their rows were kept."""


def read_accuracies(folder: Path, student: str) -> Accuracies:
    """Read a comparison's `cells.csv`."""
    accuracies: Accuracies = {}
    with (folder / "cells.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["student"] == student:
                accuracies.setdefault(row["method"], {})[int(row["seed"])] = float(row["test_last"])
    return accuracies


def find_best_hand_made(accuracies: Accuracies) -> str:
    """The hand-made loss with the highest mean: chosen by what is reported, which favours it."""
    known = [method for method in HAND_MADE if method in accuracies]
    return max(known, key=lambda method: mean_and_error(list(accuracies[method].values()))[0])


def gain(accuracies: Accuracies, method: str, over: str | None = None) -> tuple[float, float]:
    """Paired difference of a method to another, or to the best hand-made loss: points, and their standard error."""
    other = accuracies[over or find_best_hand_made(accuracies)]
    return mean_and_error([value - other[seed] for seed, value in accuracies[method].items()])
