"""One cell of a comparison: a training, its place, and its result."""

import dataclasses
import hashlib
import json
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from lkd.assembly import (
    Images,
    prepare_images,
    prepare_loss,
    prepare_teacher,
    read_teacher_stages,
)
from lkd.balance.pseudo_labels import label_by_teacher
from lkd.claims import claimed
from lkd.config import CompareRecipe, DataRecipe, ModelRecipe, TeacherRecipe
from lkd.cost import Cost
from lkd.distillation import start_training
from lkd.evaluation import evaluate, guess
from lkd.kept_results import write_result
from lkd.training import DivergedError, TeacherFunction
from lkd.tuning import Method, balance_of, split_method
from lkd.workers import own_device

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


def run_claimed(recipe: CompareRecipe, cell: Cell, path: Path, claim: Path, device: str) -> Row | None:
    """Train one cell if nobody else does; None if someone does, or did."""
    with claimed(path, claim) as ours:
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
def prepare_teacher_for_cells(data: str, teacher: str, device: str, stages: tuple[str, ...]) -> TeacherFunction:
    """A teacher for the losses that read these stages, once a process; the recipes are JSON."""
    images = prepare_images_for_cells(data)
    recipes = TeacherRecipe(**json.loads(teacher)), DataRecipe(**json.loads(data))
    return prepare_teacher(*recipes, images, torch.device(device), stages)


def run_cell(recipe: CompareRecipe, cell: Cell, path: Path, device: str = "cpu") -> Row:
    """Train one cell and write its result.

    The test split is read only if the cell is reported: at the last and the best epoch. A training that diverges is a
    result too: that of guessing.
    """
    device = own_device(device)
    data, taught = (json.dumps(dataclasses.asdict(part)) for part in (recipe.data, recipe.teacher))
    images = prepare_images_for_cells(data)
    specification, train = split_method(cell.loss, recipe.train)
    loss = prepare_loss(specification, cell.student, recipe.teacher, images, cell.seed)
    teacher = prepare_teacher_for_cells(data, taught, device, read_teacher_stages(loss))
    place = torch.device(device)
    started = time.perf_counter()
    cost = Cost(place)
    balance = balance_of(cell.loss)
    labelled = label_by_teacher(images.train, recipe.labelled_size, teacher, place, recipe.data.split_seed)
    training = start_training(
        cell.student, labelled, loss, teacher, train, recipe.data, cell.seed, place, balance=balance
    )
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
