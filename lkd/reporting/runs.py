"""Run directories, as far as they can be read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lkd.cli import COMMANDS
from lkd.errors import UserError
from lkd.files import read_json
from lkd.reporting.curves import Log, read_curves

# Command → the file that it writes last.
RESULTS = {
    "distill": "student.safetensors",
    "teacher": "teacher.safetensors",
    "meta-train": "loss.lkd.safetensors",
    "pool": "pool/index.json",
}


@dataclass(frozen=True)
class RunRecord:
    """What a run directory says.

    Attributes:
        path: The directory.
        label: Its name, with as many of the folders above as tell it from the other runs'.
        command: The command that made it.
        recipe: Its settings.
        environment: Versions, platform and commit; empty if it does not say.
        log: What it logged.
    """

    path: Path
    label: str
    command: str
    recipe: dict[str, Any]
    environment: dict[str, Any]
    log: Log

    @property
    def finished(self) -> bool:
        """Whether its result is there; a run that was cut off and one that still runs look alike."""
        if self.command != "pool":
            return (self.path / RESULTS.get(self.command, "result.json")).is_file()
        wanted, index = self.recipe.get("pool"), read_dict(self.path / RESULTS["pool"])
        trainings = {entry.get("training") for entry in read_rows(index.get("students"))}
        return isinstance(wanted, dict) and len(trainings) >= wanted.get("students", 1)


def read_runs(names: Sequence[str]) -> list[RunRecord]:
    """Read run directories, and the runs that a quickstart holds; each once.

    Raises:
        UserError: If there are none, or a folder is not a run.
    """
    if not names:
        raise UserError("runs: none given; name run directories, as in: lkd report runs/student")
    configs: dict[Path, dict[str, Any]] = {}
    for path in (Path(name) for name in names):
        configs[path.resolve()] = read_config(path)
        if configs[path.resolve()]["command"] == "quickstart":
            inner = sorted(path.resolve().glob("*/meta-train/config.json"))
            configs |= {config.parent: read_config(config.parent) for config in inner}
    return [
        RunRecord(
            path,
            label,
            config["command"],
            config["recipe"],
            read_dict(path / "environment.json"),
            read_curves(path / "log.jsonl"),
        )
        for (path, config), label in zip(configs.items(), name_apart(list(configs)), strict=True)
    ]


def read_config(path: Path) -> dict[str, Any]:
    """Read a run's `config.json`.

    Raises:
        UserError: If the folder is not a run.
    """
    if not path.is_dir():
        raise UserError(f"runs: {path} is not a folder; name a run directory (--run_dir of an earlier command)")
    if not (path / "config.json").is_file():
        raise UserError(f"runs: {path} is not a run directory: it has no config.json")
    config = read_json(path / "config.json")
    fits = isinstance(config, dict) and config.get("command") in COMMANDS and isinstance(config.get("recipe"), dict)
    if not fits:
        raise UserError(f"runs: {path / 'config.json'} is not one that an lkd command wrote")
    return config


def read_dict(path: Path) -> dict[str, Any]:
    """A JSON file's dict; empty if it is missing or damaged."""
    try:
        content = read_json(path)
    except (UserError, OSError):
        return {}
    return content if isinstance(content, dict) else {}


def read_rows(content: Any) -> list[dict[str, Any]]:
    """The dicts of a list; empty if it is none."""
    return [row for row in content if isinstance(row, dict)] if isinstance(content, list) else []


def name_apart(paths: Sequence[Path]) -> list[str]:
    """For each path the fewest of its last parts that no other path ends in."""
    names = []
    for path in paths:
        for length in range(1, len(path.parts) + 1):
            name = Path(*path.parts[-length:])
            if sum(other.parts[-length:] == name.parts for other in paths) == 1:
                break
        names.append(str(name))
    return names
