"""Run directories, as far as they can be read: logs, figures, settings, lineage."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, median_high
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from lkd.config.parse import COMMANDS
from lkd.core.errors import UserError
from lkd.core.files import find_pretrained, flatten, read_json
from lkd.core.tensor_files import HEADER_KEY
from lkd.evaluation.comparison.trials import format_options
from lkd.losses.learned.file import NOT_LEARNED, mark_unlearned, was_learned
from lkd.tracking.lineage import list_sources
from lkd.tracking.run import shorten_paths
from lkd.tracking.tracker import read_log, read_rows

# Command → the file that it writes last.
RESULTS = {
    "distill": "student.safetensors",
    "teacher": "teacher.safetensors",
    "meta-train": "loss.lkd.safetensors",
    "pool": "pool/index.json",
}
TRAINED = ("distill", "teacher")
SCORE = "calibrated_cross_entropy"  # by which looks at reuse choose the loss to keep
ABSENT = "—"


class Point(NamedTuple):
    """What was logged of a metric at a step; the value may be NaN or infinite, the time NaN where the log has none."""

    step: int
    time: float  # seconds since the epoch
    value: float


Curve = list[Point]
"""One metric over a run, by step."""


def select_finite(curve: Curve | None) -> Curve:
    """The points of a curve whose value is finite."""
    return [point for point in curve or () if math.isfinite(point.value)]


def find_best(curve: Curve | None, best: Callable[..., Point]) -> Point | None:
    """The first of the least, or the largest, finite points."""
    return best(select_finite(curve), key=lambda point: point.value, default=None)


@dataclass
class Log:
    """What a run logged: metric → curve; `seconds` from the first to the last line, None if no line has a time."""

    curves: dict[str, Curve]
    damaged: int = 0  # lines that could not be read
    seconds: float | None = None
    start: float = 0.0


def read_curves(path: Path) -> Log:
    """Read `log.jsonl`; a file that is not there is an empty log. Damaged lines are counted and skipped."""
    curves: dict[str, Curve] = {}
    if not path.is_file():
        return Log(curves)
    times = []
    for row in read_log(path):
        step, time = row.pop("step"), read_number(row.pop("time", None))
        times += [time] if math.isfinite(time) else []
        for name, value in row.items():
            if type(value) in (int, float):
                curves.setdefault(name, []).append(Point(step, time, read_number(value)))
    damaged = sum(row is None for row in read_rows(path))
    return Log(curves, damaged, max(times) - min(times), min(times)) if times else Log(curves, damaged)


def read_number(value: Any) -> float:
    """A number as a float, infinite if it is too large for one; NaN for anything else."""
    try:
        return float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def thin(curve: Curve, points: int) -> Curve:
    """About so many points: the ends, and of equal stretches the least, the largest, and one that is not finite."""
    if len(curve) <= points:
        return curve
    kept, stretches = {curve[0], curve[-1]}, max(points // 3, 1)
    for number in range(stretches):
        part = curve[len(curve) * number // stretches : len(curve) * (number + 1) // stretches]
        kept |= {point for extreme in (min, max) if (point := find_best(part, extreme))}
        kept |= set([point for point in part if not math.isfinite(point.value)][:1])
    return sorted(kept, key=lambda point: point.step)


@dataclass(frozen=True)
class RunRecord:
    """What a run directory says. `environment` is empty if it does not say."""

    path: Path
    label: str  # its name, with as many of the folders above as tell it from the other runs'
    command: str
    recipe: dict[str, Any]
    environment: dict[str, Any]
    log: Log

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The recipe with dotted keys."""
        return flatten(self.recipe)

    @property
    def versions(self) -> dict[str, Any]:
        """Package → version."""
        return read_part(self.environment, "versions")

    @property
    def finished(self) -> bool:
        """Whether its result is there; a run that was cut off and one that still runs look alike."""
        if self.command != "pool":
            return (self.path / RESULTS.get(self.command, "result.json")).is_file()
        index = read_dict(self.path / RESULTS["pool"])
        trainings = {entry.get("training") for entry in list_dicts(index.get("students"))}
        return len(trainings) >= self.settings.get("pool.students", math.inf)

    @property
    def state(self) -> str:
        """Finished, or how far it has come; with what is wrong with its log."""
        words = ["finished"] if self.finished else ["not finished: running or cut off"]
        if not self.log.curves and self.command in (*TRAINED, "meta-train"):  # the others log at their end, if at all
            words.append("nothing logged")
        if self.log.damaged:
            words.append(f"{self.log.damaged} damaged log line{'s' * (self.log.damaged > 1)} skipped")
        return "; ".join(words)

    @property
    def duration(self) -> str:
        """Time from the first to the last line of the log."""
        seconds = self.log.seconds
        if seconds is None:
            return ABSENT
        hours, minutes = divmod(round(seconds / 60), 60)
        if seconds < 600:
            return f"{seconds:.0f} s"
        return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"

    @property
    def network(self) -> str:
        """The network, or the networks, of a run."""
        several = [str(row.get("name")) for row in list_dicts(self.recipe.get("students"))]
        return ", ".join(several) or str(self.settings.get("student.name") or self.settings.get("model.name") or ABSENT)

    @property
    def images_per_second(self) -> str:
        """The median speed."""
        values = [point.value for point in select_finite(self.log.curves.get("images_per_second"))]
        return f"{median_high(values):,.0f}" if values else ABSENT

    @property
    def epochs(self) -> Curve | None:
        """A curve of what is logged at the end of every epoch."""
        return self.log.curves.get("meta_validation/top1") or self.log.curves.get("learning_rate")

    @property
    def time_shares(self) -> dict[str, float]:
        """Mean part of the steps' time by part."""
        shares = {}
        for name, curve in self.log.curves.items():
            if name.startswith("time_share/") and (found := select_finite(curve)):
                shares[name.removeprefix("time_share/")] = mean(point.value for point in found)
        return shares


