"""`lkd.distill` and `lkd.meta_train`: the commands of the same name, for objects in the place of names and files."""

import dataclasses
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lkd.config.parse import parse_recipe
from lkd.config.parts import DataRecipe, ModelRecipe, RunRecipe, TeacherRecipe, TrainRecipe
from lkd.core.distributed import wait_for_all
from lkd.core.errors import UserError, check_choice
from lkd.data.arrays import read_images
from lkd.data.images import ImageSet
from lkd.losses.learned.file import load_loss, read_provenance
from lkd.losses.learned.loss import LearnedLoss, ReplayedLoss
from lkd.meta_training.meta_train import meta_train as learn_loss
from lkd.models.files import load_network
from lkd.tracking.run import Run, open_run
from lkd.tracking.tracker import read_log
from lkd.training.build import GivenData, GivenModel, GivenTeacher, give_loss
from lkd.training.distill import distill as distill_student

# ----------------------------------------------------------------------------------------------------------------------
# From what a caller of `lkd.distill` or `lkd.meta_train` gives to a recipe.

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


# ----------------------------------------------------------------------------------------------------------------------
# What `lkd.distill` and `lkd.meta_train` give.


@dataclass(frozen=True)
class Distilled:
    """What `distill` gives.

    Attributes:
        student: The trained network, in eval mode, on the device it was trained on: of the given class, or, for a name,
            one that returns `Outputs`.
        path: Its file, in the run directory.
        history: For each epoch its step and its figures on meta-validation: top1 and top5 in percent, cross_entropy,
            calibrated_cross_entropy, ...
    """

    student: nn.Module
    path: Path
    history: list[dict[str, float]]

    @property
    def run_dir(self) -> Path:
        """The run directory: config, versions, log, checkpoints."""
        return self.path.parent

    @property
    def last(self) -> dict[str, float]:
        """Figures of the last epoch."""
        return self.history[-1]

    @property
    def best(self) -> dict[str, float]:
        """Figures of the epoch with the highest top1."""
        return max(self.history, key=lambda row: row["top1"])


@dataclass(frozen=True)
class MetaTrained:
    """What `meta_train` gives.

    Attributes:
        loss: The learned loss, frozen.
        path: Its file, in the run directory; `lkd.load_loss` reads it.
        history: A row for each outer step.
    """

    loss: LearnedLoss | ReplayedLoss
    path: Path
    history: list[dict[str, Any]]

    @property
    def run_dir(self) -> Path:
        """The run directory: config, versions, log, checkpoints, pool."""
        return self.path.parent


# ----------------------------------------------------------------------------------------------------------------------
# `lkd.distill` and `lkd.meta_train`: the commands of the same name, for objects in the place of names and files.
# Options are parsed as the command line parses them, and the work is the commands': equal settings give equal bits.


def distill(
    student: Student,
    teacher: Teacher,
    train_set: Any,
    *,
    loss: str | Path | dict[str, Any] | nn.Module = "kd",
    meta_validation_set: Any = None,
    run_dir: str | Path = "runs/run",
    seed: int = 0,
    resume: str = "never",
    device: str | torch.device = "auto",
    wandb: str | dict[str, Any] = "disabled",
    quiet: bool = False,
    **options: Any,
) -> Distilled:
    """Train a student with a learned or a hand-made loss, as `lkd distill` does.

    Args:
        student: A network that maps images [B, C, H, W] to logits (or to an object that has them as `logits`, or to
            `lkd.Outputs`, whose features losses over features read); or a function without arguments that builds one,
            called under `seed`; or the name of a network ("resnet18"), or a dict as a recipe's `student`. A network
            that is given stays as it is: a copy is trained.
        teacher: A network like that; or the file of one (`lkd teacher` wrote it), a timm name with its tag
            ("resnet34.tv_in1k", pretrained), "embedded", or a dict as a recipe's `teacher`. One that is given is copied
            too, and sees images as the student does.
        train_set: Tensors (images, labels) or a map-style dataset of (image, label): what `lkd.read_images` takes, and
            its result; or a data set's name ("embedded"; "image_folder" with the option `root`).
        loss: The path of a learned loss, a loss's name, a dict {"name": ..., ...} (docs/losses.md), or a module
            `loss(student, teacher, target, progress) -> {term: scalar}`, of which a copy is used.
        meta_validation_set: What the student is scored on after every epoch, as `train_set`. By default a tenth of the
            given images is split off, by class and `split_seed`, or `meta_validation_size` of them.
        run_dir: Where config, log, checkpoints and the student's file go.
        seed: Of initial weights (of names and functions) and of the order of the batches.
        resume: "never", or "auto": go on with the run in `run_dir` if there is one, to the same bits. Give the same
            teacher, images and loss, and a student of the same shapes.
        device: "cpu", "cuda", or "auto".
        wandb: "offline" or "online" to send the log to Weights & Biases, or a dict of mode, project, name.
        quiet: No lines, no progress bars.
        **options: The recipe's: of the training (epochs, batch_size, learning_rate, ...: `lkd.config.TrainRecipe`), of
            the images (augmentation, train_size, label_noise, mixup, ...: `lkd.config.DataRecipe`), balance,
            labelled_size, threads.

    Returns:
        The trained student, and what it reached.

    Raises:
        UserError: If an argument is not good, in one line.
        Interrupted: On Ctrl-C or SIGTERM, after saving a checkpoint.
    """
    fixed = {"run_dir": run_dir, "seed": seed, "resume": resume, "device": device, "wandb": wandb}
    recipe = build_recipe("distill", ("balance", "labelled_size"), fixed, options)
    recipe.student, recipe.teacher, recipe.loss = choose_student(student), choose_teacher(teacher), choose_loss(loss)
    recipe.data = choose_data(train_set, meta_validation_set, recipe.data, options)
    with open_library_run(recipe, "distill", quiet) as run:
        path = distill_student(recipe, run)
        wait_for_all()
        given = recipe.student
        trained = given.load(path) if isinstance(given, GivenModel) else load_network(path)[0]
        rows = [row for row in read_log(Path(recipe.run_dir) / "log.jsonl") if "meta_validation/top1" in row]
    prefix = "meta_validation/"
    history = [{key.removeprefix(prefix): row[key] for key in row if key == "step" or prefix in key} for row in rows]
    return Distilled(trained.to(run.device), path, history)


