"""The trials of a comparison: their options, their place, their cost and their result."""

import ctypes
import dataclasses
import gc
import glob
import hashlib
import itertools
import json
import random
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from lkd.balance.balancing import build_balance
from lkd.config.evaluation import CompareRecipe, FidelityRecipe
from lkd.config.parse import make_recipe
from lkd.config.parts import DataRecipe, ModelRecipe, TeacherRecipe, TrainRecipe
from lkd.core.errors import UserError
from lkd.core.files import find_pretrained, flatten, hash_file, write_json
from lkd.core.tensor_files import read_result, write_result
from lkd.core.workers import count_threads, hold_lease, own_device
from lkd.losses.build import is_learned
from lkd.losses.learned.file import LossFile, was_learned
from lkd.losses.learned.trust import Trust
from lkd.models.teacher import TeacherFunction
from lkd.tracking.remote import fetch_named
from lkd.tracking.run import describe_device, shorten_paths
from lkd.training.answers import measure_teacher, prepare_teacher
from lkd.training.build import Images, LossBuilder, OpenedTeacher, choose_student, open_teacher, prepare_images
from lkd.training.distill import label_by_teacher, select_labelled, start_training
from lkd.training.evaluate import evaluate, guess
from lkd.training.training import DivergedError

# ----------------------------------------------------------------------------------------------------------------------
# What a training costs: seconds and memory of its steps, evaluation left out.


class Cost:
    """Seconds and peak memory of the blocks that `measured` encloses.

    `peak_mib` is the highest peak of a block above what was in use when this object was made. On CUDA memory is the
    allocator's. On Linux it is resident memory: before each block what the process has freed goes back to the system
    and the kernel's peak is reset, so that earlier trainings of the process do not count. Elsewhere it is None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self.peak_mib: float | None = None
        gc.collect()
        self.idle = self._reset()

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Count what happens within."""
        self._reset()
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds += time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated(self.device) / 2**20 if self.device.type == "cuda" else resident("VmHWM")
        if self.idle is not None and peak is not None:
            self.peak_mib = max(self.peak_mib or 0.0, peak - self.idle)

    def _reset(self) -> float | None:
        """Start a new peak; the memory in use, MiB."""
        if self.device.type == "cuda":
            torch.cuda.init()  # nothing of this process may have used it yet
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device) / 2**20
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        except (OSError, AttributeError, TypeError):
            return None
        return resident("VmRSS")


def resident(key: str) -> float | None:
    """An entry of this process's status, MiB; None where the system has none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(key)), None)


# ----------------------------------------------------------------------------------------------------------------------
# Methods of a comparison: their options, their grids, and which points of a grid a budget allows.

Method = dict[str, Any] | str
TRAIN = "train."
BALANCE = "balance."


def split_method(method: Method, train: TrainRecipe) -> tuple[Method, TrainRecipe]:
    """What `build_loss` takes, and the training with the method's own settings (`train: {learning_rate: 0.03}`)."""
    if isinstance(method, str):
        return method, train
    loss = {key: value for key, value in method.items() if key not in ("train", "grid", "balance")}
    return loss, dataclasses.replace(train, **method.get("train", {}))


def balance_of(method: Method) -> dict[str, Any] | str | None:
    """What `build_balance` takes."""
    return None if isinstance(method, str) else method.get("balance")


def expand_grid(method: Method) -> list[Method]:
    """Every point of a method's grid; the method itself if it has none."""
    if isinstance(method, str) or "grid" not in method:
        return [method]
    points = itertools.product(*method["grid"].values())
    return [place_point(method, dict(zip(method["grid"], point, strict=True))) for point in points]


def place_point(method: dict[str, Any], point: dict[str, Any]) -> dict[str, Any]:
    """A method with one point of its grid; keys that start with `train.` or `balance.` go into that part of it."""
    placed = {key: value for key, value in method.items() if key != "grid"}
    train = dict(placed.pop("train", {}))
    train |= {key.removeprefix(TRAIN): value for key, value in point.items() if key.startswith(TRAIN)}
    if weighed := {key.removeprefix(BALANCE): value for key, value in point.items() if key.startswith(BALANCE)}:
        balance = placed.get("balance", {})
        placed["balance"] = ({"name": balance} if isinstance(balance, str) else balance) | weighed
    placed |= {key: value for key, value in point.items() if not key.startswith((TRAIN, BALANCE))}
    return placed | ({"train": train} if train else {})


def format_options(method: dict[str, Any] | str) -> str:
    """A method's options as words; absolute paths are reduced to their last part."""
    method = shorten_paths(method)
    if isinstance(method, str):
        return method
    options = {key: value for key, value in method.items() if key not in ("name", "train")} | method.get("train", {})
    return " ".join([str(method.get("name")), *(f"{key}={value}" for key, value in options.items())])


