"""Ranking fidelity: do short rollouts rank losses as full trainings do?"""

import dataclasses
import math
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lkd.config.evaluation import CompareRecipe, FidelityRecipe
from lkd.core.errors import UserError, check_choice
from lkd.core.random import draw_positions, seeded_generator
from lkd.core.tensor_files import drop_damaged, read_result, write_result
from lkd.core.workers import count_threads, finish_all, own_device, start_workers
from lkd.evaluation.comparison.compare import finish_trials
from lkd.evaluation.comparison.trials import (
    Trial,
    TrialInputs,
    hash_content,
    hash_identity,
    identify_inputs,
    open_inputs,
    trial_path,
)
from lkd.evaluation.fidelity_results import list_objectives, write_results
from lkd.losses.learned.trust import Trust
from lkd.meta_training.rollouts import (
    OBJECTIVES,
    build_inner_optimizer,
    build_rollout_batches,
    compute_inner_loss,
    compute_outer_logits,
    list_inner_batches,
)
from lkd.meta_training.worlds import describe_pool
from lkd.pool.pool import Pool, World, build_pool, open_pool
from lkd.tracking.run import Run
from lkd.training.answers import check_same_images
from lkd.training.build import LossBuilder, StudentBuilder, choose_student
from lkd.training.introduce import introduce_network, introduce_teacher
from lkd.training.optimizer import MANY_STEPS, build_optimizer, build_scheduler, check_differentiable
from meta import Problem, rollout

# ----------------------------------------------------------------------------------------------------------------------
# The rollouts behind ranking fidelity: every loss from the same student with the same batches, scored.

ROW_FORMAT = 2


class Draw(NamedTuple):
    """One student and its batches, from which every loss is rolled out."""

    annealing: str
    steps: int
    age: float
    number: int  # equal numbers share batches, whatever the other fields
    student: int  # its position in the pool


def plan_draws(recipe: FidelityRecipe, pool: list[dict[str, Any]], total_steps: int) -> list[Draw]:
    """All draws, of the students that the pool's index lists."""
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


def draw_path(recipe: FidelityRecipe, draw: Draw, pool: Pool, folder: Path) -> Path:
    """Where a draw's result lies: named by all that decides it."""
    names = {label: loss.get("name") if isinstance(loss, dict) else loss for label, loss in recipe.losses.items()}
    threads = count_threads(recipe.threads)
    identity = {
        "format": ROW_FORMAT,
        "draw": draw,
        "losses": {label: hash_content(str(names[label])) or loss for label, loss in recipe.losses.items()},
        "objectives": list_objectives(recipe),
        "outer_batch_size": recipe.outer_batch_size,
        "rollout_epochs": recipe.rollout_epochs,
        **identify_inputs(recipe),
        "student": dataclasses.asdict(recipe.student),
        "train": dataclasses.asdict(recipe.train),
        "student_file": hash_content(str(pool.folder / pool.index["students"][draw.student]["file"])),
        "seed": recipe.seed,
        **({"threads": threads} if threads != 1 else {}),
    }
    name = f"{draw.annealing}-K{draw.steps}-age{draw.age:g}-draw{draw.number}-{hash_identity(identity)}.json"
    return folder / "rollouts" / name


