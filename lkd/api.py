"""`lkd.distill` and `lkd.meta_train`: the commands of the same name, for objects in the place of names and files."""

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lkd.config.meta_training import MetaTrainRecipe
from lkd.config.parse import make_plain, make_recipe
from lkd.config.parts import DataRecipe, ModelRecipe, RunRecipe, TeacherRecipe, TrainRecipe
from lkd.config.training import DistillRecipe
from lkd.core.content import describe_content
from lkd.core.distributed import wait_for_all
from lkd.core.errors import UserError, check_choice
from lkd.core.files import expand_home
from lkd.core.plugins import import_plugins
from lkd.core.tensor_files import digest, read_tensors
from lkd.data.arrays import read_images
from lkd.data.image_files import ImageFiles
from lkd.data.images import ImageSet, identify_pixels
from lkd.data.splits import choose_meta_validation_size
from lkd.losses.learned.file import load_loss, read_provenance
from lkd.losses.learned.loss import LearnedLoss, ReplayedLoss
from lkd.meta_training.meta_train import meta_train as learn_loss
from lkd.models.build import GIVEN, load_plain_state_dict
from lkd.models.files import KIND, VERSION, fit_to_images, load_network
from lkd.tracking.run import Run, open_run
from lkd.tracking.tracker import read_log
from lkd.training.build import build, copy_module
from lkd.training.distill import distill as distill_student

FILES = (".safetensors", ".pth", ".pt")
HASH_LENGTH = 12

Student = str | dict[str, Any] | nn.Module | Callable[[], nn.Module]
Teacher = str | Path | dict[str, Any] | nn.Module
Recipe = TypeVar("Recipe", bound=RunRecipe)


@dataclass(frozen=True)
class Distilled:
    """What `distill` gives.

    Attributes:
        student: The trained network, in eval mode, on the device it was trained on: of the given class, or, for a name,
            one that returns `Outputs`.
        path: Its file, in the run directory.
        history: For each epoch its step and its figures on meta-validation: top1 and top5 in percent, cross_entropy,
            calibrated_cross_entropy, ... Empty if there are no meta-validation images.
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
        """Figures of the last epoch, if there are any."""
        return self.history[-1] if self.history else {}

    @property
    def best(self) -> dict[str, float]:
        """Figures of the epoch with the highest top1, if there are any."""
        return max(self.history, key=lambda row: row["top1"], default={})


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


def distill(
    student: Student,
    teacher: Teacher,
    train_set: Any,
    *,
    loss: str | Path | dict[str, Any] | Callable[..., Any] = "universal",
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
        loss: "universal", the learned loss that the package carries; the path of another one, a loss's name, a dict
            {"name": ..., ...} (docs/losses.md), or a module or function
            `loss(student, teacher, target, progress) -> {term: scalar}`, or one scalar; `progress` may be left out, and
            of a module a copy is used.
        meta_validation_set: What the student is scored on after every epoch, as `train_set`. By default a tenth of the
            given images is split off, by class and `split_seed`, or `meta_validation_size` of them; 0 for none,
            no scores, and the last weights.
        run_dir: Where config, log, checkpoints and the student's file go.
        seed: Of initial weights (of names and functions) and of the order of the batches.
        resume: "never", or "auto": go on with the run in `run_dir` if there is one, to the same bits. Give the same
            teacher, images and loss, and a student of the same shapes.
        device: "cpu", "cuda", "mps", "xpu", or "auto".
        wandb: "offline" or "online" to send the log to Weights & Biases, or a dict of mode, project, name.
        quiet: No lines, no progress bars.
        **options: The recipe's: of the training (epochs, batch_size, learning_rate, ...: `lkd.config.TrainRecipe`), of
            the images (augmentation, train_size, label_noise, mixup, ...: `lkd.config.DataRecipe`), balance,
            labelled_size, report_test, threads.

    Returns:
        The trained student, and what it reached.

    Raises:
        UserError: If an argument is not good, in one line.
        Interrupted: On Ctrl-C or SIGTERM, after saving a checkpoint.
    """
    run_options = {"run_dir": run_dir, "seed": seed, "resume": resume, "device": device, "wandb": wandb}
    recipe = read_options(DistillRecipe, ("balance", "labelled_size", "report_test"), run_options, options)
    given: dict[str, Any] = {}
    recipe.student = name_student(student, given)
    recipe.teacher = name_teacher(teacher, given)
    recipe.loss = name_loss(loss, given)
    recipe.data = name_images(train_set, meta_validation_set, recipe.data, options, given)
    with open_library_run(recipe, "distill", quiet) as run:
        parts = build(recipe, given)
        path = distill_student(parts, recipe.train, recipe.seed, run, recipe.labelled_size, recipe.report_test)
        wait_for_all()
        make = given.get(recipe.student.name)
        torch.manual_seed(recipe.seed)  # for what a function draws and no file keeps
        trained = make() if make else fit_to_images(str(path), *load_network(path), parts.images.train)
        if make:
            load_plain_state_dict(trained, read_tensors(path, KIND, VERSION)[0])
        rows = [row for row in read_log(Path(recipe.run_dir) / "log.jsonl") if "meta_validation/top1" in row]
    prefix = "meta_validation/"
    history = [{key.removeprefix(prefix): row[key] for key in row if key == "step" or prefix in key} for row in rows]
    return Distilled(trained.eval().to(run.device), path, history)


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
    several: Any = students if isinstance(students, list | tuple) else [students]
    for student in several:
        if isinstance(student, nn.Module):
            raise UserError(
                f"students: a {type(student).__name__} has one set of weights, and every student of the pool starts "
                "from its own: give a function that builds one (lambda: copy.deepcopy(network) to start all alike)"
            )
    if not several:
        raise UserError("students: give at least one")
    run_options = {"run_dir": run_dir, "seed": seed, "resume": resume, "device": device, "wandb": wandb}
    run_options |= {"meta": meta or {}, "pool": pool or {}}
    recipe = read_options(MetaTrainRecipe, ("pool_dir",), run_options, options)
    given: dict[str, Any] = {}
    recipe.student, *others = (name_student(student, given) for student in several)
    recipe.students = [recipe.student, *others] if others else []
    recipe.teacher = name_teacher(teacher, given)
    recipe.data = name_images(train_set, meta_validation_set, recipe.data, options, given)
    with open_library_run(recipe, "meta-train", quiet) as run:
        path = learn_loss(recipe, run, given)
        wait_for_all()
        return MetaTrained(load_loss(path).to(run.device), path, read_provenance(path)["curve"])


