"""Files that are never half written: text and JSON."""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from lkd.core.errors import DamagedFileError, UserError, explain_failed_write

PACKAGE = Path(__file__).parents[1]
MOST_JSON = 1 << 26  # bytes of a JSON file: what is made of it takes several times as much memory
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError, AssertionError)
"""What taking the content of a damaged file apart can raise."""
KEPT_FROM = 1.0  # seconds that making something takes which is then kept; what is made faster is made every time


def expand_home(text: str) -> str:
    """A path with the user's folder in the place of `~`; any other text as it is, and a name on a reader's side too."""
    reader, slash, rest = text.partition("/")
    if rest.startswith("~/") and reader.isalnum():
        return f"{reader}/{os.path.expanduser(rest)}"
    return os.path.expanduser(text) if text == "~" or (text.startswith("~") and slash) else text


@contextmanager
def replaced_atomically(path: Path) -> Iterator[Path]:
    """Give a temporary path in the same folder; on success it replaces `path`, on failure it goes.

    Raises:
        UserError: If the folder cannot be written, or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise UserError(explain_failed_write(path, error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_free_space(setting: str, folder: Path, needed: int, what: str, advice: str) -> None:
    """Check that the folder that a setting names, which is made if it is not there, has space for so many bytes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"{setting}: {folder} cannot be written: {error.strerror}") from error
    if needed > free:
        raise UserError(
            f"{setting}: {folder} has {free / 1e9:.1f} GB free, {what} need about {needed / 1e9:.1f} GB: {advice}"
        )


def find_cache() -> Path:
    """Where what can be made anew is kept: a folder in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lkd"


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Wait until no other process of this host is here; where the file system has no locks, go on.

    The lock is a file of this host's: on a network's disk a folder has none.
    """
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()
    place = Path(tempfile.gettempdir(), f"lkd-locks-{os.getuid()}", name)
    with ExitStack() as opened:
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(opened.enter_context(place.open("a")), fcntl.LOCK_EX)
        yield


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replaced_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=2, allow_nan=True) + "\n")


def create_json(path: Path, content: Any) -> bool:
    """Write a JSON file if there is none of that name, atomically; whether it was written."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    write_json(temporary, content)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a disk without hard links
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(temporary.read_text(encoding="utf-8"))
        except FileExistsError:
            return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


@contextmanager
def refusing_malformed(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever goes wrong while a file of this kind is taken apart into one line."""
    try:
        yield
    except MALFORMED as error:
        said = " ".join(str(error).split())[:500]
        raise DamagedFileError(f"{path}: is not a good {kind} ({type(error).__name__}: {said}): replace it") from error


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: If it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    try:
        if (size := path.stat().st_size) > MOST_JSON:
            raise DamagedFileError(f"{path}: is damaged: it has {size:,} bytes, at most {MOST_JSON:,} of JSON are read")
        return parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DamagedFileError(f"{path}: is not valid JSON: {error}") from error


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a JSON object: replace it")
    return content


def find_pretrained(name: str) -> Path | None:
    """The file of a learned loss that the package carries, by its name; None if there is none of it."""
    return {path.name.removesuffix(".lkd.safetensors"): path for path in list_pretrained()}.get(name)


def list_pretrained() -> list[Path]:
    """The files of learned losses that the package carries."""
    return sorted((PACKAGE / "losses" / "pretrained").glob("*.lkd.safetensors"))


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()  # `hashlib.file_digest` is not in Python 3.10
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        key: value
        for name, child in tree.items()
        for key, value in flatten(child, f"{prefix}.{name}".lstrip(".")).items()
    }


def find_differences(before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """The dotted keys in which two trees differ, with both values."""
    first, second = flatten(before), flatten(now)
    for key in sorted(first.keys() | second.keys()):
        if first.get(key) != second.get(key):
            yield key, first.get(key), second.get(key)


PACKAGES = ("lkd", "torch", "torchvision", "timm", "higher", "wandb", "safetensors", "numpy", "pillow", "torchcodec")


def environment() -> dict[str, Any]:
    """Versions, platform and the source's commit."""
    words = ["git", "-C", str(PACKAGE), "describe", "--always", "--dirty"]
    own = os.environ | {"GIT_CEILING_DIRECTORIES": str(PACKAGE.parents[1])}  # not of a project that lkd is installed in
    try:
        commit = subprocess.run(words, capture_output=True, text=True, check=False, env=own).stdout.strip()
    except OSError:  # there is no git
        commit = ""
    return {
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}},
        "platform": platform.platform(),
        "commit": commit or None,
    }


def version_of(package: str) -> str | None:
    """Installed version of a package, if it is."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