def meta_train(
    students: Student | Sequence[Student],
    teacher: Teacher,
    train_set: Any,
    *,
    meta: dict[str, Any] | None = None,
    pool: dict[str, Any] | None = None,
    meta_validation_set: Any = None,
    run_dir: str | Path = "runs/run",
    seed: int = 0,
    resume: str = "never",
    device: str | torch.device = "auto",
    wandb: str | dict[str, Any] = "disabled",
    quiet: bool = False,
    **options: Any,
) -> MetaTrained:
    """Learn a loss, as `lkd meta-train` does.

    Args:
        students: The students to learn with, one or several: names, dicts, or functions without arguments that build a
            network, since every student of the pool starts from weights of its own.
        teacher: As for `distill`.
        train_set: As for `distill`; `meta_validation_set`, which the outer loss sees, too.
        meta: The outer loop: fields of `lkd.config.MetaSettings`, such as {"outer_steps": 30} (docs/meta_training.md).
        pool: The pool: fields of `lkd.config.PoolSettings`.
        meta_validation_set: As for `distill`.
        run_dir: Where config, log, checkpoints, the pool and the loss's file go.
        seed: Of initial weights, batches and every draw.
        resume: As for `distill`.
        device: As for `distill`.
        wandb: As for `distill`.
        quiet: No lines, no progress bars.
        **options: The recipe's: of the students' training and of the images, as for `distill`; pool_dir, threads.

    Returns:
        The loss, frozen, and its file.

    Raises:
        UserError: If an argument is not good, in one line.
        Interrupted: On Ctrl-C or SIGTERM, after saving a checkpoint.
    """
    models = choose_students(students)
    fixed = {"run_dir": run_dir, "seed": seed, "resume": resume, "device": device, "wandb": wandb}
    fixed |= {"meta": meta or {}, "pool": pool or {}}
    recipe = build_recipe("meta-train", ("pool_dir",), fixed, options)
    recipe.student, recipe.students = models[0], models if len(models) > 1 else []
    recipe.teacher = choose_teacher(teacher)
    recipe.data = choose_data(train_set, meta_validation_set, recipe.data, options)
    with open_library_run(recipe, "meta-train", quiet) as run:
        path = learn_loss(recipe, run)
        wait_for_all()
        return MetaTrained(load_loss(path).to(run.device), path, read_provenance(path)["curve"])


@contextmanager
def open_library_run(recipe: RunRecipe, command: str, quiet: bool) -> Iterator[Run]:
    """Open a run in a caller's process, whose random state it leaves alone.

    Raises:
        UserError: If this is not the main thread, or as `open_run`.
    """
    if threading.current_thread() is not threading.main_thread():
        raise UserError(f"lkd {command}: must be called from the main thread, which Ctrl-C and SIGTERM reach")
    with torch.random.fork_rng(range(torch.cuda.device_count())), open_run(recipe, command, quiet) as run:
        yield run
