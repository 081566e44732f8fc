"""The pool: students at many ages, on disk, from which rollouts start.

After LKD's "uniform sampling of diverse previously-trained student models"; which ages, and that the optimiser's state
is kept too, is *our reconstruction*.
"""

import copy
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lkd.config.meta_training import PoolContents, PoolSettings
from lkd.config.parts import TrainRecipe
from lkd.core.distributed import any_process, count_processes, own_rank, wait_for_all, wait_for_slowest
from lkd.core.errors import DamagedFileError, UserError
from lkd.core.files import hash_file, read_mapping, refusing_malformed, write_json
from lkd.core.interrupt import Interrupted, deferred_interrupts
from lkd.core.tensor_files import read_tensors, write_tensors
from lkd.losses.learned.loss import LearnedLoss
from lkd.losses.learned.trust import Trust
from lkd.losses.loss import DistillationLoss
from lkd.models.teacher import TeacherFunction
from lkd.tracking.run import Run
from lkd.training.build import Images, StudentBuilder
from lkd.training.checkpoints import Checkpoints, run_steps
from lkd.training.distill import start_training
from lkd.training.optimizer import scale_learning_rate
from lkd.training.training import DivergedError, Training
from meta import State
from meta.optim import read_slots


@dataclass(frozen=True)
class World:
    """What one rollout happens in.

    Attributes:
        images: The images.
        teacher: From a batch to the teacher's outputs.
        student: What builds students.
        train: Their whole training.
        seed: Of all that is drawn.
        device: Where tensors go.
        name: What it is called among several; "" for the only one.
        trust: What was measured of teacher and labels, for losses that read it.
    """

    images: Images
    teacher: TeacherFunction
    student: StudentBuilder
    train: TrainRecipe
    seed: int
    device: torch.device
    name: str = ""
    trust: Trust = field(default_factory=Trust)

    def start(self, loss: DistillationLoss, seed: int, shared: bool = False) -> Training:
        """A fresh training; see `start_training`."""
        if loss.reads_trust:
            loss.set_trust(self.trust)
        return start_training(self.student, self.images, loss, self.teacher, self.train, seed, self.device, shared)


# ----------------------------------------------------------------------------------------------------------------------
# A student of the pool as a file.

KIND, VERSION = "pool student", 1
SLOTS = ("momentum_buffer", "step", "exp_avg", "exp_avg_sq")  # of SGD, or of Adam and AdamW


class PoolStudent(NamedTuple):
    """A student as it was at some age.

    Attributes:
        state: Parameters, buffers and the optimiser's state.
        learning_rate: Of its next step; in a warm-up, the one that this goes up to.
        progress: Its age: the part of its training that was over, in [0, 1].
        whole_rate: The learning rate of its training where the schedule takes nothing off; NaN in older pools.
    """

    state: State
    learning_rate: float
    progress: float
    whole_rate: float = math.nan

    def restore(self, network: nn.Module) -> None:
        """Give a network of its architecture this student's parameters and buffers."""
        whole = {**self.state.parameters, **self.state.buffers}
        missing, _ = network.load_state_dict(whole, strict=False)  # a normalisation is a buffer that no state dict has
        assert not missing, missing

    def rate_in(self, train: TrainRecipe) -> float:
        """The learning rate that a training with another one has at this age, by this student's schedule."""
        scaled = self.learning_rate * (scale_learning_rate(train) / self.whole_rate)
        return self.learning_rate if math.isnan(self.whole_rate) else scaled


