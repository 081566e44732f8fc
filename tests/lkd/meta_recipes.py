"""Tiny meta-trainings."""

from pathlib import Path

import torch

from lkd.config import DataRecipe, MetaSettings, MetaTrainRecipe, PoolSettings, TrainRecipe
from lkd.core.files import read_json
from lkd.losses import LearnedLoss
from lkd.meta_training.meta_train import meta_train
from lkd.meta_training.outer_loop import OuterLoop
from lkd.pool.pool import INDEX, Pool, World, build_pool
from lkd.tracking.run import Run, open_run
from lkd.training.build import Images, LossBuilder, choose_student, open_teacher, prepare_images
from tests.lkd.parts import prepare_learned_loss, prepare_teacher

CPU = torch.device("cpu")
SMALL = {"max_age": 0.5, "snapshots": 2, "students": 1}
YOUNG = {"max_age": 0.0, "snapshots": 1, "students": 1}


def tiny_recipe(pool: dict | None = None, run_dir: str = "run", **meta) -> MetaTrainRecipe:
    """Trainings of 20 steps; rollouts of 3."""
    settings = {"outer_steps": 3, "students_per_step": 2, "rollout_steps": 3, "rollout_epochs": 1}
    settings |= {"outer_batch_size": 50, "reuse_every": 0, "reuse_students": 1, "reuse_epochs": 1} | meta
    return MetaTrainRecipe(
        run_dir=run_dir,
        data=DataRecipe(train_size=200, meta_validation_size=100),
        train=TrainRecipe(epochs=2, batch_size=20),
        pool=PoolSettings(**{"students": 2, "snapshots": 3, "max_age": 1.0} | (pool or {})),
        meta=MetaSettings(**settings),
    )


def run_recipe(recipe: MetaTrainRecipe, quiet: bool = True) -> Path:
    """Meta-train; the learned-loss file."""
    with open_run(recipe, "meta-train", quiet=quiet) as run:
        return meta_train(recipe, run)


def open_world(recipe: MetaTrainRecipe, images: Images | None = None) -> World:
    """What a recipe's students are trained in."""
    images = images or prepare_images(recipe.data)
    teacher = prepare_teacher(recipe.teacher, recipe.data, images, CPU)
    return World(images, teacher, choose_student(recipe.student, images.train), recipe.train, recipe.seed, CPU)


def make_pool(recipe: MetaTrainRecipe, world: World, folder: Path, run: Run) -> Pool:
    """The pool of a recipe."""
    losses = LossBuilder(recipe.pool.loss, open_teacher(recipe.teacher, world.images.train), world.images)
    return build_pool(world, recipe.pool, losses.build, folder, run)


def load_pool(folder: Path) -> Pool:
    """A pool that is there."""
    return Pool(folder, read_json(folder / INDEX))


def make_loop(recipe: MetaTrainRecipe, world: World, *pools: Pool) -> OuterLoop:
    """The outer loop before its first step."""
    loss = prepare_learned_loss(recipe, world.images)
    return OuterLoop([world], list(pools), loss, recipe.meta, recipe.pool)


def build_loss_networks(recipe: MetaTrainRecipe) -> LearnedLoss:
    """The loss before any meta-training."""
    return prepare_learned_loss(recipe, prepare_images(recipe.data))
