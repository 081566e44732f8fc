"""A checkpoint of meta-training, small, and its reader: the meta-training goes on from it, to its end."""

import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.hostile_input.read_tensors import CPU
from lkd.config import DataRecipe, MetaSettings, MetaTrainRecipe, ModelRecipe, PoolSettings, TeacherRecipe, TrainRecipe
from lkd.core.errors import UserError
from lkd.meta_training.log import describe_reuse
from lkd.meta_training.meta_train import learn
from lkd.meta_training.online_student import assemble_loss
from lkd.meta_training.outer_loop import OuterLoop
from lkd.meta_training.reuse import Reuse
from lkd.pool.pool import build_pools
from lkd.tracking.run import Run
from lkd.tracking.tracker import Tracker
from lkd.training.build import (
    LossBuilder,
    choose_student,
    open_teacher,
    prepare_images,
    prepare_learned_loss,
    prepare_teacher,
)

STEPS = 2


class SilentRun(Run):
    """A run that prints nothing, and ends where a damaged first checkpoint would have it begin anew."""

    def say(self, *lines: str) -> None:
        """Note what would be printed."""
        if "begun anew" in lines[0]:
            raise UserError(lines[0])


def open_silent_run(folder: Path) -> Run:
    """A run in an empty folder."""
    return SilentRun(folder, CPU, Tracker(folder, None, {}), "meta-train", quiet=True)


@cache
def prepare() -> tuple[MetaTrainRecipe, Any, Any, Any]:
    """Recipe, images, teacher and pools; made once."""
    recipe = MetaTrainRecipe(
        data=DataRecipe(train_size=60, meta_validation_size=60),
        teacher=TeacherRecipe(path="random", name="tiny_cnn"),
        student=ModelRecipe("tiny_cnn"),
        train=TrainRecipe(epochs=1, batch_size=20),
        pool=PoolSettings(students=1, snapshots=2, max_age=1.0),
        meta=MetaSettings(
            outer_steps=STEPS, students_per_step=1, rollout_steps=1, rollout_epochs=1, outer_batch_size=30,
            reuse_every=STEPS, reuse_students=1, reuse_epochs=1, estimator="first_order", checkpoint_every=1,
        ),
    )  # fmt: skip
    images = prepare_images(recipe.data)
    students = [choose_student(recipe.student, images.train)]
    opened = open_teacher(recipe.teacher, images.train)
    teacher, losses = prepare_teacher(opened, images, CPU), LossBuilder(recipe.pool.loss, opened, images)
    with tempfile.TemporaryDirectory() as folder:
        run = open_silent_run(Path(folder))
        pools = build_pools(recipe, Path(folder) / "pool", images, students, teacher, losses, run)
        for pool in pools:
            students = {number: pool.read(number, CPU) for number in range(len(pool))}
            object.__setattr__(pool, "read", lambda number, device, students=students: students[number])
    return recipe, images, students, opened, teacher, pools


def go_on(folder: Path) -> None:
    """Go on with a meta-training from the newest checkpoint in a folder, to its end."""
    recipe, images, students, opened, teacher, pools = prepare()
    run = open_silent_run(folder)
    loss = prepare_learned_loss(recipe.meta.kind, recipe.meta.loss, students, opened, images, recipe.seed)
    loop = OuterLoop(recipe, images, students, teacher, loss, pools, CPU)
    reuse = Reuse(recipe, students, images, teacher, run)
    try:
        learn(recipe, loop, reuse, opened, run)
    finally:
        run.tracker.finish()
    assemble_loss(loop.loss, reuse.best or loop.points)
    loop.guard.report()
    describe_reuse(reuse.best_row, loop.step, images.train.num_classes)


def write_meta_checkpoint(folder: Path) -> None:
    """The checkpoint after the first outer step."""
    with tempfile.TemporaryDirectory() as work:
        go_on(Path(work))
        name = "000000001.safetensors"
        (folder / "checkpoints").mkdir(parents=True)
        shutil.copy(Path(work) / "checkpoints" / name, folder / "checkpoints" / name)


def read_meta_checkpoint(path: Path) -> None:
    """Go on from a checkpoint."""
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "checkpoints").mkdir()
        shutil.copy(path, Path(work) / "checkpoints" / path.name)
        go_on(Path(work))
