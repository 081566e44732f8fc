"""A run directory: config, versions, log and results, one process at a time."""

import dataclasses
import errno
import fcntl
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import torch

from lkd.config.evaluation import CompareRecipe
from lkd.config.parts import RunRecipe
from lkd.core.distributed import any_process, is_main, join_processes, place_of, read_job, wait_for_all
from lkd.core.errors import UserError
from lkd.core.files import (
    create_json,
    environment,
    find_differences,
    flatten,
    hash_file,
    read_json,
    read_mapping,
    write_json,
)
from lkd.core.workers import count_cores, read_quotas
from lkd.tracking.lineage import LINEAGE, find_replaced, is_same_content
from lkd.tracking.tracker import Tracker

SHARED_COMMANDS = ("distill", "teacher", "pool", "meta-train")  # which torchrun may start
FOLDER_COMMANDS = ("pool", "meta-train")  # of these, those whose processes all read the run directory
OPENED = {"lock", "config.json", "environment.json", "log.jsonl", "output.txt", "wandb", "wandb_run_id", "lineage.json"}
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)  # some of Lustre, NFS, FUSE
MAY_DIFFER_ON_RESUME = {  # what does not change results; threads change their last digits
    *("run_dir", "resume", "threads", "wandb", "trackio", "workers", "device", "join", "plugins", "report_test"),
    *("data.root", "data.workers", "data.read_timeout", "data.evaluation_batch_size", "data.damaged_limit"),
    *("train.checkpoint_every", "train.checkpoints_kept", "meta.checkpoint_every", "meta.picture_every"),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """An open run."""

    path: Path  # the run directory; only the main process writes there
    device: torch.device
    tracker: Tracker
    command: str  # that made the run, say `"distill"`
    quiet: bool  # whether the terminal belongs to someone else: no lines, no progress bars

    def say(self, *lines: str) -> None:
        """Print lines, and keep them in the run's `output.txt`; the main process's task alone."""
        if not is_main():
            return
        with (self.path / "output.txt").open("a", encoding="utf-8", errors="backslashreplace") as file:
            print(*lines, sep="\n", file=file)
        if not self.quiet:
            print(*lines, sep="\n", flush=True)

    @property
    def hide_bars(self) -> bool | None:
        """What tqdm's `disable` takes: None shows bars on a terminal only."""
        return True if self.quiet else None

    def provenance(self) -> dict[str, Any]:
        """Command, full config and versions: what is saved with every result. Folders of this machine are left out."""
        saved = read_json(self.path / "config.json") | {"environment": read_json(self.path / "environment.json")}
        return shorten_paths(saved)


@contextmanager
def open_run(recipe: RunRecipe, command: str, quiet: bool = False) -> Iterator[Run]:
    """Open a run directory for one command; make it, or go on in it with `resume: auto`."""
    job = read_job()
    if job.size > 1 and command not in SHARED_COMMANDS:
        raise UserError(f"torchrun: `lkd {command}` runs in one process; in several run {', '.join(SHARED_COMMANDS)}")
    device = place_of(choose_device(recipe.device))
    if recipe.threads or read_quotas():  # torch counts the machine's cores, of which a container may be granted few
        torch.set_num_threads(recipe.threads or min(torch.get_num_threads(), count_cores()))
    with join_processes(device):
        if job.rank == 0:
            with open_run_directory(recipe, command, device, quiet) as run:
                check_shared(run)
                yield run
        else:
            with tempfile.TemporaryDirectory() as folder:
                tracker = Tracker(Path(folder), None, {})  # of what the main process records too
                try:
                    run = Run(Path(recipe.run_dir), device, tracker, command, quiet=True)
                    check_shared(run)
                    yield run
                finally:
                    tracker.finish()


def check_shared(run: Run) -> None:
    """Check that every process sees the run directory, where the command needs it."""
    if run.command not in FOLDER_COMMANDS:
        return
    wait_for_all()
    if any_process(not (run.path / "config.json").exists(), run.device):
        raise UserError(f"run_dir: {run.path} is not there for all processes; give a folder that all hosts share")


@contextmanager
def open_run_directory(recipe: RunRecipe, command: str, device: torch.device, quiet: bool) -> Iterator[Run]:
    """Open a run directory in the process that owns it; see `open_run`."""
    path = Path(recipe.run_dir)
    joined = isinstance(recipe, CompareRecipe) and recipe.join
    config: dict[str, Any] = {"command": command, "recipe": dataclasses.asdict(recipe)}
    if recipe.plugins:
        config["plugins"] = hash_file(Path(recipe.plugins))
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / "lock").open("a+")  # a shared lock of NFS asks for reading
    except OSError as error:
        raise UserError(f"run_dir: {path} cannot be written: {error.strerror}") from error
    with lock:
        take_lock(lock, path, joined, command)
        new = create_json(path / "config.json", config) if joined else not (path / "config.json").exists()
        if not new:
            check_resumable(path, config, "auto" if joined else recipe.resume)
        surroundings = describe_surroundings(device)
        before: dict[str, Any] = {}
        with suppress(UserError):  # it is not there, or damaged: nothing to compare with
            before = {} if new else read_mapping(path / "environment.json")
        notes = describe_precision(recipe, device) + describe_changes(path, before, surroundings)
        if new or not joined:
            write_json(path / "config.json", config)
        if new or not joined or not (path / "environment.json").exists():
            write_json(path / "environment.json", surroundings)
        handlers: list[logging.Handler] = [] if quiet else [logging.StreamHandler()]
        with ExitStack() as opened:
            output = logging.FileHandler(path / "output.txt", encoding="utf-8", errors="backslashreplace", delay=True)
            for handler in (output, *handlers):
                logging.getLogger("lkd").addHandler(handler)
                opened.callback(handler.close)
                opened.callback(logging.getLogger("lkd").removeHandler, handler)
            for note in notes:
                logging.getLogger("lkd").warning("%s", note)
            try:
                tracker = Tracker(path, None if joined else recipe, config)
                opened.callback(tracker.finish)
                yield Run(path, device, tracker, command, quiet)
            except (UserError, OSError):
                if new and not joined:
                    forget_unstarted(path)
                raise