def choose_points(recipe: CompareRecipe, label: str) -> list[Method]:
    """The points that a method is tuned over: its grid, or as much of it as the budget allows.

    The first point has the method's own options, given beside the grid, where the grid holds them, and each list's
    first value elsewhere. Every further one is the point whose values have been used least so far, so that the values
    of each option are tried equally often; a seeded shuffle breaks ties.
    """
    method = recipe.methods[label]
    grid = expand_grid(method)
    budget = recipe.tuning_trainings // recipe.tuning_seeds
    if isinstance(method, str) or not recipe.tuning_trainings or len(grid) <= budget:
        return grid
    options: dict[str, list[Any]] = method["grid"]
    own = method | {f"{TRAIN}{key}": value for key, value in dataclasses.asdict(recipe.train).items()}
    own |= {f"{TRAIN}{key}": value for key, value in method.get("train", {}).items()}
    balance = method.get("balance") or {}
    balance = {"name": balance} if isinstance(balance, str) else balance
    own |= {f"{BALANCE}{key}": value for key, value in balance.items()}
    first = tuple(
        values.index(own[name]) if name in own and own[name] in values else 0 for name, values in options.items()
    )
    points = list(itertools.product(*(range(len(values)) for values in options.values())))
    random.Random(f"{recipe.seed}/{label}").shuffle(points)
    used: Counter[tuple[int, int]] = Counter()
    chosen: list[tuple[int, ...]] = []
    while len(chosen) < budget:
        point = min(points, key=lambda p: sum(used[place] for place in enumerate(p))) if chosen else first
        points.remove(point)
        used.update(enumerate(point))
        chosen.append(point)
    return [
        place_point(method, {name: values[place] for (name, values), place in zip(options.items(), p, strict=True)})
        for p in sorted(chosen)
    ]


def check_tuning(recipe: CompareRecipe) -> None:
    """Check the budget and the form of every grid and every training of a method's own."""
    if recipe.tuning_trainings and recipe.tuning_trainings < recipe.tuning_seeds:
        raise UserError(
            f"tuning_trainings: {recipe.tuning_trainings} is not at least tuning_seeds, {recipe.tuning_seeds}; "
            "0 trains the full grid of every method"
        )
    for label, method in recipe.methods.items():
        if isinstance(method, str):
            continue
        grid, train = method.get("grid", {}), method.get("train", {})
        for key, value in (("grid", grid), ("train", train)):
            if not isinstance(value, dict):
                raise UserError(f"methods.{label}.{key}: {value!r} is not a mapping, such as {{option: ...}}")
        for name, values in grid.items():
            if not isinstance(values, list) or not values or any(values.count(value) > 1 for value in values):
                raise UserError(f"methods.{label}.grid.{name}: {values!r} is not a list of values to try, each once")
            for value in values if name.startswith(TRAIN) else []:
                make_recipe(TrainRecipe, {name.removeprefix(TRAIN): value}, f"methods.{label}.grid.train")
        make_recipe(TrainRecipe, train, f"methods.{label}.train")


# ----------------------------------------------------------------------------------------------------------------------
# One trial: a training, its place, and its result.

