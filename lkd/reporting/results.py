"""The figures of runs by their logs: what was reached, and where the time went."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from lkd.reporting.curves import Curve
from lkd.reporting.runs import RunRecord
from lkd.reporting.settings import ABSENT, format_value, show_path

TRAINED = ("distill", "teacher")
PARTS = "time_share/"


def tabulate_trainings(runs: Sequence[RunRecord]) -> list[list[str]]:
    """A header and a row for each student and teacher: meta-validation at the last and at the best epoch."""
    header = ["run", "network", "loss", "top-1 last %", "top-1 best %", "calibrated CE last", "best"]
    rows = []
    for run in runs:
        top1 = run.log.curves.get("meta_validation/top1")
        calibrated = run.log.curves.get("meta_validation/calibrated_cross_entropy")
        figures = [*last_and_best(top1, max, "{:.2f}"), *last_and_best(calibrated, min, "{:.4f}")]
        loss = describe_loss(run.recipe.get("loss")) if run.command == "distill" else "cross_entropy"
        done = f"{len(top1) if top1 else 0} of {read_setting(run, 'train', 'epochs')}"
        rows.append([run.label, describe_network(run), loss, *figures, done, format_duration(run), state_of(run)])
    return [[*header, "epochs", "time", "state"], *rows]


def tabulate_learned(runs: Sequence[RunRecord]) -> list[list[str]]:
    """A header and a row for each meta-training: its loss when reused on fresh students, and how it changed."""
    header = ["run", "students", "reuse: calibrated CE first", "best", "last", "top-1 at best %", "outer value"]
    rows = []
    for run in runs:
        curves = run.log.curves
        reuse, top1 = curves.get("reuse/calibrated_cross_entropy"), curves.get("reuse/top1")
        last, best = last_and_best(reuse, min, "{:.4f}")
        at_best = ABSENT
        if reuse and top1 and finite_places(reuse):
            step = reuse.steps[min(finite_places(reuse), key=reuse.values.__getitem__)]
            at_best = f"{top1.values[top1.steps.index(step)]:.2f}" if step in top1.steps else ABSENT
        changes = [first_to_last(curves.get(name)) for name in ("outer/value", "loss/weight", "loss/temperature")]
        steps = curves.get("outer/value")
        done = f"{steps.steps[-1]:g} of {read_setting(run, 'meta', 'outer_steps')}" if steps else ABSENT
        first = f"{reuse.values[0]:.4f}" if reuse else ABSENT
        figures = [first, best, last, at_best, *changes]
        rows.append([run.label, describe_network(run), *figures, done, format_duration(run), state_of(run)])
    return [[*header, "weight α", "temperature τ", "outer steps", "time", "state"], *rows]


def read_setting(run: RunRecord, part: str, key: str) -> Any:
    """A nested setting; `ABSENT` if the recipe has none."""
    inner = run.recipe.get(part)
    return inner.get(key, ABSENT) if isinstance(inner, dict) else ABSENT


def finite_places(curve: Curve) -> list[int]:
    """Where a curve is finite."""
    return [place for place, value in enumerate(curve.values) if math.isfinite(value)]


def last_and_best(curve: Curve | None, best: Callable[..., int], form: str) -> tuple[str, str]:
    """The last value of a curve, and the first of its best with its step; `ABSENT` where there is none."""
    if curve is None:
        return ABSENT, ABSENT
    last, places = form.format(curve.values[-1]), finite_places(curve)
    if not places:
        return last, ABSENT
    place = best(places, key=curve.values.__getitem__)
    return last, f"{form.format(curve.values[place])} (step {curve.steps[place]:g})"


def first_to_last(curve: Curve | None) -> str:
    """How a curve changed."""
    return f"{curve.values[0]:.3g} → {curve.values[-1]:.3g}" if curve else ABSENT


def describe_network(run: RunRecord) -> str:
    """The network, or the networks, of a run."""
    several = [row.get("name") for row in run.recipe.get("students") or [] if isinstance(row, dict)]
    model = run.recipe.get("student") or run.recipe.get("model")
    one = model.get("name") if isinstance(model, dict) else None
    return ", ".join(map(str, several)) or str(one or ABSENT)


def describe_loss(loss: Any) -> str:
    """A loss in a few words: its name, or its file, and its options."""
    if isinstance(loss, str):
        return show_path(loss)
    if not isinstance(loss, dict):
        return ABSENT
    options = [
        f"{key}={describe_loss(value) if isinstance(value, dict) else format_value(value)}"
        for key, value in loss.items()
        if key != "name"
    ]
    return " ".join([show_path(str(loss.get("name", ABSENT))), *options])


def state_of(run: RunRecord) -> str:
    """Finished, or how far it has come; with what is wrong with its log."""
    words = ["finished"] if run.finished else ["not finished: running or cut off"]
    if not run.log.curves and run.command in (*TRAINED, "meta-train"):  # the others log at their end, if at all
        words.append("nothing logged")
    if run.log.damaged:
        words.append(f"{run.log.damaged} damaged log line{'s' * (run.log.damaged > 1)} skipped")
    return "; ".join(words)


def format_duration(run: RunRecord) -> str:
    """Time from the first to the last line of the log."""
    if run.log.times is None:
        return ABSENT
    seconds = run.log.times[1] - run.log.times[0]
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{seconds:.0f} s" if seconds < 600 else f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def time_shares(run: RunRecord) -> dict[str, float]:
    """Part of the steps' time by part; the mean over epochs, or over what was logged before the first one ended."""
    epochs = run.log.curves.get("meta_validation/top1")
    steps = set(epochs.steps) if epochs else set()
    shares = {}
    for name, curve in run.log.curves.items():
        if not name.startswith(PARTS):
            continue
        pairs = [(step, value) for step, value in zip(curve.steps, curve.values, strict=True) if math.isfinite(value)]
        chosen = [value for step, value in pairs if step in steps] or [value for _, value in pairs]
        if chosen:
            shares[name.removeprefix(PARTS)] = sum(chosen) / len(chosen)
    return shares


def images_per_second(run: RunRecord) -> str:
    """The median speed."""
    curve = run.log.curves.get("images_per_second")
    values = sorted(curve.values[place] for place in finite_places(curve)) if curve else []
    return f"{values[len(values) // 2]:,.0f}" if values else ABSENT
