"""Statistics and pictures of a comparison."""

import csv
import io
import math
from pathlib import Path
from typing import Any

from lkd.files import replaced_atomically, write_text

Row = dict[str, Any]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error (NaN for a single value)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def summarize(rows: list[Row], baseline: str) -> list[Row]:
    """Average over seeds.

    Args:
        rows: Results of reported cells.
        baseline: The method that differences are taken to, seed by seed.

    Returns:
        One row for each method and student: `last`, `best` and `difference` (last, to the baseline), each (mean,
        standard error) in percent or points of test accuracy; `seeds`; `seconds` (mean, of one training); `loss`.
    """
    groups: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        groups.setdefault((row["student"], row["method"]), {})[row["seed"]] = row
    table = []
    for (student, method), seeds in groups.items():
        base = groups[student, baseline]
        differences = [row["last"]["top1"] - base[seed]["last"]["top1"] for seed, row in seeds.items()]
        table.append(
            {
                "student": student,
                "method": method,
                "loss": next(iter(seeds.values()))["loss"],
                "seeds": len(seeds),
                "last": mean_and_error([row["last"]["top1"] for row in seeds.values()]),
                "best": mean_and_error([row["best"]["top1"] for row in seeds.values()]),
                "difference": (0.0, 0.0) if method == baseline else mean_and_error(differences),
                "seconds": mean_and_error([row["seconds"] for row in seeds.values()])[0],
            }
        )
    return table


def format_table(table: list[Row], baseline: str) -> str:
    """The table as text: test accuracy, mean ± standard error over paired seeds."""
    header = ["student", "method", "last epoch %", "best epoch %", f"last − {baseline}", "seeds", "s/training"]
    lines = [header]
    for row in table:
        lines.append(
            [
                row["student"],
                row["method"],
                format_figure(row["last"]),
                format_figure(row["best"]),
                "" if row["method"] == baseline else format_figure(row["difference"], True),
                str(row["seeds"]),
                f"{row['seconds']:.0f}",
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def format_figure(figure: tuple[float, float], signed: bool = False) -> str:
    """Mean ± standard error; no ± where there is one seed only."""
    mean, error = figure
    text = f"{mean:+.2f}" if signed else f"{mean:.2f}"
    return text if math.isnan(error) else f"{text} ± {error:.2f}"


def write_csv(rows: list[Row], path: Path) -> None:
    """Write every seed's figures."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["method", "student", "seed", "loss", "test_last", "test_best", "meta_validation_last", "best_step", "seconds"]
    )
    for row in rows:
        writer.writerow(
            [
                row["method"],
                row["student"],
                row["seed"],
                row["loss"],
                f"{row['last']['top1']:.4f}",
                f"{row['best']['top1']:.4f}",
                f"{row['meta_validation']['top1']:.4f}",
                row["best_step"],
                f"{row['seconds']:.1f}",
            ]
        )
    write_text(path, buffer.getvalue())


def plot_table(table: list[Row], path: Path) -> None:
    """Draw each student's methods as points with error bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    students = list(dict.fromkeys(row["student"] for row in table))
    figure, axes = plt.subplots(1, len(students), figsize=(4 * len(students), 3), squeeze=False, layout="constrained")
    for axis, student in zip(axes[0], students, strict=True):
        rows = [row for row in table if row["student"] == student]
        for position, row in enumerate(rows):
            mean, error = row["last"]
            axis.errorbar(position, mean, 0 if math.isnan(error) else error, fmt="o", capsize=4)
        axis.set_xticks(range(len(rows)), [row["method"] for row in rows])
        axis.set_title(student)
        axis.set_ylabel("test accuracy, %")
        axis.margins(x=0.2)
    with replaced_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)
