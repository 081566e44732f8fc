"""Run directories, as far as they can be read: logs, figures, settings, lineage."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lkd.config.parse import COMMANDS
from lkd.core.errors import UserError
from lkd.core.files import read_json
from lkd.core.tensor_files import HEADER_KEY

# ----------------------------------------------------------------------------------------------------------------------
# A run's log as curves, whatever state the file is in.


@dataclass
class Curve:
    """One metric over a run.

    Attributes:
        steps: In increasing order.
        times: Seconds since the epoch of each, NaN where the log does not say.
        values: As they were logged: they may be NaN or infinite.
    """

    steps: list[float]
    times: list[float]
    values: list[float]

    def __len__(self) -> int:
        return len(self.steps)


@dataclass
class Log:
    """What a run logged.

    Attributes:
        curves: Metric → curve, in the order of their first appearance.
        damaged: Lines that could not be read.
        times: Of the first and the last line, in seconds since the epoch; None if no line has one.
    """

    curves: dict[str, Curve] = field(default_factory=dict)
    damaged: int = 0
    times: tuple[float, float] | None = None


def read_curves(path: Path) -> Log:
    """Read `log.jsonl`.

    Lines of the same step add up; a metric that was logged again at a step, after a resume, counts as it was last
    written. Damaged lines are counted and skipped; a file that is not there is an empty log.
    """
    points: dict[str, dict[float, tuple[float, float]]] = {}
    damaged, times = 0, []
    try:
        file = path.open(encoding="utf-8", errors="replace")
    except OSError:
        return Log()
    with file:
        for line in file:
            row = parse_line(line)
            if row is None:
                damaged += 1
                continue
            step, time = row.pop("step"), row.pop("time", math.nan)
            times += [time] if math.isfinite(time) else []
            for name, value in row.items():
                points.setdefault(name, {})[step] = (time, value)
    curves = {}
    for name, found in points.items():
        steps = sorted(found)
        curves[name] = Curve(steps, [found[step][0] for step in steps], [found[step][1] for step in steps])
    return Log(curves, damaged, (min(times), max(times)) if times else None)


def parse_line(line: str) -> dict[str, float] | None:
    """The numbers of one line by name, `step` among them; None if it is no row of a log."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    numbers = {name: number for name, value in row.items() if (number := read_number(value)) is not None}
    return numbers if math.isfinite(numbers.get("step", math.nan)) else None


def read_number(value: Any) -> float | None:
    """A number as a float, infinite if it is too large for one; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def thin(curve: Curve, points: int) -> Curve:
    """At most about so many points: of equal stretches the least and the largest value and one that is not finite.

    Args:
        curve: The curve.
        points: How many to keep; ends are kept too, so that it may be a few more.
    """
    if len(curve) <= points:
        return curve
    kept = {0, len(curve) - 1}
    stretches = max(points // 3, 1)
    for number in range(stretches):
        places = range(len(curve) * number // stretches, len(curve) * (number + 1) // stretches)
        finite = [place for place in places if math.isfinite(curve.values[place])]
        kept |= {extreme(finite, key=curve.values.__getitem__) for extreme in (min, max) if finite}
        if len(finite) < len(places):
            kept.add(next(place for place in places if not math.isfinite(curve.values[place])))
    order = sorted(kept)
    return Curve(*([column[place] for place in order] for column in (curve.steps, curve.times, curve.values)))


# ----------------------------------------------------------------------------------------------------------------------
# Run directories, as far as they can be read.

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


# ----------------------------------------------------------------------------------------------------------------------
# Settings as flat text: what differs between runs, and which of them share their data.

BUNDLED = ("embedded", "fashion_mnist", "fashion_mnist_unseen", "fashion_mnist_rest", "cifar10", "cifar100")
DATA = ("data.name", "data.train_size", "data.meta_validation_size", "data.split_seed", "data.label_noise")
PLACES = ("run_dir", "wandb.name", "resume")  # differ between any two runs, and decide nothing
ABSENT = "—"


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as dotted keys; other values, and empty dicts, stay as they are."""
    if not isinstance(tree, dict) or (prefix and not tree):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def simplify(value: Any) -> Any:
    """A tree in which equal settings look alike: 4.0 is 4, and absolute paths are as `show_path` gives them."""
    if isinstance(value, dict):
        return {key: simplify(part) for key, part in value.items()}
    if isinstance(value, list):
        return [simplify(part) for part in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return int(value)
    return show_path(value) if isinstance(value, str) else value


def format_value(value: Any) -> str:
    """A setting as text: strings as they are, all else as JSON."""
    simple = simplify(value)
    return simple if isinstance(simple, str) else json.dumps(simple, ensure_ascii=False)


def show_path(text: str) -> str:
    """A path below the working directory relative to it; of other absolute paths the last part.

    A page that is passed on should not tell where it was made.
    """
    path = Path(text)
    if not path.is_absolute():
        return text
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) and path != here else path.name


