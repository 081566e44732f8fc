"""From a recipe to the objects that train, in one place: images, teacher, student, loss. Each file is opened once."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, is_lazy

from lkd.balance.balancing import Balancing, build_balance
from lkd.config.parse import make_recipe
from lkd.config.parts import DataRecipe, ModelRecipe, TeacherRecipe, TrainRecipe
from lkd.config.training import DistillRecipe, InfluenceWeightedLossSettings
from lkd.core.errors import UserError, first_line
from lkd.data.batches import Batches
from lkd.data.image_files import LoadingOptions
from lkd.data.images import Dataset, ImageSet
from lkd.data.label_noise import add_label_noise
from lkd.data.readers import FashionMNIST, apply_class_map, load_dataset
from lkd.data.splits import choose_meta_validation_size, split_training_images
from lkd.influence.influence import INFLUENCE_WEIGHTED
from lkd.influence.weighted_loss import InfluenceWeightedLoss
from lkd.losses.build import attach_features, build_loss, find_feature_parts, is_learned, reads_features
from lkd.losses.functions import Stages
from lkd.losses.learned.file import NOT_LEARNED, LossFile, was_learned
from lkd.losses.learned.loss import LearnedLoss, build_learned_loss
from lkd.losses.loss import DistillationLoss, wrap_loss
from lkd.models.build import (
    GIVEN,
    adapt_given,
    adapt_input,
    adapt_pretrained,
    find_stages,
    plain_state_dict,
    try_black_image,
    unwrap,
)
from lkd.models.build import build as build_network
from lkd.models.dry_run import fit_image_size
from lkd.models.files import load_network
from lkd.models.stages import find_head, freeze_stages, is_within
from lkd.models.teacher import load_teacher, take_classes
from lkd.tracking.remote import fetch_named
from lkd.training.optimizer import check_names

Copied = TypeVar("Copied")
Objects = Mapping[str, Any]
"""What a caller gives in the place of names: by the name that stands for it in the recipe, which holds a hash of it."""
NOTHING: Objects = MappingProxyType({})


@dataclass(frozen=True)
class Images:
    """The three parts of a data set, a fingerprint of the split, and how batches are made of them."""

    name: str
    train: ImageSet
    meta_validation: ImageSet
    test: ImageSet
    fingerprint: str
    settings: DataRecipe = dataclasses.field(default_factory=DataRecipe)


def prepare_images(settings: DataRecipe, given: Objects = NOTHING, scored: bool = True) -> Images:
    """Load, split, and flip labels if the settings say so; never those of the test part.

    `scored`: whether meta-validation is needed; else there may be no images of it.
    """
    if scored and settings.meta_validation_size == 0:
        raise UserError(
            "data.meta_validation_size: 0 leaves nothing to evaluate on, which only lkd distill and lkd teacher "
            "can do without: give at least 1"
        )
    whole, meta_validation = given.get(settings.name, (None, None))
    if whole:
        dataset = Dataset(settings.name, whole, whole.select(torch.arange(0)))
    else:
        loading = LoadingOptions(
            *(settings.image_size, settings.workers, settings.damaged_limit, settings.packed, settings.read_timeout),
            settings.crop_pct,
        )
        dataset = load_dataset(settings.name, settings.root, loading)
        if settings.class_map:
            dataset = apply_class_map(dataset, Path(settings.class_map))
    if settings.meta_validation_size is None:
        settings = replace(settings, meta_validation_size=choose_meta_validation_size(len(dataset.train)))
    if meta_validation and settings.imbalance == 1:
        train, fingerprint = dataset.train, settings.name
    else:
        size = 0 if meta_validation else settings.meta_validation_size or 0
        train, split_off, fingerprint = split_training_images(
            dataset.train, settings.train_size, size, settings.split_seed, settings.imbalance
        )
        meta_validation = meta_validation or split_off
        fingerprint = f"{settings.name}/{fingerprint}" if whole else fingerprint
    noise = settings.label_noise_kind, (settings.label_noise, settings.meta_validation_noise), settings.split_seed
    train, meta_validation = add_label_noise(train, meta_validation, *noise)
    train, meta_validation, test = (
        replace(part, at_once=settings.evaluation_batch_size) for part in (train, meta_validation, dataset.test)
    )
    return Images(dataset.name, train, meta_validation, test, fingerprint, settings)


def build_batches(
    images: ImageSet,
    train: TrainRecipe,
    data: DataRecipe,
    seed: int,
    device: torch.device,
    part: tuple[int, int] = (0, 1),
    steps: int | None = None,
) -> Batches:
    """Training batches of these images, as the settings have it; see `Batches`."""
    looks = data.augmentation_seeds, data.repeats, data.mixup, data.cutmix, data.random_erasing, train.label_smoothing
    return Batches(images, train.batch_size, seed, data.augmentation, device, part, *looks, steps)


@dataclass(frozen=True)
class StudentBuilder:
    """Builds students of one kind.

    Attributes:
        architecture: Keyword arguments of `lkd.models.build`; the name of a caller's own network holds a hash.
        make: Builds a network that returns `Outputs`.
        started: Which weights it starts from, in words; "" for random ones.
    """

    architecture: dict[str, Any]
    make: Callable[[], nn.Module]
    started: str = ""

    @property
    def name(self) -> str:
        return str(self.architecture["name"])

    def build(self, seed: int, device: torch.device) -> nn.Module:
        """A student whose initial weights are a function of the seed."""
        torch.manual_seed(seed)
        return self.make().to(device)

    def find_stages(self, image_shape: tuple[int, int, int]) -> Stages:
        """Shapes of its features, by a dry run, for which pretrained weights are not fetched."""
        make = self.make
        if self.architecture["pretrained"]:
            make = partial(build_network, **self.architecture | {"pretrained": False})
        return find_stages(make(), image_shape)


def choose_student(model: ModelRecipe, images: ImageSet, given: Objects = NOTHING) -> StudentBuilder:
    """What builds a student for these images: of a name, or copies of a caller's own."""
    architecture: dict[str, Any] = {
        "name": model.name,
        "num_classes": images.num_classes,
        "in_chans": images.image_shape[0],
        "pretrained": model.pretrained,
        "options": model.options,
    }
    if model.new_head and not model.path:
        raise UserError("student.new_head: is of the classifier in student.path, and there is none; leave it out")
    if model.name in given:
        own, classes, shape = given[model.name], images.num_classes, images.image_shape
        builder = StudentBuilder(architecture, lambda: adapt_given(own(), "student", classes, shape))
    elif model.path:
        builder = start_from_file(model, architecture, images)
    else:
        architecture["options"] = fit_image_size(model.name, model.options, images.image_shape)
        plain = partial(build_network, **architecture)
        make = (lambda: adapt_pretrained(plain(), images)) if model.pretrained else plain
        builder = StudentBuilder(architecture, make)
    return freeze_built(model, builder)


