"""The pool: students at many ages, on disk, from which rollouts start.

After LKD's "uniform sampling of diverse previously-trained student models"; which ages, and that the optimiser's state
is kept too, is our reconstruction.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lkd.assembly import Images, architecture_of, prepare_loss
from lkd.checkpoints import Checkpoints, run_steps
from lkd.config import MetaTrainRecipe, PoolContents, PoolRecipe
from lkd.distillation import start_training
from lkd.errors import DamagedFileError, UserError
from lkd.files import read_mapping, refusing_malformed, write_json
from lkd.interrupt import deferred_interrupts
from lkd.pool_student import PoolStudent, read_student, write_student
from lkd.processes import is_main, wait_for_all
from lkd.run import Run
from lkd.training import DivergedError, TeacherFunction, Training

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
    teacher: TeacherFunction,
    run: Run,
    loss: nn.Module | None = None,
    first: int = 0,
) -> Pool:
    """Train students and keep them at several ages; students that are already there are not trained again.

    A student that diverges is kept at the ages before. Processes that have met share each training.

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
