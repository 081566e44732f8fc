"""The trainings of a comparison: their options, their place, their cost and their result."""

import ctypes
import dataclasses
import gc
import hashlib
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from lkd.balance.balancing import build_balance
from lkd.config.evaluation import CompareRecipe
from lkd.config.parse import make_recipe
from lkd.config.parts import DataRecipe, ModelRecipe, TeacherRecipe, TrainRecipe
from lkd.core.errors import UserError
from lkd.core.tensor_files import write_result
from lkd.core.workers import hold_lease, own_device
from lkd.models.teacher import TeacherFunction
from lkd.training.build import (
    Images,
    OpenedTeacher,
    choose_student,
    open_teacher,
    prepare_images,
    prepare_loss,
    prepare_teacher,
)
from lkd.training.distill import label_by_teacher, start_training
from lkd.training.evaluate import evaluate, guess
from lkd.training.training import DivergedError

# ----------------------------------------------------------------------------------------------------------------------
# What a training costs: seconds and memory of its steps, evaluation left out.


class Cost:
    """Seconds and peak memory of the blocks that `measured` encloses.

    On CUDA memory is the allocator's. On Linux it is resident memory: before each block what the process has freed goes
    back to the system and the kernel's peak is reset, so that earlier trainings of the process do not count. Elsewhere
    it is not measured.

    Args:
        device: Where the training runs.

    Attributes:
        seconds: Of all blocks.
        peak_mib: The highest peak of a block above what was in use when this object was made, MiB; None where it cannot
            be measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self.peak_mib: float | None = None
        gc.collect()
        self.idle = self._reset()

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Count what happens within."""
        self._reset()
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds += time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated(self.device) / 2**20 if self.device.type == "cuda" else resident("VmHWM")
        if self.idle is not None and peak is not None:
            self.peak_mib = max(self.peak_mib or 0.0, peak - self.idle)

    def _reset(self) -> float | None:
        """Start a new peak; the memory in use, MiB."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device) / 2**20
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        except (OSError, AttributeError, TypeError):
            return None
        return resident("VmRSS")


def resident(key: str) -> float | None:
    """An entry of this process's status, MiB; None where the system has none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(key)), None)


# ----------------------------------------------------------------------------------------------------------------------
# Methods of a comparison: their options, their grids, and which points of a grid a budget allows.

Method = dict[str, Any] | str
TRAIN = "train."
BALANCE = "balance."


def split_method(method: Method, train: TrainRecipe) -> tuple[Method, TrainRecipe]:
    """What `build_loss` takes, and the training with the method's own settings (`train: {learning_rate: 0.03}`)."""
    if isinstance(method, str):
        return method, train
    loss = {key: value for key, value in method.items() if key not in ("train", "grid", "balance")}
    return loss, dataclasses.replace(train, **method.get("train", {}))


def balance_of(method: Method) -> dict[str, Any] | str | None:
    """What `build_balance` takes."""
    return None if isinstance(method, str) else method.get("balance")


def expand_grid(method: Method) -> list[Method]:
    """Every point of a method's grid; the method itself if it has none."""
    if isinstance(method, str) or "grid" not in method:
        return [method]
    names = list(method["grid"])
    return [
        place_point(method, dict(zip(names, point, strict=True)))
        for point in itertools.product(*method["grid"].values())
    ]


def place_point(method: dict[str, Any], point: dict[str, Any]) -> dict[str, Any]:
    """A method with one point of its grid; keys that start with `train.` or `balance.` go into that part of it."""
    placed = {key: value for key, value in method.items() if key != "grid"}
    train = dict(placed.pop("train", {}))
    train |= {key.removeprefix(TRAIN): value for key, value in point.items() if key.startswith(TRAIN)}
    if weighed := {key.removeprefix(BALANCE): value for key, value in point.items() if key.startswith(BALANCE)}:
        balance = placed.get("balance", {})
        placed["balance"] = ({"name": balance} if isinstance(balance, str) else balance) | weighed
    placed |= {key: value for key, value in point.items() if not key.startswith((TRAIN, BALANCE))}
    return placed | ({"train": train} if train else {})