@contextmanager
def open_library_run(recipe: RunRecipe, command: str, quiet: bool) -> Iterator[Run]:
    """Open a run in a caller's process, whose random state it leaves alone."""
    if threading.current_thread() is not threading.main_thread():
        raise UserError(f"lkd {command}: must be called from the main thread, which Ctrl-C and SIGTERM reach")
    with torch.random.fork_rng(range(torch.cuda.device_count())), open_run(recipe, command, quiet) as run:
        yield run


# ----------------------------------------------------------------------------------------------------------------------
# From what a caller gives to a recipe. An object stands in it by a name that holds a hash, so that the config says what
# a run was made with, and a run is not gone on with with something else; `given` learns which object the name is for.


def read_options(
    kind: type[Recipe], own: Sequence[str], run_options: Mapping[str, Any], options: Mapping[str, Any]
) -> Recipe:
    """The recipe of a caller's options.

    Args:
        kind: The recipe.
        own: Fields of it that are options by their own name, besides those of every run.
        run_options: Fields of it that are arguments; of `wandb` a string is the mode.
        options: By name: these, and the fields of the recipe's `train` and `data`.
    """
    parts = {"data": DataRecipe, "train": TrainRecipe}
    places = {
        field.name: part for part, of in parts.items() for field in dataclasses.fields(of) if field.name != "name"
    }
    known = {*own, *(field.name for field in dataclasses.fields(RunRecipe))}
    values = dict(run_options)
    for name, value in options.items():
        check_choice("option", name, known | places.keys())
        (values if name in known else values.setdefault(places[name], {}))[name] = value
    for name in ("run_dir", "device", "root", "packed", "class_map"):
        for part in (values, values.get("data", {})):
            if isinstance(part.get(name), Path | torch.device):
                part[name] = str(part[name])
    import_plugins(values.get("plugins"))
    if isinstance(values["wandb"], str):
        values["wandb"] = {"mode": values["wandb"]}
    return make_recipe(kind, values)