def freeze_built(model: ModelRecipe, builder: StudentBuilder) -> StudentBuilder:
    """The builder, of students whose stages that the recipe names are frozen."""
    if not model.freeze:
        return builder
    if not builder.name.startswith(GIVEN):
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            freeze_stages(build_network(**builder.architecture | {"pretrained": False}), model.freeze)
    said = f"{builder.started}, frozen: {', '.join(model.freeze)}"
    return replace(builder, make=lambda: freeze_stages(builder.make(), model.freeze), started=said)


def start_from_file(model: ModelRecipe, architecture: dict[str, Any], images: ImageSet) -> StudentBuilder:
    """What builds students that start from the weights in `model.path`."""
    if model.pretrained:
        raise UserError(f"student.path: {model.path} and student.pretrained exclude each other: give one")
    path = Path(str(model.path))
    saved, header = load_network(path, model.name, model.options)
    architecture |= {key: header["architecture"].get(key) or architecture[key] for key in ("name", "options")}
    start, given, own = plain_state_dict(saved), (images.mean, images.std), header.get("input")
    wanted = (tuple(own["mean"]), tuple(own["std"])) if own and len(own["mean"]) == len(images.mean) else given

    def make() -> nn.Module:
        network = build_network(**architecture)
        fresh = plain_state_dict(network)
        fitting = {key: tensor for key, tensor in start.items() if key not in anew}
        unwrap(network).load_state_dict(fresh | fitting)
        return adapt_input(network, images, wanted)

    plain = build_network(**architecture)
    shapes, head = {key: tensor.shape for key, tensor in plain_state_dict(plain).items()}, find_head(plain)
    others = [key for key in start if model.new_head and is_within(key, head)]
    if model.new_head and not others:
        raise UserError(f"student.new_head: {architecture['name']} has no classifier that is known; leave it out")
    anew = [key for key, tensor in start.items() if shapes[key] != tensor.shape or key in others]
    taken = f" ({header['taken']}*)" if header.get("taken") else ""
    said = f", starts from {path}{taken}" + (f", anew: {', '.join(anew)}" if anew else "")
    return StudentBuilder(architecture, make, said)