def run_draw(recipe: FidelityRecipe, draw: Draw, pool_folder: Path, path: Path, device: str = "cpu") -> dict[str, Any]:
    """Roll out every loss of one draw, as meta-training does, and write `values[objective][loss label]`."""
    device = own_device(device)
    place = torch.device(device)
    inputs = open_inputs(recipe)
    images = inputs.images
    builder = choose_student(recipe.student, images.train)
    losses = {
        label: LossBuilder(loss, inputs.teacher, images).build(builder, recipe.seed).to(place)
        for label, loss in recipe.losses.items()
    }
    stages = sorted({stage for loss in losses.values() for stage in loss.teacher_stages})
    teacher = inputs.answers(device, tuple(stages))
    student = builder.build(recipe.seed, place).train()
    start = open_pool(pool_folder, images, builder.architecture).read(draw.student, student)
    start.restore(student)
    for loss in losses.values():
        if loss.reads_trust:
            loss.set_trust(inputs.measure(device))
            loss.update_trust(student)
    generator = seeded_generator(recipe.seed, 6, draw.number)
    seed = int(torch.randint(2**62, (), generator=generator))
    batches = build_rollout_batches(
        images.train, recipe.train, draw.steps, recipe.rollout_epochs, seed, recipe.data, place
    )
    inner_batches = list_inner_batches(batches, teacher, start.progress, draw.steps, tuple(stages))
    size = min(recipe.outer_batch_size, len(images.meta_validation))
    outer_batch = images.meta_validation.batch(draw_positions(len(images.meta_validation), size, generator), place)
    values: dict[str, dict[str, float]] = {objective: {} for objective in list_objectives(recipe)}
    for label, loss in losses.items():
        problem = Problem(
            partial(compute_inner_loss, student, loss),
            partial(compute_outer_logits, student),
            start.state,
            {},
            inner_batches,
            outer_batch,
            build_inner_optimizer(student, recipe.train, start.rate_in(recipe.train), draw.annealing, draw.steps),
        )
        torch.manual_seed(seed)  # of dropout
        end = rollout(problem)
        with torch.no_grad():
            logits = problem.evaluate(end)
            for objective, scores in values.items():
                value = float(OBJECTIVES[objective](logits, outer_batch.target))
                scores[label] = value if math.isfinite(value) else math.inf  # it diverged
    row = {**draw._asdict(), "progress": start.progress, "threads": torch.get_num_threads(), "values": values}
    write_result(path, row)
    return row


# ----------------------------------------------------------------------------------------------------------------------
# Ranking fidelity: do short rollouts rank losses as full trainings do? Meta-training sees rollouts only; a loss that
# it prefers is better for a whole training only as far as rollouts rank losses as whole trainings do. That can be
# measured beforehand, with losses whose full trainings are affordable. The measurement is ours; the paper (LKD) has
# none.


