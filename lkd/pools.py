"""The pools of all architectures that a loss is learned with, and their renewal while the loss improves."""

import copy
import dataclasses
import shutil
from pathlib import Path

from lkd.assembly import Images, architecture_of
from lkd.config import MetaTrainRecipe, ModelRecipe
from lkd.interleaving import alternation_start
from lkd.losses import LearnedLoss
from lkd.pool import Pool, build_pool, open_pool
from lkd.run import Run
from lkd.training import TeacherFunction

LIVE = "live"  # the folder of renewed pools


def list_students(recipe: MetaTrainRecipe) -> list[ModelRecipe]:
    """The architectures that the loss is learned with."""
    return recipe.students or [recipe.student]


def open_pools(recipe: MetaTrainRecipe, folder: Path, images: Images) -> list[Pool]:
    """Open the pool of each architecture.

    Raises:
        UserError: If one is missing or does not fit.
    """
    return [
        open_pool(place, images, architecture_of(model, images.train))
        for model, place in zip(list_students(recipe), list_folders(recipe, folder), strict=True)
    ]


def build_pools(
    recipe: MetaTrainRecipe,
    folder: Path,
    images: Images,
    teacher: TeacherFunction,
    run: Run,
    loss: LearnedLoss | None = None,
    first: int = 0,
) -> list[Pool]:
    """Build the pool of each architecture, or finish it; the arguments are those of `build_pool`.

    Raises:
        UserError: If the settings are impossible.
        Interrupted: On Ctrl-C or SIGTERM; finished students stay.
    """
    return [
        build_pool(dataclasses.replace(recipe, student=model), place, images, teacher, run, loss, first)
        for model, place in zip(list_students(recipe), list_folders(recipe, folder), strict=True)
    ]


def renew_pools(
    recipe: MetaTrainRecipe,
    outer_step: int,
    first_pools: list[Pool],
    images: Images,
    teacher: TeacherFunction,
    run: Run,
    loss: LearnedLoss,
) -> list[Pool]:
    """The pools of sampling live at an outer step.

    Every `refresh_every` steps students with numbers of their own are trained with the loss as it is then, frozen; a
    run that is gone on with finds them in its folder.

    Args:
        recipe: The recipe.
        outer_step: The outer step that is about to be taken.
        first_pools: What is drawn from until the first renewal.
        images: The images.
        teacher: From a batch to the teacher's outputs.
        run: The run.
        loss: The loss as it is now.

    Raises:
        UserError: If the pool of this time is gone.
        Interrupted: On Ctrl-C or SIGTERM; finished students stay.
    """
    renewals, since = divmod(outer_step, recipe.pool.refresh_every)
    if not renewals:
        return first_pools
    folder = run.path / LIVE / name_renewal(outer_step - since)
    if since:
        return open_pools(recipe, folder, images)
    frozen = copy.deepcopy(loss).requires_grad_(False)
    return build_pools(recipe, folder, images, teacher, run, frozen, renewals * recipe.pool.students)


def drop_superseded_pools(recipe: MetaTrainRecipe, outer_step: int, run: Run) -> None:
    """Delete renewed pools that a run which goes on from this outer step draws from no more."""
    for folder in (run.path / LIVE).glob("step-*"):
        if folder.name < name_renewal(outer_step - outer_step % recipe.pool.refresh_every):
            shutil.rmtree(folder)


def name_renewal(outer_step: int) -> str:
    """The folder of the pools that were renewed at an outer step; names sort by it."""
    return f"step-{outer_step:06d}"


def count_pool_trainings(recipe: MetaTrainRecipe, first_pools: list[Pool], outer_steps: int) -> float:
    """What the pools cost up to an outer step, renewals too, in units of one whole training."""
    drawn_from = min(outer_steps, alternation_start(recipe.meta))
    renewals = max(drawn_from - 1, 0) // recipe.pool.refresh_every if recipe.pool.sampling == "live" else 0
    renewed = renewals * recipe.pool.students * recipe.pool.max_age * len(first_pools)
    return sum(pool.trainings for pool in first_pools) + renewed


def list_folders(recipe: MetaTrainRecipe, folder: Path) -> list[Path]:
    """Where each architecture's pool is: the folder itself if there is one architecture, else numbered ones in it."""
    count = len(list_students(recipe))
    return [folder] if count == 1 else [folder / str(number) for number in range(count)]
