"""Tiny meta-trainings."""

from pathlib import Path

from lkd.config import DataRecipe, MetaSettings, MetaTrainRecipe, PoolSettings, TrainRecipe
from lkd.losses import LearnedLoss
from lkd.meta_training.meta_train import meta_train
from lkd.tracking.run import open_run
from lkd.training.build import prepare_images
from tests.lkd.parts import prepare_learned_loss


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


def build_loss_networks(recipe: MetaTrainRecipe) -> LearnedLoss:
    """The loss before any meta-training."""
    return prepare_learned_loss(recipe, prepare_images(recipe.data))