def measure_fidelity(recipe: FidelityRecipe, run: Run) -> dict[str, Any]:
    """Train every loss fully, roll every loss out, correlate; write tables, picture and `fidelity.json`.

    Returns:
        What `fidelity.json` holds.

    Raises:
        Interrupted: On Ctrl-C or SIGTERM; finished trainings and rollouts stay.
    """
    inputs = open_inputs(recipe)
    images = inputs.images
    check_same_images(images, run)
    total_steps = recipe.train.epochs * (len(images.train) // recipe.train.batch_size)
    student = choose_student(recipe.student, images.train)
    check_recipe(recipe, inputs, student, total_steps)
    pool = open_pool(Path(recipe.pool_dir), images, student.architecture) if recipe.pool_dir else None
    check_ages(recipe, pool, total_steps)
    run.say(*describe_pool(recipe))
    run.say(introduce_network("student", student, images, run.device, recipe.train))
    run.say(introduce_teacher(inputs.teacher, images, run.device))
    pool = pool or make_pool(recipe, inputs, student, run)
    check_ages(recipe, pool, total_steps)  # a student that diverged has not reached them all
    started = time.perf_counter()
    with start_workers(recipe.workers, run.device, recipe.threads, recipe.plugins) as workers:
        trainings = plan_trainings(recipe)
        finish_trials(as_comparison(recipe), trainings, run, workers, "full trainings")
        draws = {
            draw_path(recipe, draw, pool, run.path): draw
            for draw in plan_draws(recipe, pool.index["students"], total_steps)
        }
        drop_damaged(draws, run.say)
        jobs = {
            workers.submit(run_draw, recipe, draw, pool.folder, path, str(run.device)): ""
            for path, draw in draws.items()
            if not path.exists()
        }
        finish_all(jobs, lambda *_: None, "rollouts")
    run.say(f"trainings and rollouts: {time.perf_counter() - started:.0f} s")
    full = [read_result(trial_path(as_comparison(recipe), trial, run.path)) for trial in trainings]
    return write_results(recipe, full, [read_result(path) for path in draws], run)


def as_comparison(recipe: FidelityRecipe) -> CompareRecipe:
    """The full trainings as a comparison's, so that they are run and kept as those are."""
    return CompareRecipe(
        data=recipe.data,
        teacher=recipe.teacher,
        train=recipe.train,
        methods=recipe.losses,
        students=[recipe.student],
        threads=recipe.threads,
    )


def plan_trainings(recipe: FidelityRecipe) -> list[Trial]:
    """The full trainings: each loss with every seed. They are not reported: no one reads the test split."""
    return [
        Trial(label, loss, recipe.student, recipe.seed + offset, reported=False)
        for offset in range(recipe.full_seeds)
        for label, loss in recipe.losses.items()
    ]


def make_pool(recipe: FidelityRecipe, inputs: TrialInputs, student: StudentBuilder, run: Run) -> Pool:
    """Build the pool in the run directory."""
    losses = LossBuilder(recipe.pool.loss, inputs.teacher, inputs.images)
    loss = losses.build(student, recipe.seed)
    teacher = inputs.answers(str(run.device), loss.teacher_stages)
    trust = inputs.measure(str(run.device)) if loss.reads_trust else Trust()
    trained_in = World(inputs.images, teacher, student, recipe.train, recipe.seed, run.device, trust=trust)
    return build_pool(trained_in, recipe.pool, losses.build, run.path / "pool", run)


def check_recipe(recipe: FidelityRecipe, inputs: TrialInputs, student: StudentBuilder, total_steps: int) -> None:
    """Check everything but the ages, before any training."""
    for name in ("ages", "rollout_lengths", "annealing"):
        values = getattr(recipe, name)
        if not values or len(set(values)) < len(values):
            raise UserError(f"{name}: {values} must hold at least one value, and each once")
    for objective in list_objectives(recipe):
        check_choice("objectives", objective, OBJECTIVES)
    check_differentiable(recipe.train)
    network = student.build(recipe.seed, torch.device("cpu"))
    build_scheduler(build_optimizer(network, recipe.train), recipe.train, MANY_STEPS)
    check_losses(recipe, inputs, student)
    for steps in recipe.rollout_lengths:
        longest = math.floor((1 - max(recipe.ages)) * total_steps + 0.5)
        if "constant" in recipe.annealing and steps > longest:
            raise UserError(
                f"rollout_lengths: a rollout of {steps} steps without annealing goes on past the end of the training: "
                f"at age {max(recipe.ages):g}, {longest} of {total_steps} steps are left; "
                "leave out `constant`, that age or that length"
            )


def check_losses(recipe: FidelityRecipe, inputs: TrialInputs, student: StudentBuilder) -> None:
    """Check the losses to rank."""
    if len(recipe.losses) < 3:
        raise UserError(f"losses: {len(recipe.losses)} given ({', '.join(recipe.losses)}); a ranking needs at least 3")
    for label, specification in recipe.losses.items():
        try:
            for key in ("grid", "train"):
                if isinstance(specification, dict) and key in specification:
                    raise UserError(f"takes no `{key}`: every loss is one loss, at the recipe's training")
            loss = LossBuilder(specification, inputs.teacher, inputs.images).build(student, recipe.seed)
            if loss.needs_index or any(p.requires_grad for p in loss.parameters()):
                raise UserError(
                    "has parts that are trained along with the student, which a student of the pool has not; "
                    "take a loss without adapters"
                )
        except UserError as error:
            raise UserError(f"losses.{label}: {error}") from error


def check_ages(recipe: FidelityRecipe, pool: Pool | None, total_steps: int) -> None:
    """Check that the pool holds, or will hold, students of every age."""
    settings = recipe.pool
    planned = torch.linspace(0, settings.max_age, settings.snapshots).tolist()
    entries = (
        pool.index["students"] if pool else [{"progress": round(age * total_steps) / total_steps} for age in planned]
    )
    held = sorted({round(entry["progress"], 3) for entry in entries})
    for age in recipe.ages:
        if not find_students(entries, age, total_steps):
            hint = "take another pool" if pool else "change pool.snapshots and pool.max_age"
            raise UserError(
                f"ages: {age:g} is not an age of the pool, which has {', '.join(f'{a:g}' for a in held)}; "
                f"take one of these, or {hint}"
            )
