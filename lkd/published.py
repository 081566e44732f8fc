"""Published numbers, to stand beside ours where the protocol is the same.

`published.csv` holds numbers that two public sources give alike, for networks whose names mean one thing only. They are
test accuracies of students trained on all training images, mostly the last or the best epoch of one or a few runs.
"""

import csv
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("published.csv")


@cache
def read_published(path: Path = FILE) -> tuple[dict[str, str], ...]:
    """The rows of a file of published numbers."""
    with path.open(encoding="utf-8", newline="") as file:
        return tuple(csv.DictReader(file))


def find_published(
    data: str, teacher: str, student: str, epochs: int, loss: str, path: Path = FILE
) -> dict[str, Any] | None:
    """The published number of this protocol: `accuracy` in percent, and its `source`; None where there is none.

    Args:
        data: Name of the data set.
        teacher: The teacher's architecture.
        student: The student's architecture.
        epochs: Of the student's training.
        loss: Name in `LOSSES`.
        path: The file.
    """
    wanted = {"data": data, "teacher": teacher, "student": student, "epochs": str(epochs), "loss": loss}
    for row in read_published(path):
        if all(simplify(row[key]) == simplify(value) for key, value in wanted.items()):
            return {"accuracy": float(row["accuracy"]), "source": row["source"]}
    return None


def simplify(name: str) -> str:
    """A name without the signs that spellings differ in."""
    return name.lower().replace("-", "").replace("_", "")