@dataclass(frozen=True)
class OpenedTeacher:
    """A teacher whose file has been read.

    Attributes:
        network: In eval mode.
        architecture: Its `name`, `num_classes` and `in_chans`.
        settings: How it is asked.
    """

    network: nn.Module
    architecture: dict[str, Any]
    settings: TeacherRecipe

    def check_classes(self, images: ImageSet) -> None:
        """Check that the teacher knows the images' classes: for a loss that reads its logits."""
        if self.architecture["num_classes"] != images.num_classes:
            raise UserError(
                f"{self.title}: has {self.architecture['num_classes']} classes, the data set and its students have "
                f"{images.num_classes}: name those of the data by teacher.classes, as in 1-1000, or take a loss over "
                "features alone"
            )

    @property
    def title(self) -> str:
        settings = self.settings
        if settings.path.startswith(GIVEN):
            return "teacher"
        return str(settings.name) if settings.pretrained or settings.path == "random" else settings.path

    def find_stages(self, image_shape: tuple[int, int, int]) -> Stages:
        return find_stages(self.network, image_shape)


def open_teacher(settings: TeacherRecipe, images: ImageSet, given: Objects = NOTHING) -> OpenedTeacher:
    """Read the teacher's file, or take the network that was given, and check that it fits the images.

    Its classes are another matter: losses over features alone do not read them (see `OpenedTeacher.check_classes`).
    """
    if settings.path in given:
        network = adapt_given(given[settings.path], "teacher", None, images.image_shape)
        num_classes = try_black_image(network, "teacher", images.image_shape).logits.shape[1]
        architecture: dict[str, Any] = {
            "name": settings.path,
            "num_classes": num_classes,
            "in_chans": images.image_shape[0],
        }
    else:
        if settings.path == "embedded" and not settings.pretrained:
            check_embedded(images)
        network, architecture = load_teacher(
            images, settings.path, settings.name, settings.pretrained, settings.options, settings.image_size
        )
    if settings.classes is not None:
        network = take_classes(network, architecture["num_classes"], settings.classes)
        architecture = architecture | {"num_classes": len(network.columns)}
    opened = OpenedTeacher(network, architecture, settings)
    check_network(opened.title, architecture | {"num_classes": images.num_classes}, images)
    return opened


def check_embedded(images: ImageSet) -> None:
    """Check that images may be those of the teacher that the package carries, which is taken where none is named."""
    shape, names = (images.num_classes, images.image_shape[0]), images.class_names
    if shape != (10, 1) or not (names == tuple(FashionMNIST.classes) or all(map(str.isdigit, names))):
        raise UserError(
            f"teacher.path: missing; embedded, the default, knows the 10 classes of Fashion-MNIST, the data set has "
            f"{images.num_classes}, as {names[0]!r}, and {images.image_shape[0]} channels: give the file of a teacher, "
            "or train without one by lkd teacher"
        )


def check_network(path: str, architecture: dict[str, Any], images: ImageSet) -> None:
    """Check that a network's file fits the images."""
    for what, theirs, ours in (
        ("classes", architecture["num_classes"], images.num_classes),
        ("input channels", architecture["in_chans"], images.image_shape[0]),
    ):
        if theirs != ours:
            raise UserError(f"{path}: has {theirs} {what}, the data set and its students have {ours}")


Specification = dict[str, Any] | str | Callable[..., Any]
"""What names a loss in a recipe, or the loss itself: a module or a function."""


