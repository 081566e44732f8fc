"""From what a caller of `lkd.distill` or `lkd.meta_train` gives to a recipe."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lkd.cli import parse_recipe
from lkd.config import DataRecipe, ModelRecipe, RunRecipe, TeacherRecipe, TrainRecipe
from lkd.data import ImageSet
from lkd.data.given_images import read_images
from lkd.errors import UserError, check_choice
from lkd.given import GivenData, GivenModel, GivenTeacher, give_loss

META_VALIDATION_SHARE = 10  # of given images one in so many is meta-validation, unless the caller says otherwise
PARTS = ("wandb", "meta", "pool")  # a dict of their fields is given
FILES = (".safetensors", ".pth", ".pt")

Student = str | dict[str, Any] | nn.Module | Callable[[], nn.Module]
Teacher = str | Path | dict[str, Any] | nn.Module


def build_recipe(command: str, own: Sequence[str], fixed: dict[str, Any], options: dict[str, Any]) -> Any:
    """Parse arguments as the command line would.

    Args:
        command: The command.
        own: Fields of its recipe that are options by their own name, besides those of every run.
        fixed: Fields of its recipe that are arguments; of `wandb` a string is the mode.
        options: By name: these, and the fields of the recipe's `train` and `data`.

    Raises:
        UserError: If an option is unknown or a value is of the wrong type.
    """
    places = {name: name for name in (*own, *(field.name for field in dataclasses.fields(RunRecipe)))}
    for part, kind in (("data", DataRecipe), ("train", TrainRecipe)):
        places |= {field.name: f"{part}.{field.name}" for field in dataclasses.fields(kind) if field.name != "name"}
    for name in options:
        check_choice("option", name, places)
    values = fixed | {places[name]: value for name, value in options.items()}
    if isinstance(values["wandb"], str):
        values["wandb"] = {"mode": values["wandb"]}
    for part in [name for name in values if name in PARTS and isinstance(values[name], dict)]:
        values |= {f"{part}.{name}": value for name, value in values.pop(part).items()}
    return parse_recipe(command, [f"--{name}={format_value(value)}" for name, value in values.items()])


def format_value(value: Any) -> str:
    """A value as the command line has it."""
    return json.dumps(value) if value is None or isinstance(value, dict | list | tuple | bool) else str(value)


def choose_data(train_set: Any, meta_validation_set: Any, recipe: DataRecipe, options: dict[str, Any]) -> DataRecipe:
    """The images: those of a name, or those that are given.

    Args:
        train_set: A data set's name, or what `read_images` takes, or an `ImageSet`.
        meta_validation_set: The same; None to split it off.
        recipe: How images are split and augmented.
        options: Those that the caller gave, whose values are the recipe's.

    Raises:
        UserError: If the images are not good, or an option does not go with them.
    """
    if isinstance(train_set, str):
        if meta_validation_set is not None:
            raise UserError(f"meta_validation_set: leave it out; that of {train_set} is split off by its data recipe")
        return dataclasses.replace(recipe, name=train_set)
    train = train_set if isinstance(train_set, ImageSet) else read_images(train_set)
    unread = {"root", "image_size", "workers", "damaged_limit", "packed"} & set(options)
    if unread:
        raise UserError(f"{sorted(unread)[0]}: is of data sets by name; lkd.read_images has options for given images")
    fields = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(DataRecipe)} | {"root": None}
    fields.pop("name")
    if meta_validation_set is None:
        fields["train_size"] = options.get("train_size", 0)
        fields["meta_validation_size"] = options.get("meta_validation_size", len(train) // META_VALIDATION_SHARE)
        return GivenData(train, None, **fields)
    for name in ("train_size", "meta_validation_size"):
        if name in options:
            raise UserError(f"{name}: leave it out; with a meta_validation_set both sets are taken whole")
    if not isinstance(meta_validation_set, ImageSet):
        meta_validation_set = read_images(
            meta_validation_set, num_classes=train.num_classes, mean=train.mean, std=train.std
        )
    for name in ("image_shape", "num_classes", "mean", "std"):
        if getattr(meta_validation_set, name) != getattr(train, name):
            found, wanted = getattr(meta_validation_set, name), getattr(train, name)
            raise UserError(f"meta_validation_set: its {name} is {found}, that of the training images is {wanted}")
    fields |= {"train_size": len(train), "meta_validation_size": len(meta_validation_set)}
    return GivenData(train, meta_validation_set, **fields)


def choose_student(student: Student) -> ModelRecipe:
    """The student: of a name, or one that is given.

    Raises:
        UserError: If it is something else.
    """
    if isinstance(student, str):
        return ModelRecipe(student)
    if isinstance(student, dict):
        return read_part("student", ModelRecipe, student)
    if callable(student):
        return GivenModel(student)
    raise UserError(f"student: {student!r} is neither a name, a dict, a torch.nn.Module nor a function that builds one")


def choose_students(students: Student | Sequence[Student]) -> list[ModelRecipe]:
    """The students of a meta-training, one or several.

    Raises:
        UserError: If one is something else, or a network, not a function that builds it.
    """
    several: Any = students if isinstance(students, list | tuple) else [students]
    for student in several:
        if isinstance(student, nn.Module):
            raise UserError(
                f"students: a {type(student).__name__} has one set of weights, and every student of the pool starts "
                "from its own: give a function that builds one (lambda: copy.deepcopy(network) to start all alike)"
            )
    if not several:
        raise UserError("students: give at least one")
    return [choose_student(student) for student in several]


def choose_teacher(teacher: Teacher) -> TeacherRecipe:
    """The teacher: a file, timm's of a name, or one that is given.

    Raises:
        UserError: If it is something else.
    """
    if isinstance(teacher, nn.Module):
        return GivenTeacher(teacher)
    if isinstance(teacher, dict):
        return read_part("teacher", TeacherRecipe, teacher)
    if not isinstance(teacher, str | Path):
        raise UserError(f"teacher: {teacher!r} is neither a name, a file, a dict nor a torch.nn.Module")
    name = str(teacher)
    is_file = isinstance(teacher, Path) or name == "embedded" or name.endswith(FILES) or Path(name).is_file()
    return TeacherRecipe(path=name) if is_file else TeacherRecipe(name=name, pretrained=True)


def choose_loss(loss: Any) -> Any:
    """The loss as a recipe has it."""
    if isinstance(loss, nn.Module):
        return give_loss(loss)
    return str(loss) if isinstance(loss, Path) else loss


def read_part(role: str, part: type, fields: dict[str, Any]) -> Any:
    """A part of a recipe, of its fields.

    Raises:
        UserError: If one is unknown.
    """
    for name in fields:
        check_choice(role, name, [field.name for field in dataclasses.fields(part)])
    return part(**fields)