def check_resumable(path: Path, config: dict[str, Any], resume: str) -> None:
    """Check that a run directory that holds a run may be gone on with."""
    saved = read_mapping(path / "config.json")
    if resume == "never":
        raise UserError(
            f"run_dir: {path} already holds a run of `lkd {saved.get('command')}`; "
            "go on with it by --resume auto, or choose another --run_dir"
        )
    if saved.get("command") != config["command"]:
        raise UserError(
            f"run_dir: {path} holds a run of `lkd {saved.get('command')}`, not of `lkd {config['command']}`"
        )
    if saved.get("plugins") != config.get("plugins"):
        raise UserError(f"plugins: is not the file that the run in {path} was begun with; a resumed run keeps its code")
    if not isinstance(saved.get("recipe"), dict):
        raise UserError(f"{path / 'config.json'}: holds no recipe; begin anew with another --run_dir")
    for key, before, now in find_differences(saved["recipe"], config["recipe"]):
        may_differ = {key, key.split(".")[0]} & MAY_DIFFER_ON_RESUME
        if not may_differ and not is_same_content(path, saved["recipe"], config["recipe"], key):
            raise UserError(f"{key}: is {now!r}, but the run in {path} has {before!r}; a resumed run keeps its config")
    if replaced := find_replaced(path, config["recipe"]):
        raise UserError(
            f"{replaced[0]}: {replaced[1]} is not the file that the run in {path} was begun with; put that back, or "
            "begin anew with another --run_dir"
        )


def describe_surroundings(device: torch.device) -> dict[str, Any]:
    """What decides digits and is no part of a recipe: versions, platform, threads, the device."""
    return environment() | {"threads": torch.get_num_threads(), "device": describe_device(device)}


