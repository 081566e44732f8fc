"""The rollouts behind ranking fidelity: every loss from the same student with the same batches, scored."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lkd.assembly import architecture_of, prepare_loss, prepare_student, read_teacher_stages
from lkd.cells import digest_of, prepare_images_for_cells, prepare_teacher_for_cells
from lkd.config import FidelityRecipe
from lkd.data import Batch, draw_positions, seeded_generator
from lkd.kept_results import write_result
from lkd.outer_objectives import OBJECTIVES
from lkd.pool import INDEX, open_pool
from lkd.pool_student import PoolStudent
from lkd.rollouts import (
    InnerBatch,
    build_inner_optimizer,
    build_rollout_batches,
    compute_inner_loss,
    compute_outer_logits,
    list_inner_batches,
)
from lkd.workers import own_device
from meta import rollout

ROW_FORMAT = 2


class Draw(NamedTuple):
    """One student and its batches, from which every loss is rolled out.

    Attributes:
        annealing: Learning rate within the rollout.
        steps: K.
        age: The student's age, as the recipe has it.
        number: The number of the draw; equal numbers share batches, whatever the other fields.
        student: Position in the pool.
    """

    annealing: str
    steps: int
    age: float
    number: int
    student: int


def plan_draws(recipe: FidelityRecipe, pool: list[dict[str, Any]], total_steps: int) -> list[Draw]:
    """All draws.

    Args:
        recipe: The recipe.
        pool: The pool's `students`, as its index lists them.
        total_steps: Of one full training.
    """
    draws = []
    for age in recipe.ages:
        positions = find_students(pool, age, total_steps)
        draws += [
            Draw(annealing, steps, age, number, positions[number % len(positions)])
            for number in range(recipe.rollouts)
            for annealing in recipe.annealing
            for steps in recipe.rollout_lengths
        ]
    return draws


def find_students(pool: list[dict[str, Any]], age: float, total_steps: int) -> list[int]:
    """Positions of the students of an age: within half a training step, which is what the pool rounds ages to."""
    return [position for position, entry in enumerate(pool) if abs(entry["progress"] - age) * total_steps <= 0.5 + 1e-3]


def draw_path(recipe: FidelityRecipe, draw: Draw, pool: Path, folder: Path) -> Path:
    """Where a draw's result lies: named by all that decides it."""
    names = {
        label: loss["name"] if isinstance(loss, dict) and "name" in loss else str(loss)
        for label, loss in recipe.losses.items()
    }
    identity = {
        "format": ROW_FORMAT,
        "draw": draw,
        "losses": {label: digest_of(names[label]) or loss for label, loss in recipe.losses.items()},
        "objectives": list_objectives(recipe),
        "outer_batch_size": recipe.outer_batch_size,
        "rollout_epochs": recipe.rollout_epochs,
        "data": dataclasses.asdict(recipe.data) | {"root": None},
        "teacher": dataclasses.asdict(recipe.teacher) | {"path": digest_of(recipe.teacher.path) or recipe.teacher.path},
        "student": dataclasses.asdict(recipe.student),
        "train": dataclasses.asdict(recipe.train),
        "pool": digest_of(str(pool / INDEX)),
        "seed": recipe.seed,
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return folder / "rollouts" / f"{draw.annealing}-K{draw.steps}-age{draw.age:g}-draw{draw.number}-{digest}.json"


def list_objectives(recipe: FidelityRecipe) -> list[str]:
    """The recipe's objectives; all there are if it names none."""
    return recipe.objectives or list(OBJECTIVES)


def run_draw(recipe: FidelityRecipe, draw: Draw, pool_folder: Path, path: Path, device: str = "cpu") -> dict[str, Any]:
    """Roll out every loss of one draw and write the outer values: `values[objective][loss label]`."""
    device = own_device(device)
    place = torch.device(device)
    data, taught = (json.dumps(dataclasses.asdict(part)) for part in (recipe.data, recipe.teacher))
    images = prepare_images_for_cells(data)
    losses = {
        label: prepare_loss(loss, recipe.student, recipe.teacher, images, recipe.seed).to(place)
        for label, loss in recipe.losses.items()
    }
    stages = sorted({stage for loss in losses.values() for stage in read_teacher_stages(loss)})
    teacher = prepare_teacher_for_cells(data, taught, device, tuple(stages))
    pool = open_pool(pool_folder, images, architecture_of(recipe.student, images.train))
    start = pool.read(draw.student, place)
    generator = seeded_generator(recipe.seed, 6, draw.number)
    seed = int(torch.randint(2**62, (), generator=generator))
    batches = build_rollout_batches(
        images.train, recipe.train, draw.steps, recipe.rollout_epochs, seed, recipe.data, place
    )
    inner_batches = list_inner_batches(batches, teacher, start.progress, draw.steps, tuple(stages))
    size = min(recipe.outer_batch_size, len(images.meta_validation))
    outer_batch = images.meta_validation.batch(draw_positions(len(images.meta_validation), size, generator), place)
    student = prepare_student(recipe.student, images.train, recipe.seed, place).train()
    values: dict[str, dict[str, float]] = {objective: {} for objective in list_objectives(recipe)}
    for label, loss in losses.items():
        for objective, value in score_rollout(recipe, draw, student, start, loss, inner_batches, outer_batch).items():
            values[objective][label] = value
    row = {**draw._asdict(), "progress": start.progress, "values": values}
    write_result(path, row)
    return row


def score_rollout(
    recipe: FidelityRecipe,
    draw: Draw,
    student: nn.Module,
    start: PoolStudent,
    loss: nn.Module,
    inner_batches: list[InnerBatch],
    outer_batch: Batch,
) -> dict[str, float]:
    """Train as a rollout of meta-training does, and score what comes out by each objective; infinite if it diverged."""
    end = rollout(
        lambda *arguments: compute_inner_loss(student, loss, *arguments),
        start.state,
        {},
        inner_batches,
        build_inner_optimizer(recipe.train, start.learning_rate, draw.annealing, draw.steps),
    )
    with torch.no_grad():
        logits = compute_outer_logits(student, end.parameters, end.buffers, outer_batch)
        values = {name: float(OBJECTIVES[name](logits, outer_batch.target)) for name in list_objectives(recipe)}
    return {name: value if math.isfinite(value) else math.inf for name, value in values.items()}