class LossBuilder:
    """Builds a loss for a student and a seed; the loss's file is read once.

    Args:
        specification: What `lkd.losses.build.build_loss` takes, where a name may be one that lies elsewhere; or
            {name: influence_weighted, loss: ..., ...}; or a module, of which copies are used, or a function.
        teacher: The teacher.
        images: The images.
    """

    def __init__(self, specification: Specification, teacher: OpenedTeacher, images: Images) -> None:
        self.specification, self.teacher, self.images = specification, teacher, images
        self.file: LossFile | None = None
        self.inner: LossBuilder | None = None
        if callable(specification):
            return
        options = dict(specification) if isinstance(specification, dict) else {"name": specification}
        name = options.pop("name", None)
        if name == INFLUENCE_WEIGHTED:
            self.settings = make_recipe(InfluenceWeightedLossSettings, options, f"loss '{name}'")
            self.inner = LossBuilder(self.settings.loss, teacher, images)
        elif isinstance(name, str) and is_learned(here := fetch_named(name)):
            self.file, self.options = LossFile.read(here), options

    @property
    def title(self) -> str:
        """The loss in words, with its options, and whether a file's was learned."""
        given = self.specification
        if callable(given):
            return f"{getattr(given, '__name__', type(given).__name__)}, given from Python"
        options = {"name": given} if isinstance(given, str) else dict(given)
        name = str(options.pop("name", None))
        if self.inner and "loss" in options:
            options["loss"] = f"({self.inner.title})"
        words = " ".join([name, *(f"{key}={value}" for key, value in options.items())])
        if not self.file:
            return words
        return f"{words}, {'learned' if was_learned(self.file.header) else NOT_LEARNED}"

    def build(self, student: StudentBuilder, seed: int) -> DistillationLoss:
        """A loss of its own; shapes of features are found by a dry run of both networks.

        `seed`: of the initial weights of the loss's adapters.
        """
        loss = self.build_any(student, seed)
        if loss.reads_logits:
            self.teacher.check_classes(self.images.train)
        return loss

    def build_any(self, student: StudentBuilder, seed: int) -> DistillationLoss:
        """A loss, whatever it reads of the teacher."""
        if callable(self.specification):
            return wrap_loss(copy_module(self.specification, "loss"))
        if self.inner:
            if self.images.settings.meta_validation_size == 0:
                raise UserError("data.meta_validation_size: 0; influence_weighted measures on it: give at least 1")
            own = self.copy_teacher() if self.settings.teacher_rate else None
            inner = self.inner.build(student, seed)
            return InfluenceWeightedLoss(inner, self.images.meta_validation, self.settings, own)
        reads = find_feature_parts(self.file.build()) if self.file else reads_features(self.specification)
        shape = self.images.train.image_shape
        stages = (student.find_stages(shape), self.teacher.find_stages(shape)) if reads else ()
        torch.manual_seed(seed)
        if self.file:
            return attach_features(self.file.build(), self.file.path, self.options, *stages)
        return build_loss(self.specification, *stages)

    def copy_teacher(self) -> nn.Module:
        """The network of a teacher that is trained along with the student, if it is a plain network."""
        settings = self.teacher.settings
        if settings.cache or settings.random_answers or settings.logit_scale != 1:
            raise UserError(
                "loss 'influence_weighted': teacher_rate trains the teacher: leave teacher.cache, random_answers and "
                "logit_scale"
            )
        return copy_module(self.teacher.network, "teacher")


def prepare_learned_loss(
    kind: str,
    options: dict[str, Any],
    students: list[StudentBuilder],
    teacher: OpenedTeacher,
    images: Images,
    seed: int,
) -> LearnedLoss:
    """Build the loss networks of this kind that are to be learned; `seed` is that of their initial weights.

    Features of several architectures are read from whichever student the loss meets.
    """
    teacher.check_classes(images.train)
    shape = images.train.image_shape
    for student in students:
        stages = () if kind == "logits" else (student.find_stages(shape), teacher.find_stages(shape))
        torch.manual_seed(seed)
        loss = build_learned_loss(kind, options, *stages)
    if len(students) > 1:
        read_any_student(loss)
    return loss


def read_any_student(loss: LearnedLoss) -> None:
    """Let a loss read the features of whichever student it meets."""
    for part in find_feature_parts(loss):
        part.free_student()


def copy_module(module: Copied, role: str) -> Copied:
    """A copy that shares nothing with the module."""
    buffers = module.buffers() if isinstance(module, nn.Module) else ()
    blank: Any = UninitializedBuffer
    lazy = {id(b): blank(b.requires_grad, b.device, b.dtype) for b in buffers if is_lazy(b)}
    try:
        return copy.deepcopy(module, lazy)  # torch itself copies lazy parameters alone
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{role}: this {type(module).__name__} cannot be copied: {first_line(error)}") from error


@dataclass(frozen=True)
class Parts:
    """What a student is trained from.

    Attributes:
        loss: Fits both networks.
        balance: Of the loss's terms, if it is not their sum.
        loss_title: The loss in words.
    """

    images: Images
    teacher: OpenedTeacher
    student: StudentBuilder
    loss: DistillationLoss
    balance: Balancing | None
    loss_title: str


def build(recipe: DistillRecipe, given: Objects = NOTHING) -> Parts:
    """Build all that a recipe names, with a caller's objects in the place of some names."""
    check_names(recipe.train)
    images = prepare_images(recipe.data, given, scored=False)
    student = choose_student(recipe.student, images.train, given)
    teacher = open_teacher(recipe.teacher, images.train, given)
    specification = given.get(recipe.loss, recipe.loss) if isinstance(recipe.loss, str) else recipe.loss
    losses = LossBuilder(specification, teacher, images)
    loss = losses.build(student, recipe.seed)
    return Parts(images, teacher, student, loss, build_balance(recipe.balance, loss), losses.title)
