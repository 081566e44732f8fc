"""Students and teachers, as a recipe has them."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lkd.assembly.images import Images
from lkd.config import DataRecipe, ModelRecipe, TeacherRecipe, TrainRecipe
from lkd.data import ImageSet
from lkd.errors import UserError
from lkd.given import GivenModel, GivenTeacher
from lkd.models import build
from lkd.models.describe import find_stages
from lkd.teacher import TabulatedTeacher, TeacherFunction, load_teacher, name_teacher, wrap_teacher
from lkd.teacher_cache import check_stages, identify, open_cache

TABLE_BYTES = 2**28  # features of a teacher that are kept in memory; larger ones are computed anew for every batch


def architecture_of(model: ModelRecipe, images: ImageSet) -> dict[str, Any]:
    """Keyword arguments of `lkd.models.build` for a model on these images."""
    return {
        "name": model.name,
        "num_classes": images.num_classes,
        "in_chans": images.image_shape[0],
        "pretrained": model.pretrained,
        "options": model.options,
    }


def build_network(model: ModelRecipe, images: ImageSet, untrained: bool = False) -> nn.Module:
    """Build a model for these images, or take a copy of the one that was given.

    Args:
        model: The model.
        images: What it is for.
        untrained: Whether pretrained weights are left out, where only shapes are asked for.

    Raises:
        UserError: If it cannot be built, or does not fit the images.
    """
    if isinstance(model, GivenModel):
        return model.build(images)
    architecture = architecture_of(model, images)
    return build(**architecture | ({"pretrained": False} if untrained else {}))


def prepare_student(model: ModelRecipe, images: ImageSet, seed: int, device: torch.device) -> nn.Module:
    """Build a student whose initial weights are a function of the seed."""
    torch.manual_seed(seed)
    return build_network(model, images).to(device)


def open_teacher(recipe: TeacherRecipe, images: ImageSet) -> tuple[nn.Module, dict[str, Any]]:
    """Load the teacher's network, or take the one that was given, and check that it fits the images.

    Returns:
        The network, in eval mode, and its architecture.

    Raises:
        UserError: If the file is not good, or the teacher does not fit the images.
    """
    if isinstance(recipe, GivenTeacher):
        return recipe.open(images)
    network, architecture = load_teacher(recipe, images)
    check_network(name_teacher(recipe), architecture, images)
    return network, architecture


def prepare_teacher(
    recipe: TeacherRecipe,
    data: DataRecipe,
    images: Images,
    device: torch.device,
    stages: tuple[str, ...] = (),
    train: TrainRecipe | None = None,
) -> TeacherFunction:
    """Load the teacher, or its cache; without both augmentation and cache its answers to all images are computed once.

    Args:
        recipe: The teacher.
        data: The images' recipe.
        images: The images.
        device: Where it runs.
        stages: Stages whose features the loss reads (its `teacher_stages`). They are tabulated too if they take no more
            than `TABLE_BYTES`, else the teacher is asked for every batch.
        train: Whether a teacher that is asked for every batch is compiled, and its layout in memory.

    Raises:
        UserError: If the file is not good, or the teacher does not fit the images; or if the cache was made with
            another teacher or other images, or does not hold what the loss reads.
    """
    network, architecture = open_teacher(recipe, images.train)
    if recipe.cache:
        check_stages(stages)
        made_with = identify(network, architecture, recipe, data, images.train)
        return open_cache(Path(recipe.cache), made_with, data, images.train, device)
    shapes = find_stages(network, images.train.image_shape) if stages else {}
    size = 4 * len(images.train) * sum(math.prod(shapes[stage]) for stage in stages)
    asked_anew = data.augmentation != "none" or bool(data.mixup or data.cutmix) or size > TABLE_BYTES
    teacher = wrap_teacher(network.to(device), recipe, data.split_seed, train if asked_anew else None)
    if asked_anew:
        return teacher
    return TabulatedTeacher(teacher, images.train, device, stages=stages)


def check_network(path: str, architecture: dict[str, Any], images: ImageSet) -> None:
    """Check that a network's file fits the images.

    Raises:
        UserError: If its classes or channels differ from theirs.
    """
    for what, theirs, ours in (
        ("classes", architecture["num_classes"], images.num_classes),
        ("input channels", architecture["in_chans"], images.image_shape[0]),
    ):
        if theirs != ours:
            raise UserError(f"{path}: has {theirs} {what}, the data set and its students have {ours}")
