"""From a recipe to the things that train: images, teacher, student, loss."""

import copy
import dataclasses
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lkd.config.meta_training import MetaTrainRecipe
from lkd.config.parts import DataRecipe, ModelRecipe, TeacherRecipe, TrainRecipe
from lkd.core.errors import UserError
from lkd.core.tensor_files import digest, read_tensors
from lkd.data.batches import Batches
from lkd.data.image_files import ImageFiles, LoadingOptions
from lkd.data.images import Dataset, ImageSet
from lkd.data.readers import load_dataset
from lkd.data.splits import Splits, flip_labels, split_training_images
from lkd.influence.influence import INFLUENCE_WEIGHTED, read_weighted_loss
from lkd.influence.weighted_loss import InfluenceWeightedLoss
from lkd.losses.build import build_loss, find_feature_parts, reads_features
from lkd.losses.learned.loss import LearnedLoss, build_learned_loss
from lkd.losses.loss import DistillationLoss, wrap_loss
from lkd.losses.stages import Stages
from lkd.models.build import GIVEN, adapt_given, build, describe, find_stages, format_description
from lkd.models.files import KIND, VERSION
from lkd.models.teacher import TabulatedTeacher, TeacherFunction, load_teacher, name_teacher, wrap_teacher
from lkd.models.teacher_cache import check_stages, identify, open_cache, read_cache
from lkd.training.evaluate import evaluate

# ----------------------------------------------------------------------------------------------------------------------
# Objects in the place of a recipe's parts: networks, a teacher, images or a loss that the caller has built. Each is a
# part of the recipe whose name holds a hash of the object, so that the config says what a run was made with, and a
# run is not gone on with with something else. What was given is copied, never changed.

HASH_LENGTH = 12


class GivenModel(ModelRecipe):
    """A student that is an object. Its name holds its shapes: its weights are the checkpoint's once there is one.

    Args:
        given: The network, of which every student starts as a copy; or a function that builds it, under a seed of each
            student's own.

    Raises:
        UserError: If it is or builds no network, or one that cannot be copied or saved.
    """

    def __init__(self, given: nn.Module | Callable[[], nn.Module]) -> None:
        self.make = (lambda: copy_module(given, "student")) if isinstance(given, nn.Module) else given
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = self.make()
        if not isinstance(network, nn.Module):
            raise UserError(f"student: the function given builds a {type(network).__name__}, not a torch.nn.Module")
        shapes = [[name, list(tensor.shape)] for name, tensor in list_tensors(network, "student").items()]
        super().__init__(name_object(network, digest([shapes, [type(m).__name__ for m in network.modules()]])))

    def build(self, images: ImageSet) -> nn.Module:
        """A fresh one, returning `Outputs`.

        Raises:
            UserError: If it does not fit the images.
        """
        return adapt_given(self.make(), "student", images.num_classes, images.image_shape)

    def load(self, path: Path) -> nn.Module:
        """The network as it was given, with the weights of a student's file, in eval mode."""
        network = self.make()
        network.load_state_dict(read_tensors(path, KIND, VERSION)[0])
        return network.eval()


class GivenTeacher(TeacherRecipe):
    """A teacher that is an object; it sees images as the student does.

    Raises:
        UserError: If it cannot be copied.
    """

    def __init__(self, given: nn.Module) -> None:
        self.network = copy_module(given, "teacher").eval().requires_grad_(False)
        super().__init__(path=name_object(given, digest(list_tensors(given, "teacher"))))

    def open(self, images: ImageSet) -> tuple[nn.Module, dict[str, Any]]:
        """The network, returning `Outputs`, and its architecture.

        Raises:
            UserError: If it does not fit the images.
        """
        network = adapt_given(self.network, "teacher", images.num_classes, images.image_shape)
        return network, {"name": self.path, "num_classes": images.num_classes, "in_chans": images.image_shape[0]}


class GivenLoss(str):
    """A loss that is an object. Made by `give_loss`."""

    module: nn.Module

    def copy(self) -> DistillationLoss:
        """A loss of its own for each training."""
        return wrap_loss(copy_module(self.module, "loss"))


def give_loss(module: nn.Module) -> GivenLoss:
    """Let a module be a recipe's loss."""
    given = GivenLoss(name_object(module, digest(list_tensors(module, "loss"))))
    given.module = module
    return given


class GivenData(DataRecipe):
    """Images that are objects.

    Args:
        train: What is trained on, and where meta-validation is split off unless it is given.
        meta_validation: What the outer loop and tuning look at.
        fields: The recipe's other fields.
    """

    def __init__(self, train: ImageSet, meta_validation: ImageSet | None, **fields: Any) -> None:
        content = hashlib.blake2b(digest_images(train).encode())
        if meta_validation:
            index = 1 + int(train.index.max()) + torch.arange(len(meta_validation))
            meta_validation = dataclasses.replace(meta_validation, index=index)
            content.update(digest_images(meta_validation).encode())
        super().__init__(name=f"{GIVEN}images@{content.hexdigest()[:HASH_LENGTH]}", **fields)
        self.dataset = Dataset(self.name, train, train.select(torch.arange(0)))
        self.meta_validation = meta_validation

    def split(self) -> Splits:
        """The training and the meta-validation images.

        Raises:
            UserError: If the sizes are impossible.
        """
        train = self.dataset.train
        if self.meta_validation:
            return Splits(train, self.meta_validation, self.name)
        splits = split_training_images(train, self.train_size, self.meta_validation_size, self.split_seed)
        return splits._replace(fingerprint=f"{self.name}/{splits.fingerprint}")


def name_object(module: nn.Module, content: str) -> str:
    """What an object is called in a config."""
    return f"{GIVEN}{type(module).__name__}@{content[:HASH_LENGTH]}"


def copy_module(module: nn.Module, role: str) -> nn.Module:
    """A copy that shares nothing with the module.

    Raises:
        UserError: If it cannot be copied.
    """
    try:
        return copy.deepcopy(module)
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{role}: this {type(module).__name__} cannot be copied: {reason}") from error


def list_tensors(module: nn.Module, role: str) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of a module.

    Raises:
        UserError: If that is not only tensors.
    """
    state = module.state_dict()
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{role}: {name!r} of its state dict is a {type(value).__name__}, not a tensor")
    return dict(state)


def digest_images(images: ImageSet) -> str:
    """A hash of all that trains: pixels (of files, their names), labels, normalisation."""
    pixels: Any = images.images
    if isinstance(pixels, ImageFiles):
        pixels = [pixels.name(slot) for slot in range(len(images))]
    return digest([pixels, images.labels, images.mean, images.std, images.num_classes])


# ----------------------------------------------------------------------------------------------------------------------
# Images and batches, as a recipe has them.


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


# ----------------------------------------------------------------------------------------------------------------------
# Students and teachers, as a recipe has them.

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


# ----------------------------------------------------------------------------------------------------------------------
# What a run says of its networks before it starts.


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


# ----------------------------------------------------------------------------------------------------------------------
# Losses, fitted to the networks that they compare.


def prepare_loss(
    specification: "dict[str, Any] | str", student: ModelRecipe, teacher: TeacherRecipe, images: Images, seed: int
) -> DistillationLoss:
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
