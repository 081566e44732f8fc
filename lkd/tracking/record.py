"""The local record: one JSON line for every look at a run, readable while it is written."""

import json
import time
from pathlib import Path
from typing import Any

from lkd.files import parse_json

LOG = "log.jsonl"


class Record:
    """Append-only `log.jsonl` in the run directory.

    Args:
        path: The run directory.
    """

    def __init__(self, path: Path) -> None:
        self.file = (path / LOG).open("a", buffering=1, encoding="utf-8")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append metrics at a step."""
        self.file.write(json.dumps({"step": step, "time": round(time.time(), 3), **metrics}) + "\n")

    def finish(self) -> None:
        """Close the file."""
        self.file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read a run's record, a row a step: what was logged of it at several times is put together.

    A metric that was logged again, as after a resume, counts as it was last written.
    """
    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = parse_json(line)
        except ValueError:
            continue  # a line cut off by a crash
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.setdefault(row["step"], {}).update(row)
    return [rows[step] for step in sorted(rows)]