def choose_points(recipe: CompareRecipe, label: str) -> list[Method]:
    """The points that a method is tuned over: its grid, or as much of it as the budget allows.

    The first point has the method's own options, given beside the grid, where the grid holds them, and each list's
    first value elsewhere. Every further one is the point whose values have been used least so far, so that the values
    of each option are tried equally often; a seeded shuffle breaks ties.
    """
    method = recipe.methods[label]
    grid = expand_grid(method)
    budget = recipe.tuning_trainings // recipe.tuning_seeds
    if isinstance(method, str) or not recipe.tuning_trainings or len(grid) <= budget:
        return grid
    options: dict[str, list[Any]] = method["grid"]
    own = method | {f"{TRAIN}{key}": value for key, value in dataclasses.asdict(recipe.train).items()}
    own |= {f"{TRAIN}{key}": value for key, value in method.get("train", {}).items()}
    first = tuple(values.index(own[name]) if own.get(name) in values else 0 for name, values in options.items())
    points = list(itertools.product(*(range(len(values)) for values in options.values())))
    random.Random(f"{recipe.seed}/{label}").shuffle(points)
    used: Counter[tuple[int, int]] = Counter()
    chosen: list[tuple[int, ...]] = []
    while len(chosen) < budget:
        point = min(points, key=lambda p: sum(used[place] for place in enumerate(p))) if chosen else first
        points.remove(point)
        used.update(enumerate(point))
        chosen.append(point)
    names = list(options)
    return [
        place_point(method, {name: options[name][i] for name, i in zip(names, p, strict=True)}) for p in sorted(chosen)
    ]


def check_tuning(recipe: CompareRecipe) -> None:
    """Check the budget and the form of every grid and every training of a method's own.

    Raises:
        UserError: If one is not good.
    """
    if recipe.tuning_trainings and recipe.tuning_trainings < recipe.tuning_seeds:
        raise UserError(
            f"tuning_trainings: {recipe.tuning_trainings} is not at least tuning_seeds, {recipe.tuning_seeds}; "
            "0 trains the full grid of every method"
        )
    for label, method in recipe.methods.items():
        if isinstance(method, str):
            continue
        grid, train = method.get("grid", {}), method.get("train", {})
        for key, value in (("grid", grid), ("train", train)):
            if not isinstance(value, dict):
                raise UserError(f"methods.{label}.{key}: {value!r} is not a mapping, such as {{option: ...}}")
        for name, values in grid.items():
            if not isinstance(values, list) or not values:
                raise UserError(f"methods.{label}.grid.{name}: {values!r} is not a list of values to try")
            for value in values if name.startswith(TRAIN) else []:
                make_recipe(TrainRecipe, {name.removeprefix(TRAIN): value}, f"methods.{label}.grid.train")
        make_recipe(TrainRecipe, train, f"methods.{label}.train")


# ----------------------------------------------------------------------------------------------------------------------
# One cell of a comparison: a training, its place, and its result.

Row = dict[str, Any]
ROW_FORMAT = 2  # of a cell's result; results of another format are not read


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        method: The method's label.
        loss: What `build_loss` takes, with a `train` and a `balance` of its own where the method has one.
        student: The network.
        seed: Of initial weights and batches; equal seeds are paired over methods.
        reported: Whether the test split is read (a reported number) or only meta-validation (tuning).
    """

    method: str
    loss: Method
    student: ModelRecipe
    seed: int
    reported: bool


def run_leased(recipe: CompareRecipe, cell: Cell, path: Path, lease: Path, device: str) -> Row | None:
    """Train one cell if nobody else does; None if someone does, or did."""
    with hold_lease(path, lease) as ours:
        return run_cell(recipe, cell, path, device) if ours else None


def cell_path(recipe: CompareRecipe, cell: Cell, folder: Path) -> Path:
    """Where a cell's result lies: named by all that decides it, so that a changed recipe never finds an old result."""
    train = dataclasses.asdict(split_method(cell.loss, recipe.train)[1])
    learned = digest_of(cell.loss["name"] if isinstance(cell.loss, dict) else cell.loss)
    weights = digest_of(str(cell.loss.get("weights"))) if isinstance(cell.loss, dict) else None
    identity = {
        "format": ROW_FORMAT,
        "cell": dataclasses.asdict(cell) | ({"loss": learned} if learned else {}),
        "data": dataclasses.asdict(recipe.data) | {"root": None},
        "teacher": dataclasses.asdict(recipe.teacher) | {"path": digest_of(recipe.teacher.path) or recipe.teacher.path},
        "train": {name: value for name, value in train.items() if not name.startswith("checkpoint")},
        "every": recipe.evaluate_every,
        **({"weights": weights} if weights else {}),
        **({"labelled": recipe.labelled_size} if recipe.labelled_size else {}),
    }
    if learned and balance_of(cell.loss):
        identity["balance"] = balance_of(cell.loss)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    kind = "report" if cell.reported else "tune"
    label = "".join(letter if letter.isalnum() else "-" for letter in cell.method)
    return folder / "cells" / f"{kind}-{label}-{cell.student.name}-seed{cell.seed}-{digest}.json"


