"""The pool: students at many ages, on disk, from which rollouts start."""

import copy
import functools
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from lkd.config.meta_training import MetaTrainRecipe, PoolContents, PoolRecipe
from lkd.core.distributed import is_main, wait_for_all
from lkd.core.errors import DamagedFileError, UserError
from lkd.core.files import read_mapping, refusing_malformed, write_json
from lkd.core.interrupt import deferred_interrupts
from lkd.core.tensor_files import read_tensors, write_tensors
from lkd.losses.learned.loss import LearnedLoss
from lkd.models.build import GIVEN, build
from lkd.models.teacher import TeacherFunction
from lkd.tracking.run import Run
from lkd.training.build import Images, LossBuilder, OpenedTeacher, StudentBuilder
from lkd.training.checkpoints import Checkpoints, run_steps
from lkd.training.distill import start_training
from lkd.training.training import DivergedError, Training
from meta import State

# ----------------------------------------------------------------------------------------------------------------------
# A student of the pool as a file.

KIND, VERSION = "pool student", 1


class PoolStudent(NamedTuple):
    """A student as it was at some age.

    Attributes:
        state: Parameters, buffers and the optimiser's state.
        learning_rate: Of its next step.
        progress: Its age: the part of its training that was over, in [0, 1].
    """

    state: State
    learning_rate: float
    progress: float


def write_student(path: Path, training: Training) -> None:
    """Write a training's student as it is now."""
    tensors: dict[str, Tensor] = {f"parameters:{name}": tensor for name, tensor in training.student.named_parameters()}
    tensors |= {f"buffers:{name}": tensor for name, tensor in training.student.named_buffers()}
    for name, parameter in training.student.named_parameters():
        momentum = training.optimizer.state.get(parameter, {}).get("momentum_buffer")
        if momentum is not None:
            tensors[f"momentum_buffer:{name}"] = momentum
    header = {"learning_rate": training.learning_rate, "progress": training.progress, "step": training.step}
    write_tensors(path, tensors, KIND, VERSION, header)


def read_student(path: Path, architecture: dict[str, Any], device: torch.device) -> PoolStudent:
    """Read a student.

    Args:
        path: The file.
        architecture: Of the network that it must fit.
        device: Where its tensors go.

    Raises:
        UserError: If its file is missing or damaged, or of another network.
    """
    tensors, header = read_tensors(path, KIND, VERSION)
    parts: dict[str, dict[str, Tensor]] = {"parameters": {}, "buffers": {}, "momentum_buffer": {}}
    with refusing_malformed(path, KIND):
        check_student(tensors, architecture)
        for name, tensor in tensors.items():
            part, _, key = name.partition(":")
            parts[part][key] = tensor.to(device)
        momentum = parts.pop("momentum_buffer")
        state = State(**parts, optimizer={"momentum_buffer": momentum} if momentum else {})
        learning_rate, progress = float(header["learning_rate"]), float(header["progress"])
        if not (0 <= learning_rate < math.inf and 0 <= progress <= 1):
            raise ValueError(f"learning_rate {learning_rate}, progress {progress}")
    return PoolStudent(state, learning_rate, progress)


def check_student(tensors: dict[str, Tensor], architecture: dict[str, Any]) -> None:
    """Check that a student's tensors are those of a network of this architecture, if its name builds one.

    Raises:
        ValueError: If one is missing, unknown, or of another shape or type.
    """
    if str(architecture["name"]).startswith(GIVEN):
        return
    expected = list_tensors(json.dumps(architecture))
    names = tensors.keys() | {name for name in expected if not name.startswith("momentum_buffer:")}
    for name in sorted(names):
        found = (tensors[name].shape, tensors[name].dtype) if name in tensors else "missing"
        if found != expected.get(name):
            raise ValueError(f"{name} is {found}, not {expected.get(name, 'known')}")