def read_runs(names: Sequence[str]) -> list[RunRecord]:
    """Read run directories, and the meta-training that a quickstart holds; each once."""
    if not names:
        raise UserError("runs: none given; name run directories, as in: lkd report runs/student")
    configs: dict[Path, dict[str, Any]] = {}
    for path in map(Path, names):
        configs[path.resolve()] = read_config(path)
        if configs[path.resolve()]["command"] == "quickstart":
            inner = path.resolve() / "adapted"
            configs |= {inner: read_config(inner)} if (inner / "config.json").exists() else {}
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
    """Read a run's `config.json`."""
    if not path.is_dir():
        raise UserError(f"runs: {path} is not a folder; name a run directory (--run_dir of an earlier command)")
    if not (path / "config.json").is_file():
        inner = [str(each.parent) for each in sorted(path.glob("*/config.json"))]
        named = f"; name some in it: {' '.join(inner[:5])}{' ...' * (len(inner) > 5)}" if inner else ""
        raise UserError(f"runs: {path} is not a run directory: it has no config.json{named}")
    config = read_json(path / "config.json")
    if not (isinstance(config, dict) and config.get("command") in COMMANDS and isinstance(config.get("recipe"), dict)):
        raise UserError(f"runs: {path / 'config.json'} is not one that an lkd command wrote")
    return config


def read_dict(path: Path) -> dict[str, Any]:
    """A JSON file's dict; empty if it is missing or damaged."""
    try:
        content = read_json(path)
    except (UserError, OSError):
        return {}
    return content if isinstance(content, dict) else {}


def read_part(tree: dict[str, Any], *keys: str) -> dict[str, Any]:
    """A dict inside dicts; empty if it is not there."""
    part: Any = tree
    for key in keys:
        part = part.get(key) if isinstance(part, dict) else None
    return part if isinstance(part, dict) else {}


def list_dicts(content: Any) -> list[dict[str, Any]]:
    """The dicts of a list; empty if it is none."""
    return [row for row in content if isinstance(row, dict)] if isinstance(content, list) else []


def name_apart(paths: Sequence[Path]) -> list[str]:
    """For each path the fewest of its last parts that no other path ends in."""
    names = []
    for path in paths:
        ends = [path.parts[-length:] for length in range(1, len(path.parts) + 1)]
        alone = (end for end in ends if sum(other.parts[-len(end) :] == end for other in paths) == 1)
        names.append(str(Path(*next(alone, path.parts))))
    return names


# ----------------------------------------------------------------------------------------------------------------------
# Settings as flat text: what differs between runs, and which of them share their data.

BUNDLED = ("embedded", "fashion_mnist", "fashion_mnist_unseen", "fashion_mnist_rest", "cifar10", "cifar100")
DATA = ("name", "train_size", "meta_validation_size", "split_seed", "label_noise", "root")
DATA_UNLESS = {"label_noise_kind": "symmetric", "meta_validation_noise": 0, "imbalance": 1}  # key → what says nothing
PLACES = ("run_dir", "wandb.name", "resume")  # differ between any two runs, and decide nothing