def list_settings(run: RunRecord) -> dict[str, str]:
    """All settings of a run, with commit and versions, as text; a loss that is given by name alone has no options."""
    versions = run.environment.get("versions")
    software = {"commit": run.environment.get("commit"), "versions": versions if isinstance(versions, dict) else {}}
    flat = {"command": run.command} | flatten(run.recipe) | flatten(software)
    return {"loss.name" if key == "loss" else key: format_value(value) for key, value in flat.items()}


def find_differences(runs: Sequence[RunRecord]) -> tuple[list[list[str]], list[list[str]]]:
    """The settings that are not the same in all runs: rows of the key and each run's value.

    Returns:
        Those of which runs have different values, and those that only some runs have, with one value.
    """
    columns = [list_settings(run) for run in runs]
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = [[key, *(column.get(key, ABSENT) for column in columns)] for key in keys if key not in PLACES]
    differing = [row for row in rows if len({*row[1:]} - {ABSENT}) > 1]
    return differing, [row for row in rows if row not in differing and ABSENT in row[1:]]


def identify_data(run: RunRecord) -> dict[str, str]:
    """What must be equal for two runs' figures to be comparable: data set, split, label noise."""
    settings = flatten(run.recipe)
    keys = [*DATA, *(["data.root"] if settings.get("data.name") not in BUNDLED else [])]
    return {key.removeprefix("data."): str(settings[key]) for key in keys if settings.get(key) is not None}


