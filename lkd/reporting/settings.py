"""Settings as flat text: what differs between runs, and which of them share their data."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lkd.reporting.runs import RunRecord

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
