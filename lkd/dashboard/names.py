"""Do panels name what runs log?"""

import re
from collections.abc import Iterable
from pathlib import Path

from lkd.dashboard.sections import Chart, Panel, Section
from lkd.errors import UserError
from lkd.tracking import read_log


def read_names(run: Path) -> set[str]:
    """Names of the metrics that a run has logged, and of the pictures that W&B has kept of it.

    Args:
        run: A run directory.

    Raises:
        UserError: If it holds no log.
    """
    log = run / "log.jsonl"
    if not log.exists():
        raise UserError(f"runs: {run} holds no log.jsonl; give run directories, such as runs/student")
    pictures = run.glob("wandb/*run-*/files/media/images/*_*_*.*")  # NAME_STEP_HASH.png
    logged = {name for row in read_log(log) for name in row}
    return (logged - {"step", "time"}) | {path.name.rsplit("_", 2)[0] for path in pictures}


def find_empty(panel: Panel, names: Iterable[str]) -> list[str]:
    """Which of a panel's metrics, or its pattern, are none of these names."""
    known = set(names)
    missing = [metric for metric in panel.metrics if metric not in known]
    if isinstance(panel, Chart) and panel.pattern and not any(re.fullmatch(panel.pattern, name) for name in known):
        missing.append(panel.pattern)
    return missing


def list_empty(sections: Iterable[Section], names: Iterable[str]) -> list[str]:
    """A line for every panel that would lack something: section, title, what it lacks."""
    known = set(names)
    return [
        f"{section.title}: {panel.title}: {', '.join(missing)}"
        for section in sections
        for panel in section.panels
        if (missing := find_empty(panel, known))
    ]
