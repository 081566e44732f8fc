"""The parts of a training, of recipes: in short, for tests."""

from dataclasses import replace

import torch
from torch import nn

from lkd.balance.balancing import build_balance
from lkd.config import DataRecipe, MetaTrainRecipe, ModelRecipe, TeacherRecipe, TrainRecipe
from lkd.data.images import ImageSet
from lkd.losses import LearnedLoss
from lkd.models.teacher import TeacherFunction
from lkd.training import answers, build, distill
from lkd.training.build import Images, LossBuilder, choose_student, open_teacher
from lkd.training.training import Training

VIT = ModelRecipe(  # LayerNorm, no BatchNorm: its statistics would be those of a part of a batch
    "vit_tiny_patch16_224", options={"img_size": 28, "patch_size": 7, "embed_dim": 16, "depth": 2, "num_heads": 2}
)


def prepare_teacher(
    recipe: TeacherRecipe,
    data: DataRecipe,
    images: Images,
    device: torch.device,
    stages: tuple[str, ...] = (),
    train: TrainRecipe | None = None,
) -> TeacherFunction:
    """What answers batches of these images, made as `data` says."""
    return answers.prepare_teacher(
        open_teacher(recipe, images.train), replace(images, settings=data), device, stages, train
    )


def prepare_loss(specification, student: ModelRecipe, teacher: TeacherRecipe, images: Images, seed: int) -> nn.Module:
    """A loss for a student and a teacher."""
    losses = LossBuilder(specification, open_teacher(teacher, images.train), images)
    return losses.build(choose_student(student, images.train), seed)


def prepare_learned_loss(recipe: MetaTrainRecipe, images: Images) -> LearnedLoss:
    """The loss networks that a recipe is to learn."""
    teacher = open_teacher(recipe.teacher, images.train)
    meta, students = recipe.meta, [choose_student(model, images.train) for model in recipe.students or [recipe.student]]
    return build.prepare_learned_loss(meta.kind, meta.loss, students, teacher, images, recipe.seed)


def prepare_student(model: ModelRecipe, images: ImageSet, seed: int, device: torch.device) -> nn.Module:
    """A student."""
    return choose_student(model, images).build(seed, device)


def start_training(
    student: ModelRecipe,
    train: ImageSet,
    loss: nn.Module,
    teacher: TeacherFunction | None,
    recipe: TrainRecipe,
    data: DataRecipe,
    seed: int,
    device: torch.device,
    balance=None,
) -> Training:
    """A fresh training on these images."""
    images = Images("", train, train, train, "", data)
    weighed = build_balance(balance, loss)
    return distill.start_training(
        choose_student(student, train), images, loss, teacher, recipe, seed, device, balance=weighed
    )
