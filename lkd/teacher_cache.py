"""Which trainings a teacher cache is for: the same teacher, the same look of the same images, a loss over logits."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lkd.cached_teacher import CachedTeacher, CacheFolder, read_cache
from lkd.checkpoint import digest
from lkd.config import DataRecipe, TeacherRecipe
from lkd.data import ImageSet
from lkd.data.image_files import ImageFiles
from lkd.data.packed import PackedSource, hash_names
from lkd.errors import UserError
from lkd.resumption import flatten

# Fields that change neither what the teacher is nor how an image of some index and augmentation seed looks.
OF_NO_EFFECT = {
    *("path", "name", "pretrained", "cache"),
    *("root", "train_size", "meta_validation_size", "split_seed", "label_noise", "augmentation_seeds"),
    *("repeats", "mixup", "cutmix", "workers", "damaged_limit", "read_timeout", "packed"),
}


def identify(
    network: nn.Module, architecture: dict[str, Any], recipe: TeacherRecipe, data: DataRecipe, images: ImageSet
) -> dict[str, Any]:
    """All that decides a teacher's answer to an image of some index and augmentation seed, as JSON."""
    taught_by, look = (
        {key: value for key, value in dataclasses.asdict(part).items() if key not in OF_NO_EFFECT}
        for part in (recipe, data)
    )
    taught_by |= {
        "network": architecture["name"],
        "weights": digest(dict([*network.named_parameters(), *network.named_buffers()])),
    }
    if recipe.random_answers:
        taught_by["seed"] = data.split_seed
    look |= {"name": data.name, "shape": images.image_shape, "mean": images.mean, "std": images.std}
    if isinstance(images.images, ImageFiles):
        source = images.images.source
        look |= {"files": hash_names(source)}
        look |= {"packed": digest(source.shapes) if isinstance(source, PackedSource) else None}
    return json.loads(json.dumps({"teacher": taught_by, "data": look}))


def check_made_with(cache: CacheFolder, made_with: dict[str, Any]) -> None:
    """Check that a cache holds the answers of this teacher to these images.

    Raises:
        UserError: If it was made with something else; names it.
    """
    before, now = flatten(cache.header["made_with"]), flatten(made_with)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise UserError(
                f"teacher.cache: {cache.folder} was made with {key} {before.get(key)!r}, not with {now.get(key)!r}: "
                "take the same, or make another cache in another folder"
            )


def choose_seeds(data: DataRecipe) -> range:
    """The augmentation seeds that a recipe's batches have.

    Raises:
        UserError: If they have no end, or images are mixed, which no augmentation seed says.
    """
    if data.mixup or data.cutmix:
        raise UserError(
            f"data.mixup, data.cutmix: {data.mixup}, {data.cutmix}; a teacher cache holds no answers to mixed images: "
            "set both to 0, or leave teacher.cache out"
        )
    if data.augmentation == "none":
        return range(1)
    if data.augmentation_seeds < 1:
        raise UserError(
            f"data.augmentation_seeds: {data.augmentation_seeds} takes a new augmentation in every epoch, which no "
            "cache holds: give N, at least 1, for epochs that cycle over N augmentations"
        )
    return range(1, data.augmentation_seeds + 1)


def check_stages(stages: tuple[str, ...]) -> None:
    """Check that a loss can do with a cache.

    Raises:
        UserError: If it reads the teacher's features.
    """
    if stages:
        raise UserError(
            f"teacher.cache: holds logits alone, but the loss reads the teacher's features ({', '.join(stages)}): "
            "leave it out, or take a loss over logits"
        )


def open_cache(
    folder: Path, made_with: dict[str, Any], data: DataRecipe, images: ImageSet, device: torch.device
) -> CachedTeacher:
    """Open a cache for training on these images.

    Raises:
        UserError: If there is none, it was made with something else, or it lacks images or augmentation seeds.
    """
    seeds, cache = choose_seeds(data), read_cache(folder)
    check_made_with(cache, made_with)
    lacking = int((~torch.isin(images.index, cache.index)).sum())
    if lacking:
        raise UserError(
            f"teacher.cache: {folder} lacks {lacking:,} of the {len(images):,} training images: take data.train_size, "
            "data.meta_validation_size and data.split_seed that it was made with, or make another cache"
        )
    paths = [cache.path(seed, shard) for seed in seeds for shard in range(cache.shards)]
    missing = sum(not path.is_file() for path in paths)
    if missing:
        raise UserError(
            f"teacher.cache: {folder} lacks {missing:,} of the {len(paths):,} files for data.augmentation_seeds "
            f"{data.augmentation_seeds}: make them with lkd cache, or lower data.augmentation_seeds"
        )
    return CachedTeacher(cache, seeds, device)