def simplify(value: Any) -> Any:
    """A tree in which equal settings look alike: 4.0 is 4; paths tell nothing of this machine's folders."""
    if isinstance(value, dict):
        return {key: simplify(part) for key, part in value.items()}
    if isinstance(value, list):
        return [simplify(part) for part in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return int(value)
    return shorten_paths(value, Path.cwd())


def format_value(value: Any) -> str:
    """A setting as text: strings as they are, all else as JSON."""
    simple = simplify(value)
    return simple if isinstance(simple, str) else json.dumps(simple, ensure_ascii=False)


def describe_loss(loss: Any, folder: Path = Path()) -> str:
    """A loss in a few words: its name, or its file, and its options, and whether that was not learned.

    `folder` is where its run is, near which its file is looked for.
    """
    if not isinstance(loss, str | dict):
        return ABSENT
    name = loss.get("name") if isinstance(loss, dict) else loss
    path = find_near(name, folder) if isinstance(name, str) else None
    return mark_unlearned(format_options(simplify(loss)), path is None or was_learned(read_header(path)))


def list_settings(run: RunRecord) -> dict[str, str]:
    """All settings of a run, with commit and versions, as text; a loss that is given by name alone has no options."""
    software = {"commit": run.environment.get("commit"), "versions": run.versions}
    flat = {"command": run.command} | run.settings | flatten(software)
    return {"loss.name" if key == "loss" else key: format_value(value) for key, value in flat.items()}


def find_differences(runs: Sequence[RunRecord]) -> list[list[str]]:
    """The settings of which runs have different values: rows of the key and each run's value."""
    columns = [list_settings(run) for run in runs]
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = [[key, *(column.get(key, ABSENT) for column in columns)] for key in keys if key not in PLACES]
    return [row for row in rows if len({*row[1:]} - {ABSENT}) > 1]


def identify_data(run: RunRecord) -> dict[str, str]:
    """What must be equal for two runs' figures to be comparable: data set, split, label noise, long tail."""
    found = {key: run.settings.get(f"data.{key}") for key in DATA}
    unusual = {key: run.settings.get(f"data.{key}") for key in DATA_UNLESS}
    found |= {key: value for key, value in unusual.items() if value != DATA_UNLESS[key]}
    if found["name"] in BUNDLED:
        del found["root"]
    worlds = {key: run.recipe.get(key) for key in ("worlds", "draw")}
    if worlds["worlds"] or read_part(worlds, "draw").get("worlds"):
        found["worlds"] = hashlib.sha256(json.dumps(worlds, sort_keys=True).encode()).hexdigest()[:8]
    return {key: str(value) for key, value in found.items() if value is not None}


def group_by_data(runs: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Runs over the same data, in the order of their first."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(str(identify_data(run)), []).append(run)
    return list(groups.values())


def describe_data(run: RunRecord) -> str:
    """The data of a run in words."""
    data = simplify(identify_data(run))
    name = data.pop("name", "data of its own")
    return ", ".join([name, *(f"{key} {value}".replace("_", " ") for key, value in data.items())])


# ----------------------------------------------------------------------------------------------------------------------
# Which files a run was made of, which runs made these, and so on.

DEPTH = 5


def trace_recipe(
    recipe: dict[str, Any], folder: Path, runs: Sequence[RunRecord], depth: int = DEPTH
) -> list[dict[str, Any]]:
    """What a recipe's settings name: the setting, the name, what is known of it, and what that was made of.

    `folder` is where the recipe's run is, near which relative names are looked for.
    """
    found = []
    for role, (_, name) in list_sources(recipe).items() if depth else ():
        path, facts, ancestors = find_near(name, folder), [], []
        if path:
            header = read_header(path)
            makers = [run for run in runs if path.is_relative_to(run.path) and run.path != folder]
            made_by = max(makers, key=lambda run: len(run.path.parts), default=None)
            facts = [*([f"made by {made_by.label}"] if made_by else []), *describe_header(header)]
            above = made_by.recipe if made_by else read_part(header, "provenance", "recipe")
            ancestors = trace_recipe(above, made_by.path if made_by else path.parent, runs, depth - 1)
        found.append({"role": role, "name": simplify(name), "facts": "; ".join(facts), "ancestors": ancestors})
    return found


def find_near(name: str, folder: Path) -> Path | None:
    """Where a name leads: into the package, from the folders above a run, or from the working directory."""
    if own := find_pretrained(name):
        return own
    for place in (*folder.absolute().parents, Path.cwd()):
        if (place / name).exists():
            return (place / name).resolve()
    return None


def read_header(path: Path) -> dict[str, Any]:
    """What a file of ours says of itself; empty if it is damaged or another's. A pool folder's index is its header."""
    if path.is_dir():
        return read_dict(path / "index.json")
    try:
        with safe_open(path, framework="pt") as opened:
            header = json.loads((opened.metadata() or {}).get(HEADER_KEY, "{}"))
    except (SafetensorError, OSError, ValueError):
        return {}
    return header if isinstance(header, dict) else {}


def describe_header(header: dict[str, Any]) -> list[str]:
    """A header in a few words: kind, network, what it reached, commit."""
    provenance = read_part(header, "provenance")
    last = read_part(provenance, "meta_validation", "last").get("top1")
    students = list_dicts(header.get("students"))
    looks = [row for row in list_dicts(provenance.get("reuse")) if {"top1", SCORE} <= row.keys()]
    reused = min(looks, key=lambda row: read_number(row[SCORE]), default=None)  # that of the loss which is kept
    commit = read_part(provenance, "environment").get("commit")
    facts = [
        header.get("kind"),
        read_part(header, "architecture").get("name"),
        f"{len(students)} students" if students else None,
        f"{last:.2f} % on meta-validation" if isinstance(last, float) else None,
        f"{read_number(reused['top1']):.2f} % when reused" if reused else None,
        None if was_learned(header) else NOT_LEARNED,
        f"commit {commit}" if commit else None,
    ]
    return [str(fact) for fact in facts if fact]
