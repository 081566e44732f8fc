"""Which files a run was made of, which runs made these, and so on."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lkd.reporting.runs import RunRecord, read_dict, read_rows
from lkd.reporting.settings import flatten, show_path
from lkd.tensor_files import HEADER_KEY

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
