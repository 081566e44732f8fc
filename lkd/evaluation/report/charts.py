"""The curves and losses of runs as data for the page to draw."""

import json
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lkd.core.errors import UserError
from lkd.evaluation.report.runs import (
    RESULTS,
    Curve,
    RunRecord,
    describe_loss,
    find_near,
    read_dict,
    read_header,
    read_part,
    select_finite,
    simplify,
    thin,
)
from lkd.influence.influence import INFLUENCE_WEIGHTED
from lkd.losses.build import build_loss, is_learned, reads_features
from lkd.losses.learned.file import NOT_LEARNED, load_loss, was_learned
from lkd.losses.learned.loss import LearnedLoss, ReplayedLoss
from lkd.losses.learned.shares import balance_surface, gradient_surface
from lkd.losses.learned.trust import Trust, TrustFigures
from lkd.losses.loss import DistillationLoss

STEPPED = {"distill": "step", "teacher": "step", "pool": "step", "meta-train": "outer step"}  # command → its step
FIRST = ("meta_validation", "reuse", "outer", "loss", "share", "training")  # groups, in this order
WORLD = re.compile(r"(reuse/)?world/([\w-]+)/(\w+)")  # what is logged of one world
POINTS, LEAST, MOST = 100_000, 30, 1000  # of a page, and of one curve