def digest_of(path: str) -> str | None:
    """The hash of a file, None where there is none of that name."""
    file = Path(path)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


@lru_cache(maxsize=8)
def prepare_images_for_cells(data: str) -> Images:
    """Images, once a process; the argument is the recipe's JSON."""
    return prepare_images(DataRecipe(**json.loads(data)))


@lru_cache(maxsize=8)
def open_teacher_for_cells(data: str, teacher: str) -> OpenedTeacher:
    """A teacher, read once a process; the recipes are JSON."""
    return open_teacher(TeacherRecipe(**json.loads(teacher)), prepare_images_for_cells(data).train)


@lru_cache(maxsize=8)
def prepare_teacher_for_cells(data: str, teacher: str, device: str, stages: tuple[str, ...]) -> TeacherFunction:
    """What answers the losses that read these stages, once a process; the recipes are JSON."""
    opened = open_teacher_for_cells(data, teacher)
    return prepare_teacher(opened, prepare_images_for_cells(data), torch.device(device), stages)


def run_cell(recipe: CompareRecipe, cell: Cell, path: Path, device: str = "cpu") -> Row:
    """Train one cell and write its result.

    The test split is read only if the cell is reported: at the last and the best epoch. A training that diverges is a
    result too: that of guessing.
    """
    device = own_device(device)
    data, taught = (json.dumps(dataclasses.asdict(part)) for part in (recipe.data, recipe.teacher))
    images = prepare_images_for_cells(data)
    specification, train = split_method(cell.loss, recipe.train)
    student = choose_student(cell.student, images.train)
    loss = prepare_loss(specification, student, open_teacher_for_cells(data, taught), images, cell.seed)
    teacher = prepare_teacher_for_cells(data, taught, device, loss.teacher_stages)
    place = torch.device(device)
    started = time.perf_counter()
    cost = Cost(place)
    balance = build_balance(balance_of(cell.loss), loss)
    labelled = label_by_teacher(images, recipe.labelled_size, teacher, place)
    training = start_training(student, labelled, loss, teacher, train, cell.seed, place, balance=balance)
    weights: list[float] = []
    best: dict[str, Any] = {"top1": -1.0}
    best_weights: dict[str, torch.Tensor] = {}
    every = recipe.evaluate_every * training.batches.steps_per_epoch if cell.reported else training.total_steps
    diverged_at = None
    while training.step < training.total_steps:
        left = training.total_steps - training.step
        try:
            with cost.measured():
                for _ in range((left - 1) % every + 1):
                    training.run_step()
        except DivergedError:
            diverged_at = training.step
            figures = {"step": training.step, **guess(images.meta_validation)}
            break
        figures = {"step": training.step, **evaluate(training.result, images.meta_validation, place)}
        if training.balance:
            weights.append(training.balance.weight)
        if figures["top1"] > best["top1"]:
            best = figures
            best_weights = {name: tensor.clone() for name, tensor in training.result.state_dict().items()}
    row: Row = {
        **dataclasses.asdict(cell),
        "student": cell.student.name,
        "meta_validation": figures,
        "best_step": best.get("step", 0),
        "seconds": time.perf_counter() - started,
        "steps_per_second": training.step / cost.seconds,
        "loss_parameters": sum(parameter.numel() for parameter in training.loss.parameters()),
        "peak_mib": cost.peak_mib,
    }
    if weights:
        row["balance_weights"] = weights
    if diverged_at is not None:
        row["diverged_at"] = diverged_at
    if cell.reported:
        row["last"] = row["best"] = guess(images.test)
        if diverged_at is None:
            row["last"] = evaluate(training.result, images.test, place)
        if best_weights:
            training.result.load_state_dict(best_weights)
            row["best"] = evaluate(training.result, images.test, place)
    write_result(path, row)
    return row
