"""Measurements as rows of CSV files, taken once: a row that stands there is not measured again."""

import csv
import math
import statistics
from collections.abc import Iterable
from pathlib import Path

Row = dict[str, str]


def read_rows(path: Path) -> list[Row]:
    return list(csv.DictReader(path.open())) if path.exists() else []


def matching(path: Path, **wanted: object) -> list[Row]:
    """Return the rows of a file that have these values."""
    return [row for row in read_rows(path) if all(row[column] == str(value) for column, value in wanted.items())]


def median(path: Path, column: str, **wanted: object) -> float:
    """Return the median of a column over the rows that have these values; NaN where nothing was measured."""
    return statistics.median([float(row[column]) for row in matching(path, **wanted)] or [math.nan])


def write_row(path: Path, columns: list[str], values: Iterable[object]) -> None:
    """Append a row, after the header where the file is new."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(columns)
        writer.writerow(values)
    print(path.stem, *values, flush=True)