def group_by_data(runs: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Runs over the same data, in the order of their first."""
    groups: dict[tuple[tuple[str, str], ...], list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(tuple(identify_data(run).items()), []).append(run)
    return list(groups.values())


def describe_data(run: RunRecord) -> str:
    """The data of a run in words."""
    data = identify_data(run)
    if "name" not in data:
        return "data of its own"
    sizes = [
        f"{'all' if data[key] == '0' else data[key]} {what} images"
        for key, what in (("train_size", "training"), ("meta_validation_size", "meta-validation"))
        if key in data
    ]
    noise = data.get("label_noise", "0")
    noisy = [f"{float(noise):.0%} of the training labels flipped" if is_number(noise) and float(noise) else ""]
    seed = [f"split seed {data['split_seed']}"] if "split_seed" in data else []
    root = [f"from {show_path(data['root'])}"] if "root" in data else []
    return ", ".join(part for part in [data["name"], *root, *sizes, *seed, *noisy] if part)


def is_number(text: str) -> bool:
    """Whether a text is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


# ----------------------------------------------------------------------------------------------------------------------
# Which files a run was made of, which runs made these, and so on.

SOURCES = ("teacher.path", "teacher.cache", "pool_dir", "checkpoint")  # settings that name what a run is made of
SUFFIXES = (".safetensors", ".pth")
DEPTH = 5


@dataclass
class Ancestor:
    """A file or folder that something was made of.

    Attributes:
        role: The setting that names it.
        name: Its name there.
        run: Label of the reported run that made it, if one did.
        facts: What its header says.
        ancestors: What it was made of in turn.
    """

    role: str
    name: str
    run: str | None = None
    facts: list[str] = field(default_factory=list)
    ancestors: list["Ancestor"] = field(default_factory=list)


def trace_run(run: RunRecord, runs: Sequence[RunRecord]) -> list[Ancestor]:
    """What a run was made of."""
    return trace_recipe(run.recipe, run.path, runs, DEPTH)


def trace_recipe(recipe: Any, folder: Path, runs: Sequence[RunRecord], depth: int) -> list[Ancestor]:
    """What a recipe's settings name; `folder` is where the run is, near which relative names are looked for."""
    if not depth:
        return []
    sources = {
        key: value
        for key, value in flatten(recipe).items()
        if isinstance(value, str) and value and (key in SOURCES or value.endswith(SUFFIXES))
    }
    return [trace_source(key, name, folder, runs, depth) for key, name in sources.items()]


def trace_source(role: str, name: str, folder: Path, runs: Sequence[RunRecord], depth: int) -> Ancestor:
    """One file or folder, with what its header, or the reported run that made it, tells."""
    found = Ancestor(role, show_path(name))
    path = find_near(name, folder)
    if path is None:
        return found
    holders = [run for run in runs if path.is_relative_to(run.path) and run.path != folder]
    made_by = max(holders, key=lambda run: len(run.path.parts), default=None)
    header = read_header(path)
    found.facts = describe_header(header)
    recipe = read_part(read_part(header, "provenance"), "recipe")
    if made_by is not None:
        found.run, recipe = made_by.label, made_by.recipe
    found.ancestors = trace_recipe(recipe, made_by.path if made_by else path.parent, runs, depth - 1)
    return found


def find_near(name: str, folder: Path) -> Path | None:
    """Where a name leads: from the working directory, or from the folders above a run, from where it was started."""
    for place in (Path.cwd(), *folder.parents):
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


def read_part(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """A dict inside a dict; empty if it is not there."""
    part = tree.get(key)
    return part if isinstance(part, dict) else {}


def describe_header(header: dict[str, Any]) -> list[str]:
    """A header in a few words: kind, network, what it reached, commit."""
    provenance, architecture = read_part(header, "provenance"), read_part(header, "architecture")
    last = read_part(read_part(provenance, "meta_validation"), "last").get("top1")
    students = read_rows(header.get("students"))
    reused = [row["top1"] for row in read_rows(provenance.get("reuse")) if isinstance(row.get("top1"), float)]
    commit = read_part(provenance, "environment").get("commit")
    facts = [
        header.get("kind"),
        architecture.get("name"),
        f"{len(students)} students" if students else None,
        f"{last:.2f} % on meta-validation" if isinstance(last, float) else None,
        f"{max(reused):.2f} % at best when reused" if reused else None,
        f"commit {commit}" if commit else None,
    ]
    return [str(fact) for fact in facts if fact]


# ----------------------------------------------------------------------------------------------------------------------
# The figures of runs by their logs: what was reached, and where the time went.

TRAINED = ("distill", "teacher")
PARTS = "time_share/"


def tabulate_trainings(runs: Sequence[RunRecord]) -> list[list[str]]:
    """A header and a row for each student and teacher: meta-validation at the last and at the best epoch."""
    header = ["run", "network", "loss", "top-1 last %", "top-1 best %", "calibrated CE last", "best"]
    rows = []
    for run in runs:
        top1 = run.log.curves.get("meta_validation/top1")
        calibrated = run.log.curves.get("meta_validation/calibrated_cross_entropy")
        figures = [*last_and_best(top1, max, "{:.2f}"), *last_and_best(calibrated, min, "{:.4f}")]
        loss = describe_loss(run.recipe.get("loss")) if run.command == "distill" else "cross_entropy"
        done = f"{len(top1) if top1 else 0} of {read_setting(run, 'train', 'epochs')}"
        rows.append([run.label, describe_network(run), loss, *figures, done, format_duration(run), state_of(run)])
    return [[*header, "epochs", "time", "state"], *rows]


def tabulate_learned(runs: Sequence[RunRecord]) -> list[list[str]]:
    """A header and a row for each meta-training: its loss when reused on fresh students, and how it changed."""
    header = ["run", "students", "reuse: calibrated CE first", "best", "last", "top-1 at best %", "outer value"]
    rows = []
    for run in runs:
        curves = run.log.curves
        reuse, top1 = curves.get("reuse/calibrated_cross_entropy"), curves.get("reuse/top1")
        last, best = last_and_best(reuse, min, "{:.4f}")
        at_best = ABSENT
        if reuse and top1 and finite_places(reuse):
            step = reuse.steps[min(finite_places(reuse), key=reuse.values.__getitem__)]
            at_best = f"{top1.values[top1.steps.index(step)]:.2f}" if step in top1.steps else ABSENT
        changes = [first_to_last(curves.get(name)) for name in ("outer/value", "loss/weight", "loss/temperature")]
        steps = curves.get("outer/value")
        done = f"{steps.steps[-1]:g} of {read_setting(run, 'meta', 'outer_steps')}" if steps else ABSENT
        first = f"{reuse.values[0]:.4f}" if reuse else ABSENT
        figures = [first, best, last, at_best, *changes]
        rows.append([run.label, describe_network(run), *figures, done, format_duration(run), state_of(run)])
    return [[*header, "weight α", "temperature τ", "outer steps", "time", "state"], *rows]


def read_setting(run: RunRecord, part: str, key: str) -> Any:
    """A nested setting; `ABSENT` if the recipe has none."""
    inner = run.recipe.get(part)
    return inner.get(key, ABSENT) if isinstance(inner, dict) else ABSENT


def finite_places(curve: Curve) -> list[int]:
    """Where a curve is finite."""
    return [place for place, value in enumerate(curve.values) if math.isfinite(value)]


def last_and_best(curve: Curve | None, best: Callable[..., int], form: str) -> tuple[str, str]:
    """The last value of a curve, and the first of its best with its step; `ABSENT` where there is none."""
    if curve is None:
        return ABSENT, ABSENT
    last, places = form.format(curve.values[-1]), finite_places(curve)
    if not places:
        return last, ABSENT
    place = best(places, key=curve.values.__getitem__)
    return last, f"{form.format(curve.values[place])} (step {curve.steps[place]:g})"


def first_to_last(curve: Curve | None) -> str:
    """How a curve changed."""
    return f"{curve.values[0]:.3g} → {curve.values[-1]:.3g}" if curve else ABSENT


def describe_network(run: RunRecord) -> str:
    """The network, or the networks, of a run."""
    several = [row.get("name") for row in run.recipe.get("students") or [] if isinstance(row, dict)]
    model = run.recipe.get("student") or run.recipe.get("model")
    one = model.get("name") if isinstance(model, dict) else None
    return ", ".join(map(str, several)) or str(one or ABSENT)


def describe_loss(loss: Any) -> str:
    """A loss in a few words: its name, or its file, and its options."""
    if isinstance(loss, str):
        return show_path(loss)
    if not isinstance(loss, dict):
        return ABSENT
    options = [
        f"{key}={describe_loss(value) if isinstance(value, dict) else format_value(value)}"
        for key, value in loss.items()
        if key != "name"
    ]
    return " ".join([show_path(str(loss.get("name", ABSENT))), *options])


def state_of(run: RunRecord) -> str:
    """Finished, or how far it has come; with what is wrong with its log."""
    words = ["finished"] if run.finished else ["not finished: running or cut off"]
    if not run.log.curves and run.command in (*TRAINED, "meta-train"):  # the others log at their end, if at all
        words.append("nothing logged")
    if run.log.damaged:
        words.append(f"{run.log.damaged} damaged log line{'s' * (run.log.damaged > 1)} skipped")
    return "; ".join(words)


def format_duration(run: RunRecord) -> str:
    """Time from the first to the last line of the log."""
    if run.log.times is None:
        return ABSENT
    seconds = run.log.times[1] - run.log.times[0]
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{seconds:.0f} s" if seconds < 600 else f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def time_shares(run: RunRecord) -> dict[str, float]:
    """Part of the steps' time by part; the mean over epochs, or over what was logged before the first one ended."""
    epochs = run.log.curves.get("meta_validation/top1")
    steps = set(epochs.steps) if epochs else set()
    shares = {}
    for name, curve in run.log.curves.items():
        if not name.startswith(PARTS):
            continue
        pairs = [(step, value) for step, value in zip(curve.steps, curve.values, strict=True) if math.isfinite(value)]
        chosen = [value for step, value in pairs if step in steps] or [value for _, value in pairs]
        if chosen:
            shares[name.removeprefix(PARTS)] = sum(chosen) / len(chosen)
    return shares


def images_per_second(run: RunRecord) -> str:
    """The median speed."""
    curve = run.log.curves.get("images_per_second")
    values = sorted(curve.values[place] for place in finite_places(curve)) if curve else []
    return f"{values[len(values) // 2]:,.0f}" if values else ABSENT