Row = dict[str, Any]
ROW_FORMAT = 2  # of a trial's result; results of another format are not read


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training of a comparison."""

    method: str  # its label
    loss: Method  # with a `train` and a `balance` of its own where the method has one
    student: ModelRecipe
    seed: int  # of initial weights and batches; equal seeds are paired over methods
    reported: bool  # whether the test split is read, or only meta-validation (tuning)


def trial_path(recipe: CompareRecipe, trial: Trial, folder: Path) -> Path:
    """Where a trial's result lies: named by all that decides it, so that a changed recipe never finds an old result.

    The number of threads, unless it is one, is the name's end, so that `describe_other_threads` finds the others.
    """
    train = dataclasses.asdict(split_method(trial.loss, recipe.train)[1])
    loss = flatten(trial.loss if isinstance(trial.loss, dict) else {"name": trial.loss})
    learned = hash_content(str(loss["name"]))
    cell = dataclasses.asdict(trial) | ({"loss": learned} if learned else {})
    start = cell["student"].pop("path")
    if start:
        cell["student"]["path"] = hash_content(start)
    identity = {
        "format": ROW_FORMAT,
        "cell": cell,
        **identify_inputs(recipe),
        "train": {name: value for name, value in train.items() if not name.startswith("checkpoint")},
        "every": recipe.evaluate_every,
        **{key: found for key in ("weights", "loss", "loss.name") if (found := hash_content(str(loss.get(key))))},
        **({"labelled": recipe.labelled_size} if recipe.labelled_size else {}),
    }
    if learned and isinstance(trial.loss, dict):
        identity |= {key: trial.loss[key] for key in ("balance", "adapters") if trial.loss.get(key)}
    kind = "report" if trial.reported else "tune"
    label = "".join(letter if letter.isalnum() else "-" for letter in trial.method)
    threads, student = count_threads(recipe.threads), trial.student.name.replace("/", "-")
    end = hash_identity(identity) + (f"-threads{threads}" if threads != 1 else "")
    return folder / "cells" / f"{kind}-{label}-{student}-seed{trial.seed}-{end}.json"


def describe_other_threads(paths: Iterable[Path]) -> list[str]:
    """A line where results that are missing are there with other numbers of threads: those are not read."""
    found: Counter[int] = Counter()
    for path in paths:
        stem = re.sub(r"-threads\d+$", "", path.stem)
        others = [] if path.exists() else path.parent.glob(f"{glob.escape(stem)}*.json")
        found.update(int(other.stem.removeprefix(f"{stem}-threads")) if other.stem != stem else 1 for other in others)
    counts = ", ".join(f"{count} with {threads}" for threads, count in sorted(found.items()))
    return [f"threads: trainings with another number, which decides digits, are not used: {counts}"] if found else []


def identify_inputs(recipe: CompareRecipe | FidelityRecipe) -> dict[str, Any]:
    """Images and teacher as they decide a result: not where images lie; a teacher by its file's content."""
    data, teacher = dataclasses.asdict(recipe.data), dataclasses.asdict(recipe.teacher)
    for part, name in ((data, "class_map"), (teacher, "path"), (teacher, "classes")):
        part[name] = hash_content(str(part[name])) or part[name]
    if recipe.teacher.classes is None:  # results from before it was a setting stay good
        del teacher["classes"]
    usual = dataclasses.asdict(DataRecipe())
    if recipe.data.crop_pct == usual["crop_pct"]:
        del data["crop_pct"]
    alike = {name: usual[name] for name in ("root", "workers", "read_timeout", "evaluation_batch_size")}
    return {"data": data | alike, "teacher": teacher}


def hash_identity(identity: dict[str, Any]) -> str:
    """Twelve hex digits of what decides a result."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def was_method_learned(method: Method) -> bool | None:
    """Whether a method's learned loss is another than its meta-training began with; None of a hand-made loss."""
    name = method["name"] if isinstance(method, dict) else method
    path = fetch_named(name)
    return was_learned(LossFile.read(path).header) if is_learned(path) else None


def hash_content(path: str) -> str | None:
    """The hash of a file, or of a learned loss that the package carries, None where there is none of that name."""
    file = find_pretrained(path) or Path(path)
    return hash_file(file) if file.is_file() else None


@dataclasses.dataclass(frozen=True)
class TrialInputs:
    """Images and teacher, opened once a process for all its trials."""

    images: Images
    teacher: OpenedTeacher
    prepared: dict[tuple[str, tuple[str, ...]], TeacherFunction] = dataclasses.field(default_factory=dict)
    measured: dict[tuple[str, int], Trust] = dataclasses.field(default_factory=dict)

    def measure(self, device: str, labelled_size: int = 0) -> Trust:
        """What losses are told that read trust, of so many images whose labels are known; 0 for all."""
        key = device, labelled_size
        if key not in self.measured:
            known, place = select_labelled(self.images, labelled_size), torch.device(device)
            self.measured[key] = measure_teacher(self.teacher, known, place, self.answers(device, ()))
        return self.measured[key]

    def answers(self, device: str, stages: tuple[str, ...]) -> TeacherFunction:
        """What answers the losses that read these stages."""
        key = device, stages
        if key not in self.prepared:
            self.prepared[key] = prepare_teacher(self.teacher, self.images, torch.device(device), stages)
        return self.prepared[key]


def open_inputs(recipe: CompareRecipe | FidelityRecipe) -> TrialInputs:
    """The images and the teacher of a recipe."""
    return open_once(*(json.dumps(dataclasses.asdict(part)) for part in (recipe.data, recipe.teacher)))


@lru_cache(maxsize=8)
def open_once(data: str, teacher: str) -> TrialInputs:
    """The inputs of two recipes, given as JSON."""
    images = prepare_images(DataRecipe(**json.loads(data)))
    return TrialInputs(images, open_teacher(TeacherRecipe(**json.loads(teacher)), images.train))


def plan_tuning(recipe: CompareRecipe) -> list[Trial]:
    """The trials that tuning needs: the points of every grid, with the first seeds and the first student."""
    points = {label: choose_points(recipe, label) for label in recipe.methods}
    return [
        Trial(label, options, recipe.students[0], recipe.seed + offset, reported=False)
        for offset in range(recipe.tuning_seeds)
        for label in recipe.methods
        for options in points[label]
        if len(points[label]) > 1
    ]


