"""Which files a run used and which it made: `lineage.json`, by kind, name and hash."""

import dataclasses
import hashlib
import logging
import re
from pathlib import Path
from typing import Any

from lkd.core.errors import UserError
from lkd.core.files import PACKAGE, find_pretrained, flatten, hash_file, refusing_malformed
from lkd.core.tensor_files import read_result, write_result
from lkd.tracking.remote import fetch, is_remote

LINEAGE = "lineage.json"
EMBEDDED_TEACHER = PACKAGE / "data" / "embedded" / "teacher.safetensors"
FIELDS = {  # the last parts of a recipe's field that names a file → its kind
    "teacher.path": "teacher",
    "teacher.classes": "classes",
    "path": "network",
    "plugins": "code",
    "cache": "cache",
    "packed": "packed",
    "class_map": "classes",
    "pool_dir": "pool",
    "checkpoint": "network",
    "weights": "weights",
    "fidelity_file": "fidelity",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A file or folder that a run used or made."""

    kind: str  # images, teacher, pool, loss, student, network, cache, packed, classes, weights, fidelity or code
    name: str  # file name, or what names a network without a file
    sha256: str | None  # of its content, see `hash_folder`; None without a file
    path: Path | None  # None without a file

    @property
    def artifact(self) -> str:
        """Its name among a project's artifacts: equal files of several runs are versions of one."""
        return re.sub(r"[^\w.-]+", "-", f"{self.kind}-{self.name}")[:120]

    def describe(self) -> dict[str, Any]:
        """What is saved of it: nothing that tells of this machine's folders."""
        return {"kind": self.kind, "name": self.name, "sha256": self.sha256}


def identify(kind: str, path: str | Path, name: str | None = None) -> Entry:
    """Hash a file or folder; what is not there, as a network named by timm, has a name only."""
    found = Path(path)
    if not found.exists():
        return Entry(kind, name or str(path), None, None)
    return Entry(kind, name or found.name, hash_folder(found) if found.is_dir() else hash_file(found), found)


def list_sources(recipe: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """The files and folders that a recipe names: field → (kind, name)."""
    sources = {}
    students = recipe.get("students")
    flat = flatten(recipe | ({"students": dict(enumerate(students))} if isinstance(students, list) else {}))
    for field, name in flat.items():
        is_file = str(name).endswith(".safetensors") or is_remote(str(name)) or find_pretrained(str(name))
        above, last = field.split(".")[-2:] if "." in field else ("", field)
        kind = FIELDS.get(f"{above}.{last}") or FIELDS.get(last, "loss" if is_file else None)
        if (above, last) == ("influence", "weights"):  # says how
            continue
        is_unused = kind == "teacher" and flat.get(field.removesuffix("path") + "pretrained")
        is_span = kind == "classes" and re.fullmatch(r"\d+-\d+", str(name))
        if isinstance(name, str) and kind and not (is_unused or is_span):
            sources[field] = (kind, name)
    return sources


def find_used(recipe: dict[str, Any]) -> list[Entry]:
    """The files and folders that a recipe names, each once; those that lie elsewhere are fetched."""
    found: dict[tuple[str, str], Entry] = {}
    teacher = recipe.get("teacher", {})
    if teacher.get("pretrained"):
        found["teacher", teacher["name"]] = Entry("teacher", teacher["name"], None, None)
    for kind, name in list_sources(recipe).values():
        found[kind, name] = identify_source(kind, name)
    return list(found.values())


def identify_source(kind: str, name: str) -> Entry:
    """Hash a file or folder that a recipe names; one that lies elsewhere is fetched."""
    if name == "embedded":
        return identify(kind, EMBEDDED_TEACHER, name)
    path = fetch(name) if is_remote(name) else find_pretrained(name) or name
    return identify(kind, path, None if path == name else name)


def is_same_content(run: Path, before: dict[str, Any], now: dict[str, Any], field: str) -> bool:
    """Whether a dotted field names, under another name, a file or folder of the content that a run has used.

    A job that goes on may find its files in another place, such as a scratch folder of its own. The run's recipe is
    `before`, that which is to go on with it `now`.
    """
    sources, kept = list_sources(now), list_sources(before)
    if field not in sources or field not in kept:
        return False
    kind = kept[field][0]
    known, found = find_known(run, kept, field), identify_source(*sources[field])
    return len(known) == 1 and found.kind == kind and found.sha256 is not None and {found.sha256} == known


def find_replaced(run: Path, recipe: dict[str, Any]) -> tuple[str, str] | None:
    """A dotted field and the file that it names, which is not of the content that a run has used; None if all are.

    Folders but pools are another matter: a cache grows, and who reads one checks what is in it.
    """
    sources = list_sources(recipe)
    for field, (kind, name) in sources.items():
        known = set() if Path(name).is_dir() and kind != "pool" else find_known(run, sources, field, several=True)
        if known and identify_source(kind, name).sha256 not in known:
            return field, name
    return None


def find_known(run: Path, sources: dict[str, tuple[str, str]], field: str, several: bool = False) -> set[str]:
    """The recorded hash of the file that a field of a run's sources names.

    `several`: if more are called the same, the hashes of all of them, and not none; none too if they are not all there.
    """
    kind, name = sources[field]
    alike = {other for each, other in sources.values() if each == kind and Path(other).name == Path(name).name}
    used = [row for row in read_lineage(run)["used"] if row["kind"] == kind]
    known = {row["sha256"] for row in used if row["name"] in (name, Path(name).name)}
    return known if len(alike) == 1 or (several and len(known) == len(alike)) else set()


def hash_folder(path: Path) -> str:
    """SHA-256 of a folder: the names and sizes of its files, and the content of those that are JSON."""
    whole = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith(".")):
        content = file.read_bytes() if file.suffix == ".json" else b""
        whole.update(f"{file.relative_to(path)} {file.stat().st_size}\n".encode(errors="surrogateescape") + content)
    return whole.hexdigest()


def record(path: Path, part: str, entry: Entry) -> None:
    """Add an entry to the part, used or made, of a run's lineage.

    One of the same kind and name is replaced, but for files that are used, which may lie in several folders.
    """
    saved = read_lineage(path)
    is_one_of_several = part == "used" and entry.path is not None and entry.path.is_file()
    whole = entry.describe() if is_one_of_several else {"kind": entry.kind, "name": entry.name}
    rest = [row for row in saved[part] if any(row[key] != value for key, value in whole.items())]
    write_result(path / LINEAGE, saved | {part: [*rest, entry.describe()]})


def read_lineage(path: Path) -> dict[str, list[dict[str, Any]]]:
    """A run's lineage: `used` and `made`, each a list of kind, name and sha256; a damaged file is begun anew."""
    file = path / LINEAGE
    try:
        saved = read_result(file) if file.exists() else {"used": [], "made": []}
        with refusing_malformed(file, LINEAGE):
            return {part: [row for row in saved[part] if row["kind"] and row["name"]] for part in ("used", "made")}
    except UserError as error:
        logging.getLogger("lkd").warning("warning: %s; it is begun anew", error)
        return {"used": [], "made": []}
