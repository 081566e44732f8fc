"""Images and batches, as a recipe has them."""

from dataclasses import dataclass

import torch

from lkd.config import DataRecipe, TrainRecipe
from lkd.data import Batches, ImageSet, LoadingOptions, flip_labels, load_dataset, split_training_images
from lkd.given import GivenData


@dataclass(frozen=True)
class Images:
    """The three parts of a data set, and a fingerprint of the split."""

    name: str
    train: ImageSet
    meta_validation: ImageSet
    test: ImageSet
    fingerprint: str


def prepare_images(recipe: DataRecipe) -> Images:
    """Load, split, and flip labels of the training part if the recipe says so.

    Raises:
        UserError: If the data set or the sizes are not good.
    """
    if isinstance(recipe, GivenData):
        dataset, splits = recipe.dataset, recipe.split()
    else:
        loading = LoadingOptions(
            recipe.image_size, recipe.workers, recipe.damaged_limit, recipe.packed, recipe.read_timeout
        )
        dataset = load_dataset(recipe.name, recipe.root, loading)
        splits = split_training_images(dataset.train, recipe.train_size, recipe.meta_validation_size, recipe.split_seed)
    labels = flip_labels(splits.train.labels, recipe.label_noise, dataset.train.num_classes, recipe.split_seed)
    return Images(dataset.name, splits.train.relabel(labels), splits.meta_validation, dataset.test, splits.fingerprint)


def build_batches(
    images: ImageSet,
    train: TrainRecipe,
    data: DataRecipe,
    seed: int,
    device: torch.device,
    part: tuple[int, int] = (0, 1),
    steps: int | None = None,
) -> Batches:
    """Training batches of these images, as the recipes have it; see `Batches`.

    Raises:
        UserError: If the recipes do not fit the images.
    """
    return Batches(
        images,
        train.batch_size,
        seed,
        data.augmentation,
        device,
        part,
        data.augmentation_seeds,
        data.repeats,
        data.mixup,
        data.cutmix,
        steps,
    )
