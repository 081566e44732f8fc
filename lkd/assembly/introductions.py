"""What a run says of its networks before it starts."""

from pathlib import Path

import torch

from lkd.assembly.images import Images
from lkd.assembly.networks import open_teacher, prepare_student
from lkd.cached_teacher import read_cache
from lkd.config import ModelRecipe, TeacherRecipe
from lkd.evaluation import evaluate
from lkd.models import describe
from lkd.models.describe import format_description


def introduce_teacher(recipe: TeacherRecipe, images: Images, device: torch.device) -> str:
    """Say which teacher this is, with its accuracy on meta-validation; if it is cached, by what the cache says.

    Raises:
        UserError: If its file is not good or it does not fit the images.
    """
    if recipe.cache:
        return f"{read_cache(Path(recipe.cache)).header['teacher']} when its answers were cached in {recipe.cache}"
    network, architecture = open_teacher(recipe, images.train)
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