def split_state(network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A network's parameters that are trained, and what is not: buffers, and parameters that are frozen."""
    named = list(network.named_parameters())
    frozen = {name: parameter.detach() for name, parameter in named if not parameter.requires_grad}
    return {name: p for name, p in named if p.requires_grad}, {**dict(network.named_buffers()), **frozen}


def write_student(path: Path, training: Training) -> None:
    """Write a training's student as it is now."""
    parameters, buffers = split_state(training.student)
    slots = read_slots(training.optimizer, training.student)
    parts: dict[str, dict[str, Any]] = {"parameters": parameters, "buffers": buffers, **slots}
    tensors: dict[str, Tensor] = {f"{part}:{name}": x for part, each in parts.items() for name, x in each.items()}
    recipe = training.recipe
    warming = training.step < (recipe.warmup_steps or recipe.warmup_epochs * training.batches.steps_per_epoch)
    # A rollout at a rate of next to nothing would learn nothing, and its hypergradient would vanish.
    rate = scale_learning_rate(recipe) if warming else training.learning_rate
    header = {"learning_rate": rate, "progress": training.progress, "step": training.step}
    header["whole_rate"] = scale_learning_rate(recipe)
    write_tensors(path, tensors, KIND, VERSION, header)


def read_student(path: Path, network: nn.Module) -> PoolStudent:
    """Read a student of a network's architecture, to where that lies."""
    tensors, header = read_tensors(path, KIND, VERSION)
    parameters, buffers = split_state(network)
    count = dict.fromkeys(parameters, torch.zeros(()))
    like = {"parameters": parameters, "buffers": buffers, **dict.fromkeys(SLOTS, parameters), "step": count}
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in like}
    with refusing_malformed(path, KIND):
        for key, tensor in tensors.items():  # in the file's order, which sums over all parameters depend on
            part, _, name = key.partition(":")
            expected = like[part][name]
            if (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
                raise ValueError(f"{name} is {tuple(tensor.shape)}, not {tuple(expected.shape)}")
            parts[part][name] = tensor.to(expected.device)
        slots = {slot: found for slot in SLOTS if (found := parts.pop(slot))}
        if missing := [name for part in parts for name in like[part].keys() - parts[part]]:
            raise ValueError(f"{missing[0]} is missing")
        if any(found.keys() != next(iter(slots.values())).keys() for found in slots.values()):
            raise ValueError(f"{', '.join(slots)} are not kept of the same parameters")
        state = State(**parts, optimizer=slots)
        learning_rate, progress = float(header["learning_rate"]), float(header["progress"])
        whole_rate = float(header.get("whole_rate", math.nan))
        if not (0 <= learning_rate < math.inf and 0 <= progress <= 1) or whole_rate <= 0 or whole_rate == math.inf:
            raise ValueError(f"learning_rate {learning_rate} of {whole_rate}, progress {progress}")
    return PoolStudent(state, learning_rate, progress, whole_rate)


# ----------------------------------------------------------------------------------------------------------------------
# A pool of one architecture.

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

    def read(self, position: int, network: nn.Module) -> PoolStudent:
        """Read the student at this position of the index, of this network's architecture, to where that lies."""
        try:
            return read_student(self.folder / self.index["students"][position]["file"], network)
        except DamagedFileError as error:
            raise UserError(f"{error}; delete {self.folder}, and --resume auto trains its students again") from error


def open_pool(folder: Path, images: Images, architecture: dict[str, Any]) -> Pool:
    """Open a pool, checked to be of this network and of this split: others' students may have seen meta-validation."""
    if not (folder / INDEX).is_file():
        raise UserError(f"pool_dir: {folder} holds no pool (no {INDEX}); `lkd pool` makes one")
    index = read_mapping(folder / INDEX)
    with refusing_malformed(folder / INDEX, "index of a pool"):
        split, name = index["split"], index["architecture"]["name"]
        for entry in index["students"]:
            file, training, progress = entry["file"], entry["training"], entry["progress"]
            if Path(file).name != file or file in ("", ".."):
                raise ValueError(f"file {file!r} is not a name of a file in the pool's folder")
            if type(training) is not int or not 0 <= progress <= 1:
                raise ValueError(f"training {training!r}, progress {progress!r}")
    if split != images.fingerprint:
        raise UserError(
            f"pool_dir: {folder} was made on another split of the data ({split}, not {images.fingerprint}): "
            "its students may have seen meta-validation images; make it anew with this data recipe"
        )
    if index["architecture"] != architecture:
        raise UserError(f"pool_dir: {folder} holds {name} students, not {architecture['name']}")
    return Pool(folder, index)


BuildLoss = Callable[[StudentBuilder, int], DistillationLoss]
"""A loss of its own for a student and a seed: `LossBuilder.build`."""


def build_pool(
    world: World,
    settings: PoolContents,
    build_loss: BuildLoss,
    folder: Path,
    run: Run,
    first: int = 0,
    shared: bool = True,
) -> Pool:
    """Train students and keep them at several ages; students that are already there are not trained again.

    A student that diverges is kept at the ages before. `first`: number of the first training; equal numbers give equal
    initial weights and batches. `shared`: whether the processes that have met share each training; else this one does
    it alone.

    Raises:
        Interrupted: On Ctrl-C or SIGTERM; finished students stay, and the one in training goes on later.
    """
    architecture, split = world.student.architecture, world.images.fingerprint
    index: dict[str, Any] = {"students": [], "architecture": architecture, "split": split}
    if (folder / INDEX).exists():
        try:
            index = open_pool(folder, world.images, architecture).index
        except DamagedFileError as error:
            run.say(f"warning: {error}; its students are trained again")
    done = {entry["training"] for entry in index["students"]}
    numbers = range(first, first + settings.students)
    with deferred_interrupts() as stop:
        for number in tqdm(numbers, desc="pool", unit="student", disable=run.hide_bars):
            checkpoints = Checkpoints(folder / f"checkpoints-{number:03d}", world.train, run.say, shared)
            if number in done:
                checkpoints.remove()  # of one that was killed just before
                continue
            seed = world.seed + 1000 * (number + 1)
            training = world.start(build_loss(world.student, seed), seed, shared)
            checkpoints.resume_training(training)
            for step in list_snapshots(settings, training.total_steps):
                try:
                    for _ in run_steps(training, step, stop, checkpoints):
                        pass
                    if training.step == step:
                        check_finite(training, shared)
                except DivergedError as error:
                    run.say(f"warning: student {number} of the pool has no ages after this: {error}")
                    break
                name = f"student-{number:03d}-step-{step:06d}.safetensors"
                if training.step == step and checkpoints.writes:  # else it was written before the checkpoint
                    write_student(folder / name, training)
                index["students"].append({"file": name, "training": number, "progress": step / training.total_steps})
            if checkpoints.writes:
                for entry in index["students"]:  # by which the pool is known
                    entry.setdefault("sha256", hash_file(folder / entry["file"]))
                write_json(folder / INDEX, index)
                checkpoints.remove()
    if shared:
        wait_for_all()
    return Pool(folder, index)


def check_finite(training: Training, shared: bool = False) -> None:
    """Check a student after a step: the loss before it says nothing of the weights after it.

    `shared`: whether processes train it together, whose BatchNorm has statistics of its own: all of them say the same.

    Raises:
        DivergedError: If a weight or a buffer is not finite.
    """
    state = training.student.state_dict()
    broken = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if any_process(bool(broken), training.batches.device) if shared else broken:
        name = broken[0] if broken else "a buffer of another process"
        raise DivergedError(f"step {training.step}: {name} is not finite; lower train.learning_rate")


def list_snapshots(settings: PoolContents, total_steps: int) -> list[int]:
    """The steps at which a student is kept."""
    steps = torch.linspace(0, settings.max_age, settings.snapshots) * total_steps
    return sorted({round(step) for step in steps.tolist()})


def find_oldest(settings: PoolContents) -> float:
    """The age up to which students are trained."""
    return settings.max_age if settings.snapshots > 1 else 0.0


# ----------------------------------------------------------------------------------------------------------------------
# The pools of all worlds that a loss is learned in, and their renewal while the loss improves.

LIVE = "live"  # the folder of renewed pools


def list_folders(worlds: Sequence[World], folder: Path) -> list[Path]:
    """Where each pool is: the folder itself if there is one, else in it, by the world's name or number."""
    if len(worlds) == 1:
        return [folder]
    return [folder / (world.name or str(number)) for number, world in enumerate(worlds)]


def open_pools(worlds: Sequence[World], folder: Path) -> list[Pool]:
    """Open the pool of each world; see `open_pool`."""
    places = zip(worlds, list_folders(worlds, folder), strict=True)
    return [open_pool(place, world.images, world.student.architecture) for world, place in places]


def build_pools(
    worlds: list[World],
    settings: PoolContents,
    build_losses: Sequence[BuildLoss],
    folder: Path,
    run: Run,
    first: int = 0,
) -> list[Pool]:
    """Build the pool of each world, or finish it; see `build_pool`.

    Processes that have met share each training where there is one set of images; worlds with a name are shared out.
    """
    shared = not worlds[0].name
    places = list_folders(worlds, folder)
    stopped: Interrupted | None = None
    try:
        for number in range(len(worlds)):
            if shared or number % count_processes() == own_rank():
                build_pool(worlds[number], settings, build_losses[number], places[number], run, first, shared)
    except Interrupted as error:
        stopped = error
    if not shared:
        wait_for_slowest()
    if any_process(bool(stopped), run.device):  # those whose pools are done would wait for the others
        raise stopped or Interrupted("stopped while pools are built")
    return open_pools(worlds, folder)


def renew_pools(
    worlds: list[World], settings: PoolSettings, first_pools: list[Pool], loss: LearnedLoss, outer_step: int, run: Run
) -> list[Pool]:
    """The pools of sampling live at an outer step.

    Every `refresh_every` steps students with numbers of their own are trained with the loss as it is then, frozen; a
    run that is gone on with finds them in its folder. Until the first renewal `first_pools` are drawn from.

    Raises:
        Interrupted: On Ctrl-C or SIGTERM; finished students stay.
    """
    renewals, since = divmod(outer_step, settings.refresh_every)
    if not renewals:
        return first_pools
    folder = run.path / LIVE / name_renewal(outer_step - since)
    if since:
        return open_pools(worlds, folder)
    frozen = copy.deepcopy(loss).requires_grad_(False)
    first = renewals * settings.students
    builders = [lambda student, seed: copy.deepcopy(frozen)] * len(worlds)
    return build_pools(worlds, settings, builders, folder, run, first)


def drop_superseded_pools(settings: PoolSettings, outer_step: int, run: Run) -> None:
    """Delete renewed pools that a run which goes on from this outer step draws from no more."""
    for folder in (run.path / LIVE).glob("step-*"):
        if folder.name < name_renewal(outer_step - outer_step % settings.refresh_every):
            shutil.rmtree(folder)


def name_renewal(outer_step: int) -> str:
    """The folder of the pools that were renewed at an outer step; names sort by it."""
    return f"step-{outer_step:06d}"


def count_pool_trainings(settings: PoolSettings, first_pools: list[Pool], drawing_steps: int) -> float:
    """What the pools cost over so many outer steps that draw from them, renewals too, in units of one training."""
    renewals = max(drawing_steps - 1, 0) // settings.refresh_every if settings.sampling == "live" else 0
    renewed = renewals * settings.students * find_oldest(settings) * len(first_pools)
    return sum(pool.trainings for pool in first_pools) + renewed
