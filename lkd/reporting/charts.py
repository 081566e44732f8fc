"""The curves of runs as data for the page's charts."""

import math
from collections.abc import Sequence
from typing import Any

from lkd.reporting.curves import Curve, thin
from lkd.reporting.runs import RunRecord

STEPPED = {"distill": "step", "teacher": "step", "pool": "step", "meta-train": "outer step"}  # command → its step
FIRST = ("meta_validation", "reuse", "outer", "loss", "share", "training")  # groups, in this order
SPEED, TRAINING = "throughput", "training"
POINTS, LEAST, MOST = 100_000, 30, 1000  # of a page, and of one curve


def list_charts(groups: Sequence[Sequence[RunRecord]], places: dict[str, int]) -> list[dict[str, Any]]:
    """The charts of a page.

    Args:
        groups: Runs that share their data; one chart shows runs of one group only.
        places: Label → number of a run.

    Returns:
        For every group and kind of step a dict of `data` (the group's number), `axis`, and `charts`: rows of `group`,
        `name` and `series`, each with `run`, `steps`, `seconds` since the run's first line, `values` (None where it is
        not finite), `total` (points before thinning) and `strange` (how many were not finite).
    """
    count = sum(len(run.log.curves) for group in groups for run in group if run.command in STEPPED)
    points = min(max(POINTS // max(count, 1), LEAST), MOST)
    sections = []
    for number, group in enumerate(groups):
        for axis in dict.fromkeys(STEPPED.values()):
            runs = [run for run in group if STEPPED.get(run.command) == axis]
            names = dict.fromkeys(name for run in runs for name in run.log.curves)
            charts = [
                {
                    "group": group_of(name),
                    "name": name,
                    "series": [
                        {"run": places[run.label], **describe_curve(run, run.log.curves[name], points)}
                        for run in runs
                        if name in run.log.curves
                    ],
                }
                for name in sorted(names, key=rank)
            ]
            if charts:
                sections.append({"data": number, "axis": axis, "charts": charts})
    return sections


def group_of(name: str) -> str:
    """The group of charts that a metric belongs to: its prefix."""
    if name == "images_per_second" or name.startswith("time_share/"):
        return SPEED
    return name.partition("/")[0] if "/" in name else TRAINING


def rank(name: str) -> tuple[int, str]:
    """The known groups in their order, then the others, speed last; within a group as they were logged."""
    group = group_of(name)
    return (FIRST.index(group) if group in FIRST else len(FIRST) + (group == SPEED), group)


def describe_curve(run: RunRecord, curve: Curve, points: int) -> dict[str, Any]:
    """A curve, thinned, with six digits."""
    start = run.log.times[0] if run.log.times else 0.0
    thinned = thin(curve, points)
    return {
        "steps": [int(step) if step.is_integer() else step for step in thinned.steps],
        "seconds": [round(time - start, 1) if math.isfinite(time) else None for time in thinned.times],
        "values": [float(f"{value:.6g}") if math.isfinite(value) else None for value in thinned.values],
        "total": len(curve),
        "strange": sum(not math.isfinite(value) for value in curve.values),
    }
