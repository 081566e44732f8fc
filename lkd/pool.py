"""The pool: students at many ages, on disk, from which rollouts start.

After LKD's "uniform sampling of diverse previously-trained student models"; which ages, and that the optimiser's state
is kept too, is our reconstruction.
"""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lkd.assembly import Images, architecture_of, prepare_loss
from lkd.checkpoints import Checkpoints, run_steps
from lkd.config import MetaTrainRecipe, PoolContents, PoolRecipe
from lkd.distillation import start_training
from lkd.errors import UserError
from lkd.files import read_mapping, read_tensors, refusing_malformed, write_json, write_tensors
from lkd.interrupt import deferred_interrupts
from lkd.models import build
from lkd.models.given_network import GIVEN
from lkd.processes import is_main, wait_for_all
from lkd.run import Run
from lkd.training import TeacherFunction, Training
from meta import State

KIND, VERSION = "pool student", 1
INDEX = "index.json"


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
        path = self.folder / self.index["students"][position]["file"]
        tensors, header = read_tensors(path, KIND, VERSION)
        parts: dict[str, dict[str, torch.Tensor]] = {"parameters": {}, "buffers": {}, "momentum_buffer": {}}
        with refusing_malformed(path, KIND):
            check_student(tensors, self.index["architecture"])
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
    if Path(entry["file"]).name != entry["file"]:
        raise ValueError(f"file {entry['file']!r} is not a name of a file in the pool's folder")
    if type(entry["training"]) is not int or not 0 <= entry["progress"] <= 1:
        raise ValueError(f"training {entry['training']!r}, progress {entry['progress']!r}")


def build_pool(
    recipe: PoolRecipe | MetaTrainRecipe,
    folder: Path,
    images: Images,
    teacher: TeacherFunction,
    run: Run,
    loss: nn.Module | None = None,
    first: int = 0,
) -> Pool:
    """Train students and keep them at several ages; students that are already there are not trained again.

    Processes that have met share each training.

    Args:
        recipe: The recipe.
        folder: Where the pool goes, or is gone on with.
        images: The images.
        teacher: From a batch to the teacher's outputs.
        run: The run.
        loss: What the students are trained with; by default what `pool.loss` names.
        first: Number of the first training: equal numbers give equal initial weights and batches.

    Raises:
        UserError: If the settings are impossible.
        Interrupted: On Ctrl-C or SIGTERM; finished students stay, and the one in training goes on later.
    """
    settings = recipe.pool
    check_pool(settings)
    architecture = architecture_of(recipe.student, images.train)
    index: dict[str, Any] = {"students": [], "architecture": architecture, "split": images.fingerprint}
    if (folder / INDEX).exists():
        index = open_pool(folder, images, architecture).index
    done = {entry["training"] for entry in index["students"]}
    numbers = range(first, first + settings.students)
    with deferred_interrupts() as stop:
        for number in tqdm(numbers, desc="pool", unit="student", disable=run.hide_bars):
            if number in done:
                continue
            seed = recipe.seed + 1000 * (number + 1)
            training = start_training(
                recipe.student,
                images.train,
                loss or prepare_loss(settings.loss, recipe.student, recipe.teacher, images, seed),
                teacher,
                recipe.train,
                recipe.data,
                seed,
                run.device,
                shared=True,
            )
            checkpoints = Checkpoints(folder / f"checkpoints-{number:03d}", recipe.train, run.say)
            checkpoints.resume_training(training)
            for step in list_snapshots(settings, training.total_steps):
                for _ in run_steps(training, step, stop, checkpoints):
                    pass
                name = f"student-{number:03d}-step-{step:06d}.safetensors"
                if training.step == step and is_main():  # else it was written before the checkpoint
                    write_student(folder / name, training)
                index["students"].append({"file": name, "training": number, "progress": step / training.total_steps})
            if is_main():
                write_json(folder / INDEX, index)
                checkpoints.remove()
    wait_for_all()
    return Pool(folder, index)


def list_snapshots(settings: PoolContents, total_steps: int) -> list[int]:
    """The steps at which a student is kept."""
    steps = torch.linspace(0, settings.max_age, settings.snapshots) * total_steps
    return sorted({round(step) for step in steps.tolist()})


def check_pool(settings: PoolContents) -> None:
    """Check what a pool is to hold, before any training.

    Raises:
        UserError: If a setting is impossible.
    """
    for name in ("students", "snapshots"):
        if getattr(settings, name) < 1:
            raise UserError(f"pool.{name}: {getattr(settings, name)} is not at least 1")
    if not 0 <= settings.max_age <= 1:
        raise UserError(f"pool.max_age: {settings.max_age} is not in [0, 1]")


def write_student(path: Path, training: Training) -> None:
    """Write a training's student as it is now."""
    tensors: dict[str, torch.Tensor] = {
        f"parameters:{name}": tensor for name, tensor in training.student.named_parameters()
    }
    tensors |= {f"buffers:{name}": tensor for name, tensor in training.student.named_buffers()}
    for name, parameter in training.student.named_parameters():
        momentum = training.optimizer.state.get(parameter, {}).get("momentum_buffer")
        if momentum is not None:
            tensors[f"momentum_buffer:{name}"] = momentum
    header = {"learning_rate": training.learning_rate, "progress": training.progress, "step": training.step}
    write_tensors(path, tensors, KIND, VERSION, header)