def describe_device(device: torch.device) -> str:
    """What a training's digits depend on: the GPU's name, or the instructions that torch uses on this CPU."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.backends.cpu.get_cpu_capability()})" if device.type == "cpu" else device.type


def describe_changes(path: Path, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line where the surroundings are not those that a run, or a cache, was begun with."""
    changes = [
        f"{key.removeprefix('versions.')} {new} (before {old})"
        for key, old, new in find_differences(before, now)
        if key in flatten(before)
    ]
    return [f"warning: {path} goes on with {', '.join(changes)}: its last digits may differ"] if changes else []


def describe_precision(recipe: RunRecipe, device: torch.device) -> list[str]:
    """A line where the GPU only emulates bfloat16, and the recipe leaves the choice or asks for it."""
    precision = getattr(getattr(recipe, "train", None), "precision", "float32")
    if precision == "float32" or not emulates_bfloat16(device):
        return []
    major, minor = torch.cuda.get_device_capability(device)
    chosen = "auto is float32 here" if precision == "auto" else "bfloat16 is slow here"
    return [
        f"train.precision: {chosen}: this GPU, of compute capability {major}.{minor}, only emulates bfloat16 (8.0 has "
        "it); float32 and bfloat16 can be asked for"
    ]


def emulates_bfloat16(device: torch.device) -> bool:
    """Whether this is a GPU of NVIDIA's without bfloat16 of its own, as T4 and V100: emulated, it is slow."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)


def forget_unstarted(path: Path) -> None:
    """Let a run that a mistake stopped before it did anything be started anew, with another config."""
    log = path / "log.jsonl"
    begun = (log.exists() and log.stat().st_size) or {entry.name for entry in path.iterdir()} - OPENED
    if not begun:
        (path / "config.json").unlink()
        (path / LINEAGE).unlink(missing_ok=True)


def take_lock(lock: TextIO, path: Path, joined: bool, command: str) -> None:
    """Lock a run directory: for this process alone, or, once a comparison has it, for those that join it too.

    Where its disk has no locks, it is warned that nothing keeps others out.
    """
    try:
        fcntl.flock(lock, (fcntl.LOCK_SH if joined else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            line = "warning: run_dir: %s is on a disk without file locks (%s): let no other process use it"
            logging.getLogger("lkd").warning(line, path, error.strerror)
            return
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise UserError(f"run_dir: {path} cannot be locked: {error.strerror}") from error
        hint = "; to share its work use --join" if command == "compare" and not joined else ""
        raise UserError(f"run_dir: {path} is in use by another process{hint}") from error
    if command == "compare":
        fcntl.flock(lock, fcntl.LOCK_SH)


def shorten_paths(tree: Any, here: Path | None = None) -> Any:
    """Absolute paths in a tree, reduced to their last part: a shared file should not tell where it was made.

    Paths below the folder `here` become relative to it.
    """
    if isinstance(tree, dict):
        return {key: shorten_paths(value, here) for key, value in tree.items()}
    if isinstance(tree, list):
        return [shorten_paths(value, here) for value in tree]
    if not isinstance(tree, str) or not tree.startswith("/"):
        return tree
    path = Path(tree)
    return str(path.relative_to(here)) if here and here in path.parents else path.name


def choose_device(name: str) -> torch.device:
    """`auto` is cuda where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device: {name!r} is not a device; cpu, cuda, mps, xpu or auto") from error
    there = {"cpu": 1}
    if torch.accelerator.is_available():
        there[torch.accelerator.current_accelerator().type] = torch.accelerator.device_count()  # type: ignore[union-attr]
    if (device.index or 0) >= there.get(device.type, 0):
        found = ", ".join(f"{count} {kind}" for kind, count in there.items())
        raise UserError(f"device: {name} was asked for, but torch sees {found}; use --device cpu")
    return device


def evidence(command: str, environment: dict[str, Any], figures: dict[str, float]) -> dict[str, Any]:
    """What `result.json` holds: the line that makes it again, what `lkd.core.files.environment` saw, the figures.

    Those that are NaN, as a standard error of one seed, are left out: JSON has no such number.
    """
    return {
        "command": command,
        "commit": environment["commit"],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": environment["versions"],
        "machine": environment["platform"],
        "figures": {name: value for name, value in figures.items() if value == value},
    }