def name_student(student: Student, given: dict[str, Any]) -> ModelRecipe:
    """The student's recipe; the name of one that is given holds its shapes, not its weights."""
    if isinstance(student, str):
        return ModelRecipe(student)
    if isinstance(student, dict):
        return make_recipe(ModelRecipe, student, "student")
    if not callable(student):
        raise UserError(
            f"student: {student!r} is neither a name, a dict, a torch.nn.Module nor a function that builds one"
        )
    make = partial(copy_module, student, "student") if isinstance(student, nn.Module) else student
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = make()
        if not isinstance(network, nn.Module):
            raise UserError(f"student: the function given builds a {type(network).__name__}, not a torch.nn.Module")
        again = make() if make is student else None
    trained = {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
    if again is not None and not trained.isdisjoint(map(id, again.parameters())):
        raise UserError(
            f"student: the function given returns a {type(network).__name__} with the same weights each time, which "
            "would be trained on: build one anew in it, or return copy.deepcopy(network)"
        )
    check_tensors(network, "student")
    content = describe_content(network, weights=False)  # a lazy one has its shapes from the first images, in a dry run
    while (name := name_content(type(network).__name__, content)) in given:
        content = [content]  # two students of equal shapes are two students
    given[name] = make
    return ModelRecipe(name)


def name_teacher(teacher: Teacher, given: dict[str, Any]) -> TeacherRecipe:
    """The teacher's recipe: a file, timm's of a name, or one that is given, of which a frozen copy is used."""
    if isinstance(teacher, nn.Module):
        check_tensors(teacher, "teacher")
        frozen = copy_module(teacher, "teacher").eval().requires_grad_(False)
        return TeacherRecipe(name_object(type(teacher).__name__, describe_content(teacher), frozen, given))
    if isinstance(teacher, dict):
        return make_recipe(TeacherRecipe, teacher, "teacher")
    if not isinstance(teacher, str | Path):
        raise UserError(f"teacher: {teacher!r} is neither a name, a file, a dict nor a torch.nn.Module")
    name = expand_home(str(teacher))
    is_file = isinstance(teacher, Path) or name == "embedded" or name.endswith(FILES) or Path(name).is_file()
    return TeacherRecipe(path=name) if is_file else TeacherRecipe(name=name, pretrained=True)


def name_loss(loss: Any, given: dict[str, Any]) -> Any:
    """The loss as a recipe has it."""
    if not callable(loss):
        return make_plain(str(loss) if isinstance(loss, Path) else loss)
    if isinstance(loss, nn.Module):
        check_tensors(loss, "loss")
    return name_object(getattr(loss, "__name__", type(loss).__name__), describe_content(loss), loss, given)


def name_images(
    train_set: Any,
    meta_validation_set: Any,
    recipe: DataRecipe,
    options: Mapping[str, Any],
    given: dict[str, Any],
) -> DataRecipe:
    """The images' recipe, from one of how they are split and augmented, whose values are the caller's options."""
    if isinstance(train_set, str):
        if meta_validation_set is not None:
            raise UserError(f"meta_validation_set: leave it out; that of {train_set} is split off by its data recipe")
        return dataclasses.replace(recipe, name=train_set)
    train = train_set if isinstance(train_set, ImageSet) else read_images(train_set)
    unread = {"root", "image_size", "crop_pct", "workers", "damaged_limit", "packed", "class_map"} & set(options)
    if unread:
        raise UserError(f"{min(unread)}: is of data sets by name; lkd.read_images has options for given images")
    content = [describe_images(train)]
    sizes = {"train_size": 0, "meta_validation_size": choose_meta_validation_size(len(train))}
    taken = {name: options[name] for name in sizes if name in options}
    if meta_validation_set is not None:
        if taken:
            raise UserError(f"{min(taken)}: leave it out; with a meta_validation_set both sets are taken whole")
        meta_validation_set = read_like(meta_validation_set, train)
        content.append(describe_images(meta_validation_set))
        sizes = {"train_size": len(train), "meta_validation_size": len(meta_validation_set)}
    name = name_object("images", content, (train, meta_validation_set), given)
    return dataclasses.replace(recipe, name=name, root=None, **sizes | taken)


def read_like(source: Any, train: ImageSet) -> ImageSet:
    """Images for meta-validation, numbered apart from the training images."""
    if not isinstance(source, ImageSet):
        try:
            source = read_images(source, num_classes=train.num_classes, mean=train.mean, std=train.std)
        except UserError as error:
            raise UserError(f"meta_validation_set: {error}") from error
    for name in ("image_shape", "num_classes", "mean", "std"):
        found, wanted = getattr(source, name), getattr(train, name)
        if found != wanted:
            raise UserError(f"meta_validation_set: its {name} is {found}, that of the training images is {wanted}")
    for number, (own, other) in enumerate(zip(source.class_names, train.class_names, strict=True)):
        if own != other and str(number) not in (own, other):
            raise UserError(
                f"meta_validation_set: its class {number} is {own!r}, that of the training images is {other!r}: a "
                "folder of fewer classes numbers them otherwise; give its labels as those of the training images"
            )
    return dataclasses.replace(source, index=1 + int(train.index.max()) + torch.arange(len(source)))


def describe_images(images: ImageSet) -> list[Any]:
    """All that trains: pixels (of files their names, or, where these say nothing, some), labels, normalisation."""
    pixels: Any = images.images
    if isinstance(pixels, ImageFiles):
        names = [pixels.name(slot) for slot in range(len(images))]
        pixels = names if pixels.source.names_tell else [names, identify_pixels(images)]
    return [pixels, images.labels, images.mean, images.std, images.num_classes]


def check_tensors(module: nn.Module, role: str) -> None:
    """Check that a checkpoint can hold a module, and that it has its weights, but for a student's."""
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise UserError(f"{role}: {name!r} of its state dict is a {type(value).__name__}, not a tensor")
        if is_lazy(value) and role != "student":
            raise UserError(
                f"{role}: {name!r} has no weights yet; call this lazy module on a batch, or load its weights"
            )


def name_object(what: str, content: Any, value: Any, given: dict[str, Any]) -> str:
    """What an object is called in a config: equal content, equal names."""
    name = name_content(what, content)
    given[name] = value
    return name


def name_content(what: str, content: Any) -> str:
    """The name of an object of this content."""
    return f"{GIVEN}{what}@{digest(content)[:HASH_LENGTH]}"