def list_charts(groups: Sequence[Sequence[RunRecord]], places: dict[str, int]) -> list[dict[str, Any]]:
    """The charts of a page, by group of runs that share their data, and by kind of step; `places` numbers the runs."""
    count = sum(len(run.log.curves) for group in groups for run in group if run.command in STEPPED)
    points = min(max(POINTS // max(count, 1), LEAST), MOST)
    sections = []
    for number, group in enumerate(groups):
        for axis in dict.fromkeys(STEPPED.values()):
            runs = [run for run in group if STEPPED.get(run.command) == axis]
            every = dict.fromkeys(name for run in runs for name in run.log.curves)
            names = sorted((name for name in every if not WORLD.fullmatch(name)), key=rank)
            series = {
                name: [
                    {"run": places[run.label], **describe_curve(run.log.curves[name], run.log.start, points)}
                    for run in runs
                    if name in run.log.curves
                ]
                for name in names
            }
            charts = [{"group": group_of(name), "name": name, "series": series[name]} for name in names]
            charts += [chart for run in runs for chart in list_world_charts(run, places[run.label], points)]
            sections += [{"data": number, "axis": axis, "charts": charts}] if charts else []
    return sections


def list_world_charts(run: RunRecord, place: int, points: int) -> list[dict[str, Any]]:
    """Of each metric that a meta-training logs by world one chart, with a line for each world, the same in all."""
    found: dict[str, list[dict[str, Any]]] = {}
    lines: dict[str, int] = {}
    for name, curve in run.log.curves.items():
        if match := WORLD.fullmatch(name):
            looks, world, metric = match.groups("")
            line = lines.setdefault(world, len(lines))
            series = {"run": place, "world": world, "line": line, **describe_curve(curve, run.log.start, points)}
            found.setdefault(f"{looks}{metric}", []).append(series)
    return [{"group": "worlds", "name": f"{run.label}: {metric}", "series": each} for metric, each in found.items()]


def group_of(name: str) -> str:
    """The group of charts that a metric belongs to: its prefix."""
    if name == "images_per_second" or name.startswith("time_share/"):
        return "throughput"
    return name.partition("/")[0] if "/" in name else "training"


def rank(name: str) -> tuple[int, str]:
    """The known groups in their order, then the others, speed last; within a group as they were logged."""
    group = group_of(name)
    return (FIRST.index(group) if group in FIRST else len(FIRST) + (group == "throughput"), group)


def describe_curve(curve: Curve, start: float, points: int) -> dict[str, Any]:
    """A curve, thinned, with six digits."""
    thinned = thin(curve, points)
    return {
        "steps": [point.step for point in thinned],
        "seconds": [round(point.time - start, 1) if math.isfinite(point.time) else None for point in thinned],
        "values": round_finite([point.value for point in thinned], 6),
        "total": len(curve),
        "strange": len(curve) - len(select_finite(curve)),
    }


def round_finite(values: Sequence[float], digits: int) -> list[float | None]:
    """Numbers to so many digits; None for what JSON has no word for."""
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values]


# ----------------------------------------------------------------------------------------------------------------------
# What the losses of runs do to a student.

SURFACE_POINTS = 21
STRIDE = 5  # of a coarser grid among these points
PROGRESS = (0.0, 0.25, 0.5, 0.75, 1.0)
REFERENCE = {"name": "kd", "weight": 0.5, "temperature": 4.0}
BALANCE = ("weight of the teacher, α", "temperature, τ")
MOST_SURFACES = 16  # losses on a page
LEFT_OUT = "left out: the page draws enough losses"
OF_TRAINING = ("train", "balance")  # of a comparison's method: no part of its loss


def draw_losses(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """The losses that runs name or learned, each once, and a hand-made one to compare them with; see `draw_loss`."""
    records: dict[str, dict[str, Any]] = {}
    for run in sorted(runs, key=lambda run: run.command != "meta-train"):  # whose names say where a loss is from
        trust = find_trust(run)
        for name, specification in list_losses(run):
            learned = specification.get("name") if isinstance(specification, dict) else specification
            key = identify(specification, run.path) + (str(trust or "") if is_learned(str(learned)) else "")
            if key not in records and len(records) < MOST_SURFACES:
                records[key] = draw_loss(name, specification, run.path, trust)
            elif key not in records:
                records[key] = {"name": name, "runs": [], "panels": {}, "trust": "", "note": LEFT_OUT}
            if run.label not in records[key]["runs"]:
                records[key]["runs"].append(run.label)
    if any(len(record["panels"]) > 1 for record in records.values()) and identify(REFERENCE) not in records:
        records["reference"] = draw_loss(f"{describe_loss(REFERENCE)}, to compare", REFERENCE, Path.cwd())
    return list(records.values())


def identify(specification: Any, folder: Path = Path()) -> str:
    """What two losses share if they are the same: their file and their options."""
    options = specification if isinstance(specification, dict) else {"name": specification}
    options = {key: value for key, value in options.items() if key not in OF_TRAINING}
    path = find_near(options["name"], folder) if isinstance(options.get("name"), str) else None
    file = {"name": str(path)} if path and path.is_file() else {}  # in full: many are called alike
    return json.dumps(simplify(options) | file, sort_keys=True)


def list_losses(run: RunRecord) -> list[tuple[str, Any]]:
    """Name and specification of the losses of a run; of methods that a comparison tunes, those that it picked."""
    if run.command == "meta-train":
        path = run.path / RESULTS[run.command]
        name = f"learned by {run.label}" if was_learned(read_header(path)) else f"kept by {run.label} ({NOT_LEARNED})"
        return [(name, str(path))] if path.is_file() else []
    losses = [run.recipe.get("loss")] if run.command == "distill" else []
    if run.command == "compare" and isinstance(run.recipe.get("methods"), dict):
        chosen = run.recipe["methods"] | read_dict(run.path / "picks.json")
        losses = [method for method in chosen.values() if not (isinstance(method, dict) and "grid" in method)]
    return [(describe_loss(loss, run.path), loss) for loss in losses]


def find_trust(run: RunRecord) -> Trust | None:
    """What a run's losses were told of teacher and labels; None if they were not, or it is not done."""
    headers = [read_part(read_header(run.path / RESULTS["distill"]), "provenance")] if run.command == "distill" else []
    if run.command == "compare":
        headers = [read_dict(path) for path in sorted((run.path / "cells").glob("*.json"))]
    for told in (read_part(header, "trust") for header in headers):
        with suppress(LookupError, TypeError, ValueError):  # damaged
            if told:
                return Trust(TrustFigures.from_json(told))
    return None


def draw_loss(name: str, specification: Any, folder: Path, trust: Trust | None = None) -> dict[str, Any]:
    """A loss, whose runs are yet to be named: `panels`, title → [progress][teacher × student], or why there are none.

    A panel has one progress only if it does not matter. `trust`: what a loss that reads it is told, and then says.
    """
    panels: dict[str, list[list[float | None]]] = {}
    record: dict[str, Any] = {"name": name, "runs": [], "panels": panels, "trust": "", "note": None}
    try:
        loss = open_loss(specification, folder)
        if loss.reads_trust:
            loss.set_trust(trust or Trust())
            record["trust"] = str(trust or Trust())
        frames = [gradient_surface(loss, progress, points=SURFACE_POINTS) for progress in PROGRESS]
        coarse = gradient_surface(loss, 0.5, points=1 + (SURFACE_POINTS - 1) // STRIDE)
    except UserError as error:
        return record | {"note": str(error)}
    if isinstance(loss, LearnedLoss | ReplayedLoss) and any("context" in p.conditioning for p in loss.at(0.0).forms()):
        told = "of its batch it is told what one as broad as this plane has"
        record["trust"] = "; ".join(filter(None, [record["trust"], told]))
    elif not torch.allclose(frames[2][::STRIDE, ::STRIDE], coarse, rtol=1e-2, atol=1e-5):
        return record | {"note": "compares images of a batch with each other: no function of one image's confidence"}
    panels["gradient at the target logit"] = to_frames(frames)
    if isinstance(loss, LearnedLoss | ReplayedLoss) and "logits" in loss.at(0.0).parts:
        balances = zip(*(balance_surface(loss.at(p), p, points=SURFACE_POINTS) for p in PROGRESS), strict=True)
        panels |= {title: to_frames(surfaces) for title, surfaces in zip(BALANCE, balances, strict=True)}
    return record


def open_loss(specification: Any, folder: Path) -> DistillationLoss:
    """Build a loss that is over logits alone; of a learned one that reads features too, its parts over logits."""
    if isinstance(specification, dict):
        specification = {key: value for key, value in specification.items() if key not in OF_TRAINING}
        if specification.get("name") == INFLUENCE_WEIGHTED:
            specification = specification.get("loss", "kd")
    name = str(specification.get("name") if isinstance(specification, dict) else specification)
    path = find_near(name, folder)
    if is_learned(name) or (path is not None and path.is_file()):
        if path is None:
            raise UserError("its file is no longer there")
        loss = load_loss(path).leave_out_features()
        if len(loss.at(0.0).parts):
            return loss
    elif not reads_features(specification):
        return build_loss(specification)
    raise UserError("reads features: no function of the confidence alone")


def to_frames(surfaces: Sequence[Tensor]) -> list[list[float | None]]:
    """Surfaces as flat lists, row by row, with four digits; a single one if all are the same."""
    frames = [round_finite(surface.flatten().tolist(), 4) for surface in surfaces]
    return frames[:1] if all(frame == frames[0] for frame in frames) else frames