def pick_options(recipe: CompareRecipe, folder: Path) -> dict[str, Method]:
    """Each method's options: the best of its points on meta-validation, in the mean over the tuning seeds.

    By accuracy; calibrated cross-entropy breaks ties.
    """
    trials = plan_tuning(recipe)
    picks: dict[str, Method] = {}
    for label in recipe.methods:
        ranked = []
        for options in choose_points(recipe, label):
            mine = [trial for trial in trials if trial.method == label and trial.loss == options]
            rows = [read_result(trial_path(recipe, trial, folder))["meta_validation"] for trial in mine]
            ranked.append(
                (-sum(row["top1"] for row in rows), sum(row["calibrated_cross_entropy"] for row in rows), options)
            )
        picks[label] = min(ranked, key=lambda entry: entry[:2])[2]
    write_json(folder / "picks.json", picks)
    return picks


def plan_report(recipe: CompareRecipe, picks: dict[str, Method]) -> list[Trial]:
    """The trials behind the table."""
    return [
        Trial(label, options, student, recipe.seed + offset, reported=True)
        for offset in range(recipe.seeds)
        for student in recipe.students
        for label, options in picks.items()
    ]


def run_leased(recipe: CompareRecipe, trial: Trial, path: Path, lease: Path, device: str) -> Row | None:
    """Run one trial if nobody else does; None if someone does, or did."""
    with hold_lease(path, lease) as ours:
        return run_trial(recipe, trial, path, device) if ours else None


def run_trial(recipe: CompareRecipe, trial: Trial, path: Path, device: str = "cpu") -> Row:
    """Run one trial and write its result.

    The test split is read only if the trial is reported: at the last and the best epoch. A training that diverges is a
    result too: that of guessing.
    """
    device = own_device(device)
    place = torch.device(device)
    inputs = open_inputs(recipe)
    images = inputs.images
    specification, train = split_method(trial.loss, recipe.train)
    student = choose_student(trial.student, images.train)
    loss = LossBuilder(specification, inputs.teacher, images).build(student, trial.seed)
    asked = loss.needs_teacher or recipe.labelled_size
    teacher = inputs.answers(device, loss.teacher_stages) if asked else None
    started = time.perf_counter()
    cost = Cost(place)
    balance = build_balance(balance_of(trial.loss), loss)
    trust = inputs.measure(device, recipe.labelled_size) if loss.reads_trust else None
    if trust:
        loss.set_trust(trust)
    labelled = label_by_teacher(images, recipe.labelled_size, teacher, place) if teacher else images
    taught = teacher if loss.needs_teacher else None
    training = start_training(student, labelled, loss, taught, train, trial.seed, place, balance=balance)
    weights: list[float] = []
    best: dict[str, Any] = {"top1": -1.0}
    best_weights: dict[str, torch.Tensor] = {}
    every = recipe.evaluate_every * training.batches.steps_per_epoch if trial.reported else training.total_steps
    diverged_at = None
    while training.step < training.total_steps:
        left = training.total_steps - training.step
        try:
            with cost.measured():
                for _ in range((left - 1) % every + 1):
                    training.run_step()
            figures = {"step": training.step, **evaluate(training.result, images.meta_validation, place)}
        except DivergedError:
            diverged_at = training.step
            figures = {"step": training.step, **guess(images.meta_validation)}
            break
        if training.balance:
            weights.append(training.balance.weight)
        if figures["top1"] > best["top1"]:
            best = figures
            best_weights = {name: tensor.clone() for name, tensor in training.result.state_dict().items()}
    row: Row = {
        **dataclasses.asdict(trial),
        "student": trial.student.name,
        "meta_validation": figures,
        "best_step": best.get("step", 0),
        "seconds": time.perf_counter() - started,
        "threads": torch.get_num_threads(),
        "device": describe_device(training.batches.device),
        "steps_per_second": training.step / cost.seconds,
        "learned": was_method_learned(trial.loss),
        "loss_parameters": sum(parameter.numel() for parameter in training.loss.parameters()),
        "peak_mib": cost.peak_mib,
    }
    if trust:
        row["trust"] = trust.figures.to_json()
    if weights:
        row["balance_weights"] = weights
    if diverged_at is not None:
        row["diverged_at"] = diverged_at
    if trial.reported:
        row["last"] = row["best"] = guess(images.test)
        try:
            if diverged_at is None:
                row["last"] = evaluate(training.result, images.test, place)
            if diverged_at is None and best["step"] == training.step:
                row["best"] = row["last"]
            elif best_weights:
                training.result.load_state_dict(best_weights)
                row["best"] = evaluate(training.result, images.test, place)
        except DivergedError:  # of test images alone: what is left counts as guessing
            row["diverged_at"] = training.step
    write_result(path, row)
    return row
