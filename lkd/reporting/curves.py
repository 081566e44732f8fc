"""A run's log as curves, whatever state the file is in."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Curve:
    """One metric over a run.

    Attributes:
        steps: In increasing order.
        times: Seconds since the epoch of each, NaN where the log does not say.
        values: As they were logged: they may be NaN or infinite.
    """

    steps: list[float]
    times: list[float]
    values: list[float]

    def __len__(self) -> int:
        return len(self.steps)


@dataclass
class Log:
    """What a run logged.

    Attributes:
        curves: Metric → curve, in the order of their first appearance.
        damaged: Lines that could not be read.
        times: Of the first and the last line, in seconds since the epoch; None if no line has one.
    """

    curves: dict[str, Curve] = field(default_factory=dict)
    damaged: int = 0
    times: tuple[float, float] | None = None


def read_curves(path: Path) -> Log:
    """Read `log.jsonl`.

    Lines of the same step add up; a metric that was logged again at a step, after a resume, counts as it was last
    written. Damaged lines are counted and skipped; a file that is not there is an empty log.
    """
    points: dict[str, dict[float, tuple[float, float]]] = {}
    damaged, times = 0, []
    try:
        file = path.open(encoding="utf-8", errors="replace")
    except OSError:
        return Log()
    with file:
        for line in file:
            row = parse_line(line)
            if row is None:
                damaged += 1
                continue
            step, time = row.pop("step"), row.pop("time", math.nan)
            times += [time] if math.isfinite(time) else []
            for name, value in row.items():
                points.setdefault(name, {})[step] = (time, value)
    curves = {}
    for name, found in points.items():
        steps = sorted(found)
        curves[name] = Curve(steps, [found[step][0] for step in steps], [found[step][1] for step in steps])
    return Log(curves, damaged, (min(times), max(times)) if times else None)


def parse_line(line: str) -> dict[str, float] | None:
    """The numbers of one line by name, `step` among them; None if it is no row of a log."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    numbers = {name: number for name, value in row.items() if (number := read_number(value)) is not None}
    return numbers if math.isfinite(numbers.get("step", math.nan)) else None


def read_number(value: Any) -> float | None:
    """A number as a float, infinite if it is too large for one; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def thin(curve: Curve, points: int) -> Curve:
    """At most about so many points: of equal stretches the least and the largest value and one that is not finite.

    Args:
        curve: The curve.
        points: How many to keep; ends are kept too, so that it may be a few more.
    """
    if len(curve) <= points:
        return curve
    kept = {0, len(curve) - 1}
    stretches = max(points // 3, 1)
    for number in range(stretches):
        places = range(len(curve) * number // stretches, len(curve) * (number + 1) // stretches)
        finite = [place for place in places if math.isfinite(curve.values[place])]
        kept |= {extreme(finite, key=curve.values.__getitem__) for extreme in (min, max) if finite}
        if len(finite) < len(places):
            kept.add(next(place for place in places if not math.isfinite(curve.values[place])))
    order = sorted(kept)
    return Curve(*([column[place] for place in order] for column in (curve.steps, curve.times, curve.values)))
