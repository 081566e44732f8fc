"""From a recipe to the things that train: images, teacher, student.

Everything that can be wrong is found here, before any long work.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lkd.balance.influence_weighted import InfluenceWeightedLoss
from lkd.balance.options import INFLUENCE_WEIGHTED, read_weighted_loss
from lkd.cached_teacher import read_cache
from lkd.config import DataRecipe, MetaTrainRecipe, ModelRecipe, TeacherRecipe, TrainRecipe
from lkd.data import Batches, ImageSet, LoadingOptions, flip_labels, load_dataset, split_training_images
from lkd.errors import UserError
from lkd.evaluation import evaluate
from lkd.losses.build import build_loss, find_feature_parts, reads_features
from lkd.losses.learned import LearnedLoss, build_learned_loss
from lkd.losses.stages import Stages
from lkd.models import build, describe
from lkd.models.describe import find_stages, format_description
from lkd.teacher import TabulatedTeacher, TeacherFunction, load_teacher, name_teacher, wrap_teacher
from lkd.teacher_cache import check_stages, identify, open_cache

TABLE_BYTES = 2**28  # features of a teacher that are kept in memory; larger ones are computed anew for every batch


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
    loading = LoadingOptions(recipe.image_size, recipe.workers, recipe.damaged_limit, recipe.packed)
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


def architecture_of(model: ModelRecipe, images: ImageSet) -> dict[str, Any]:
    """Keyword arguments of `lkd.models.build` for a model on these images."""
    return {
        "name": model.name,
        "num_classes": images.num_classes,
        "in_chans": images.image_shape[0],
        "pretrained": model.pretrained,
        "options": model.options,
    }


def prepare_student(model: ModelRecipe, images: ImageSet, seed: int, device: torch.device) -> nn.Module:
    """Build a student whose initial weights are a function of the seed."""
    torch.manual_seed(seed)
    return build(**architecture_of(model, images)).to(device)


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
    network, architecture = load_teacher(recipe, images.train)
    check_network(name_teacher(recipe), architecture, images.train)
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


def prepare_loss(
    specification: "dict[str, Any] | str", student: ModelRecipe, teacher: TeacherRecipe, images: Images, seed: int
) -> nn.Module:
    """Build a loss for a student and a teacher; a loss over features finds their shapes by a dry run of each.

    Args:
        specification: What `build_loss` takes; or {name: influence_weighted, loss: ..., ...}.
        student: The student.
        teacher: The teacher.
        images: The images.
        seed: Of the initial weights of the loss's adapters.

    Raises:
        UserError: If the loss, or one of the networks, is not good.
    """
    if isinstance(specification, dict) and specification.get("name") == INFLUENCE_WEIGHTED:
        settings = read_weighted_loss(specification)
        inner = prepare_loss(settings.loss, student, teacher, images, seed)
        return InfluenceWeightedLoss(inner, images.meta_validation, settings)
    if not reads_features(specification):
        return build_loss(specification)
    stages = prepare_stages(student, teacher, images)
    torch.manual_seed(seed)
    return build_loss(specification, *stages)


def prepare_learned_loss(recipe: MetaTrainRecipe, images: Images) -> LearnedLoss:
    """Build the loss networks that a recipe is to learn; their initial weights are a function of its seed.

    Features of several architectures are read from whichever student the loss meets.

    Raises:
        UserError: If `meta.kind` or `meta.loss`, or one of the networks, is not good.
    """
    settings, seed = recipe.meta, recipe.seed
    if settings.kind == "logits":
        torch.manual_seed(seed)
        return build_learned_loss(settings.kind, settings.loss)
    for model in recipe.students or [recipe.student]:
        stages = prepare_stages(model, recipe.teacher, images)
        torch.manual_seed(seed)
        loss = build_learned_loss(settings.kind, settings.loss, *stages)
    if len(recipe.students) > 1:
        for part in find_feature_parts(loss):
            part.free_student()
    return loss


def prepare_stages(student: ModelRecipe, teacher: TeacherRecipe, images: Images) -> tuple[Stages, Stages]:
    """Shapes of the student's and the teacher's features, by a dry run of each.

    Raises:
        UserError: If one of the networks is not good.
    """
    shape = images.train.image_shape
    network = build(**architecture_of(dataclasses.replace(student, pretrained=False), images.train))
    taught_by, architecture = load_teacher(teacher, images.train)
    check_network(name_teacher(teacher), architecture, images.train)
    return find_stages(network, shape), find_stages(taught_by, shape)


def read_teacher_stages(loss: nn.Module) -> tuple[str, ...]:
    """The teacher's stages whose features a loss reads."""
    return getattr(loss, "teacher_stages", ())


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


def introduce_teacher(recipe: TeacherRecipe, images: Images, device: torch.device) -> str:
    """Say which teacher this is, with its accuracy on meta-validation; if it is cached, by what the cache says.

    Raises:
        UserError: If its file is not good or it does not fit the images.
    """
    if recipe.cache:
        return f"{read_cache(Path(recipe.cache)).header['teacher']} when its answers were cached in {recipe.cache}"
    network, architecture = load_teacher(recipe, images.train)
    check_network(name_teacher(recipe), architecture, images.train)
    described = describe(network, architecture["name"], images.train.image_shape, recipe.pretrained)
    top1 = evaluate(network.to(device), images.meta_validation, device, shared=True)["top1"]
    random = f", but answers at random on {recipe.random_answers:.0%} of the images" if recipe.random_answers else ""
    return f"{format_description('teacher', described)}, {top1:.2f} % on meta-validation{random}"


def introduce_network(role: str, model: ModelRecipe, images: Images, device: torch.device) -> str:
    """Say which network this is that will be trained.

    Raises:
        UserError: If it cannot be built.
    """
    network = prepare_student(model, images.train, 0, device)
    return format_description(role, describe(network, model.name, images.train.image_shape, model.pretrained))
