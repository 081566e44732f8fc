"""Losses, fitted to the networks that they compare."""

from typing import Any

import torch
from torch import nn

from lkd.assembly.images import Images
from lkd.assembly.networks import build_network, open_teacher
from lkd.balance.influence_weighted import InfluenceWeightedLoss
from lkd.balance.options import INFLUENCE_WEIGHTED, read_weighted_loss
from lkd.config import MetaTrainRecipe, ModelRecipe, TeacherRecipe
from lkd.errors import UserError
from lkd.given import GivenLoss
from lkd.losses.build import build_loss, find_feature_parts, reads_features
from lkd.losses.learned import LearnedLoss, build_learned_loss
from lkd.losses.stages import Stages
from lkd.models.describe import find_stages


def prepare_loss(
    specification: "dict[str, Any] | str", student: ModelRecipe, teacher: TeacherRecipe, images: Images, seed: int
) -> nn.Module:
    """Build a loss for a student and a teacher; a loss over features finds their shapes by a dry run of each.

    Args:
        specification: What `build_loss` takes; or {name: influence_weighted, loss: ..., ...}; or a `GivenLoss`.
        student: The student.
        teacher: The teacher.
        images: The images.
        seed: Of the initial weights of the loss's adapters.

    Raises:
        UserError: If the loss, or one of the networks, is not good.
    """
    if isinstance(specification, GivenLoss):
        return specification.copy()
    if isinstance(specification, dict) and specification.get("name") == INFLUENCE_WEIGHTED:
        settings = read_weighted_loss(specification)
        inner = prepare_loss(settings.loss, student, teacher, images, seed)
        own = open_trained_teacher(teacher, images) if settings.teacher_rate else None
        return InfluenceWeightedLoss(inner, images.meta_validation, settings, own)
    if not reads_features(specification):
        return build_loss(specification)
    stages = prepare_stages(student, teacher, images)
    torch.manual_seed(seed)
    return build_loss(specification, *stages)


def open_trained_teacher(teacher: TeacherRecipe, images: Images) -> nn.Module:
    """The network of a teacher that is trained along with the student.

    Raises:
        UserError: If the recipe does not have a plain network.
    """
    if teacher.cache or teacher.random_answers:
        raise UserError(
            "loss 'influence_weighted': teacher_rate trains the teacher: leave teacher.cache and random_answers"
        )
    return open_teacher(teacher, images.train)[0]


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
    network = build_network(student, images.train, untrained=True)
    return find_stages(network, shape), find_stages(open_teacher(teacher, images.train)[0], shape)


def read_teacher_stages(loss: nn.Module) -> tuple[str, ...]:
    """The teacher's stages whose features a loss reads."""
    return getattr(loss, "teacher_stages", ())
