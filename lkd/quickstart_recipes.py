"""The recipes of the quickstart: three settings, one recipe; the balance that suits one of them fails in another.

Clean labels; 40 % of the training labels flipped; clean labels with a teacher that answers at random on 60 % of the
images.
"""

import dataclasses
from pathlib import Path
from typing import Any

from lkd.artifact import SUFFIX
from lkd.config import (
    CompareRecipe,
    DataRecipe,
    MetaSettings,
    MetaTrainRecipe,
    ModelRecipe,
    PoolSettings,
    QuickstartRecipe,
    TeacherRecipe,
    TrainRecipe,
)

SETTINGS: dict[str, dict[str, float]] = {
    "clean": {},
    "noisy": {"label_noise": 0.4},
    "bad_teacher": {"random_answers": 0.6},
}
SEEN, UNSEEN = ModelRecipe("small_cnn"), ModelRecipe("small_mobilenet")
LEARNING_RATE = 0.2  # of all losses here: better for each of them than 0.1
GRID = {"weight": [0.2, 0.5, 0.8, 1.0], "temperature": [1.0, 2.0, 4.0, 8.0]}


def meta_recipe(recipe: QuickstartRecipe, setting: str, folder: Path) -> MetaTrainRecipe:
    """The recipe of one setting's meta-training: the defaults, but for the setting itself and the short form."""
    learned = MetaTrainRecipe(
        run_dir=str(setting_folder(folder, setting) / "meta-train"),
        resume="auto",
        seed=recipe.seed,
        device=recipe.device,
        wandb=dataclasses.replace(recipe.wandb, name=f"{Path(recipe.run_dir).name}-{setting}"),
        student=SEEN,
        train=TrainRecipe(learning_rate=LEARNING_RATE),
    )
    if recipe.short:
        learned.train.epochs = 2
        learned.pool = PoolSettings(students=1, snapshots=2)
        learned.meta = MetaSettings(
            outer_steps=2, students_per_step=1, rollout_steps=4, outer_batch_size=200, reuse_every=0
        )
    return place_setting(learned, recipe, setting)


def compare_recipe(recipe: QuickstartRecipe, setting: str, folder: Path) -> CompareRecipe:
    """The recipe of one setting's comparison."""
    grid = {"weight": [0.5, 1.0], "temperature": [4.0]} if recipe.short else GRID
    compared = CompareRecipe(
        run_dir=str(setting_folder(folder, setting)),
        seed=recipe.seed,
        device=recipe.device,
        methods={
            "CE": {"name": "cross_entropy"},
            "KD": {"name": "kd", "grid": grid},
            "learned": str(loss_path(folder, setting)),
        },
        students=[SEEN, UNSEEN],
        train=TrainRecipe(learning_rate=LEARNING_RATE),
        seeds=recipe.seeds,
        evaluate_every=4,
    )
    if recipe.short:
        compared.train.epochs = 2
    return place_setting(compared, recipe, setting)


def place_setting(placed: "MetaTrainRecipe | CompareRecipe", recipe: QuickstartRecipe, setting: str) -> Any:
    """Put a setting's labels and teacher into a recipe."""
    size = 640 if recipe.short else 4000
    values = SETTINGS[setting]
    placed.data = DataRecipe(train_size=size, meta_validation_size=size, label_noise=values.get("label_noise", 0.0))
    placed.teacher = TeacherRecipe(random_answers=values.get("random_answers", 0.0))
    return placed


def setting_folder(folder: Path, setting: str) -> Path:
    """Where a setting's files go."""
    return folder / setting


def loss_path(folder: Path, setting: str) -> Path:
    """A setting's learned-loss file."""
    return setting_folder(folder, setting) / "meta-train" / f"loss{SUFFIX}"