@functools.cache
def list_tensors(architecture: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of each tensor that a student can have, by its name in the file; of an architecture as JSON."""
    with torch.device("meta"):
        network = build(**json.loads(architecture) | {"pretrained": False})
    parameters, buffers = dict(network.named_parameters()), dict(network.named_buffers())
    parts: dict[str, Mapping[str, Tensor]] = {
        "parameters": parameters,
        "buffers": buffers,
        "momentum_buffer": parameters,
    }
    return {f"{part}:{name}": (x.shape, x.dtype) for part, each in parts.items() for name, x in each.items()}


# ----------------------------------------------------------------------------------------------------------------------
# The pool: students at many ages, on disk, from which rollouts start. After LKD's "uniform sampling of diverse
# previously-trained student models"; which ages, and that the optimiser's state is kept too, is our reconstruction.

INDEX = "index.json"


@dataclass(frozen=True)
class Pool:
    """A pool on disk.

    Attributes:
        folder: Holds the index and a file for each student and age.
        index: What the index says: `students` (a list of `file`, `training`, `progress`), `architecture`, `split`.
    """

    folder: Path
    index: dict[str, Any]

    def __len__(self) -> int:
        return len(self.index["students"])

    @property
    def ages(self) -> Tensor:
        """The students' ages in [0, 1], float64, [N]."""
        return torch.tensor([entry["progress"] for entry in self.index["students"]], dtype=torch.float64)

    @property
    def trainings(self) -> float:
        """What the pool cost, in units of one whole training: each of its trainings went up to its oldest student."""
        oldest: dict[int, float] = {}
        for entry in self.index["students"]:
            oldest[entry["training"]] = max(entry["progress"], oldest.get(entry["training"], 0.0))
        return sum(oldest.values())

    def read(self, position: int, device: torch.device) -> PoolStudent:
        """Read the student at this position of the index.

        Raises:
            UserError: If its file is missing or damaged.
        """
        try:
            path = self.folder / self.index["students"][position]["file"]
            return read_student(path, self.index["architecture"], device)
        except DamagedFileError as error:
            raise UserError(f"{error}; delete {self.folder}, and --resume auto trains its students again") from error


def open_pool(folder: Path, images: Images, architecture: dict[str, Any]) -> Pool:
    """Open a pool and check that it fits.

    Raises:
        UserError: If there is none, or it was made of another network, or on another split of the data (its students
            may have seen the meta-validation images).
    """
    if not (folder / INDEX).is_file():
        raise UserError(f"pool_dir: {folder} holds no pool (no {INDEX}); `lkd pool` makes one")
    index = read_mapping(folder / INDEX)
    with refusing_malformed(folder / INDEX, "index of a pool"):
        index["split"], index["architecture"]["name"]
        for entry in index["students"]:
            check_entry(entry)
    if index["split"] != images.fingerprint:
        raise UserError(
            f"pool_dir: {folder} was made on another split of the data ({index['split']}, not {images.fingerprint}): "
            "its students may have seen meta-validation images; make it anew with this data recipe"
        )
    if index["architecture"] != architecture:
        raise UserError(
            f"pool_dir: {folder} holds {index['architecture']['name']} students, not {architecture['name']}"
        )
    return Pool(folder, index)


def check_entry(entry: dict[str, Any]) -> None:
    """Check what an index says of a student.

    Raises:
        ValueError: If its file is not in the pool's own folder, or its number or age is not one.
    """
    if Path(entry["file"]).name != entry["file"] or entry["file"] in ("", ".."):
        raise ValueError(f"file {entry['file']!r} is not a name of a file in the pool's folder")
    if type(entry["training"]) is not int or not 0 <= entry["progress"] <= 1:
        raise ValueError(f"training {entry['training']!r}, progress {entry['progress']!r}")


def build_pool(
    recipe: PoolRecipe | MetaTrainRecipe,
    folder: Path,
    images: Images,
    student: StudentBuilder,
    teacher: TeacherFunction,
    losses: LossBuilder,
    run: Run,
    first: int = 0,
) -> Pool:
    """Train students and keep them at several ages; students that are already there are not trained again.

    A student that diverges is kept at the ages before. Processes that have met share each training.

    Args:
        recipe: The settings of pool and training, and the seed.
        folder: Where the pool goes, or is gone on with.
        images: The images.
        student: What builds its students.
        teacher: From a batch to the teacher's outputs.
        losses: What they are trained with.
        run: The run.
        first: Number of the first training: equal numbers give equal initial weights and batches.

    Raises:
        Interrupted: On Ctrl-C or SIGTERM; finished students stay, and the one in training goes on later.
    """
    settings = recipe.pool
    architecture = student.architecture
    index: dict[str, Any] = {"students": [], "architecture": architecture, "split": images.fingerprint}
    if (folder / INDEX).exists():
        try:
            index = open_pool(folder, images, architecture).index
        except DamagedFileError as error:
            run.say(f"warning: {error}; its students are trained again")
    done = {entry["training"] for entry in index["students"]}
    numbers = range(first, first + settings.students)
    with deferred_interrupts() as stop:
        for number in tqdm(numbers, desc="pool", unit="student", disable=run.hide_bars):
            if number in done:
                continue
            seed = recipe.seed + 1000 * (number + 1)
            training = start_training(
                student,
                images,
                losses.build(student, seed),
                teacher,
                recipe.train,
                seed,
                run.device,
                shared=True,
            )
            checkpoints = Checkpoints(folder / f"checkpoints-{number:03d}", recipe.train, run.say)
            checkpoints.resume_training(training)
            for step in list_snapshots(settings, training.total_steps):
                try:
                    for _ in run_steps(training, step, stop, checkpoints):
                        pass
                    if training.step == step:
                        check_finite(training)
                except DivergedError as error:
                    run.say(f"warning: student {number} of the pool has no ages after this: {error}")
                    break
                name = f"student-{number:03d}-step-{step:06d}.safetensors"
                if training.step == step and is_main():  # else it was written before the checkpoint
                    write_student(folder / name, training)
                index["students"].append({"file": name, "training": number, "progress": step / training.total_steps})
            if is_main():
                write_json(folder / INDEX, index)
                checkpoints.remove()
    wait_for_all()
    return Pool(folder, index)


def check_finite(training: Training) -> None:
    """Check a student after a step: the loss before it says nothing of the weights after it.

    Raises:
        DivergedError: If a weight or a buffer is not finite.
    """
    state = training.student.state_dict()
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise DivergedError(f"step {training.step}: {broken[0]} is not finite; lower train.learning_rate")


def list_snapshots(settings: PoolContents, total_steps: int) -> list[int]:
    """The steps at which a student is kept."""
    steps = torch.linspace(0, settings.max_age, settings.snapshots) * total_steps
    return sorted({round(step) for step in steps.tolist()})


# ----------------------------------------------------------------------------------------------------------------------
# The pools of all architectures that a loss is learned with, and their renewal while the loss improves.

LIVE = "live"  # the folder of renewed pools


def open_pools(students: list[StudentBuilder], folder: Path, images: Images) -> list[Pool]:
    """Open the pool of each architecture.

    Raises:
        UserError: If one is missing or does not fit.
    """
    places = list_folders(len(students), folder)
    return [open_pool(place, images, each.architecture) for each, place in zip(students, places, strict=True)]


def build_pools(
    recipe: MetaTrainRecipe,
    folder: Path,
    images: Images,
    students: list[StudentBuilder],
    teacher: TeacherFunction,
    losses: LossBuilder,
    run: Run,
    first: int = 0,
) -> list[Pool]:
    """Build the pool of each architecture, or finish it; the arguments are those of `build_pool`.

    Raises:
        Interrupted: On Ctrl-C or SIGTERM; finished students stay.
    """
    places = list_folders(len(students), folder)
    return [
        build_pool(recipe, place, images, student, teacher, losses, run, first)
        for student, place in zip(students, places, strict=True)
    ]


def renew_pools(
    recipe: MetaTrainRecipe,
    outer_step: int,
    first_pools: list[Pool],
    images: Images,
    students: list[StudentBuilder],
    opened: OpenedTeacher,
    teacher: TeacherFunction,
    run: Run,
    loss: LearnedLoss,
) -> list[Pool]:
    """The pools of sampling live at an outer step.

    Every `refresh_every` steps students with numbers of their own are trained with the loss as it is then, frozen; a
    run that is gone on with finds them in its folder.

    Args:
        recipe: The recipe.
        outer_step: The outer step that is about to be taken.
        first_pools: What is drawn from until the first renewal.
        images: The images.
        students: What builds students of each architecture.
        opened: The teacher.
        teacher: From a batch to its outputs.
        run: The run.
        loss: The loss as it is now.

    Raises:
        UserError: If the pool of this time is gone.
        Interrupted: On Ctrl-C or SIGTERM; finished students stay.
    """
    renewals, since = divmod(outer_step, recipe.pool.refresh_every)
    if not renewals:
        return first_pools
    folder = run.path / LIVE / name_renewal(outer_step - since)
    if since:
        return open_pools(students, folder, images)
    frozen = LossBuilder(copy.deepcopy(loss).requires_grad_(False), opened, images)
    return build_pools(recipe, folder, images, students, teacher, frozen, run, renewals * recipe.pool.students)


def drop_superseded_pools(recipe: MetaTrainRecipe, outer_step: int, run: Run) -> None:
    """Delete renewed pools that a run which goes on from this outer step draws from no more."""
    for folder in (run.path / LIVE).glob("step-*"):
        if folder.name < name_renewal(outer_step - outer_step % recipe.pool.refresh_every):
            shutil.rmtree(folder)


def name_renewal(outer_step: int) -> str:
    """The folder of the pools that were renewed at an outer step; names sort by it."""
    return f"step-{outer_step:06d}"


def count_pool_trainings(recipe: MetaTrainRecipe, first_pools: list[Pool], outer_steps: int) -> float:
    """What the pools cost up to an outer step, renewals too, in units of one whole training."""
    drawn_from = min(outer_steps, recipe.meta.alternation_start)
    renewals = max(drawn_from - 1, 0) // recipe.pool.refresh_every if recipe.pool.sampling == "live" else 0
    renewed = renewals * recipe.pool.students * recipe.pool.max_age * len(first_pools)
    return sum(pool.trainings for pool in first_pools) + renewed


def list_folders(count: int, folder: Path) -> list[Path]:
    """Where each architecture's pool is: the folder itself if there is one architecture, else numbered ones in it."""
    return [folder] if count == 1 else [folder / str(number) for number in range(count)]
