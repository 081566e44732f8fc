"""Files that are never half written: safetensors with a JSON header, and JSON."""

import hashlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lkd.errors import DamagedFileError, UserError, explain_failed_write

HEADER_KEY, DIGEST_KEY = "lkd", "content_hash"
MOST_HEADER = 1 << 26  # bytes of a header: its JSON takes up to twenty times as much memory
OLDER_KINDS = ("learned loss", "network")  # which people keep: files of them are older than hashes, and may have none
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError, AssertionError)
"""What taking the content of a damaged file apart can raise."""


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
    """Check that a folder, which is made if it is not there, has space.

    Args:
        setting: The field that names it.
        folder: The folder.
        needed: Bytes that will be written.
        what: What they hold.
        advice: What to do if it has too little.

    Raises:
        UserError: If it has too little, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"{setting}: {folder} cannot be written: {error.strerror}") from error
    if needed > free:
        raise UserError(
            f"{setting}: {folder} has {free / 1e9:.1f} GB free, {what} need about {needed / 1e9:.1f} GB: {advice}"
        )


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replaced_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=2, allow_nan=True) + "\n")


def create_json(path: Path, content: Any) -> bool:
    """Write a JSON file if there is none of that name, atomically; whether it was written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{socket.gethostname()}")
    write_json(temporary, content)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


@contextmanager
def refusing_malformed(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever goes wrong while the content of a file is taken apart into one line.

    Args:
        path: The file.
        kind: What it should be.

    Raises:
        UserError: If anything does.
    """
    try:
        yield
    except MALFORMED as error:
        reason = " ".join(str(error).split())[:500]
        raise UserError(f"{path}: is not a good {kind} ({type(error).__name__}: {reason}): replace it") from error


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
    """Read a JSON file.

    Raises:
        UserError: If it cannot be read or is not JSON.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DamagedFileError(f"{path}: is not valid JSON: {error}") from error


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        UserError: If it cannot be read or holds something else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a JSON object: replace it")
    return content


def write_tensors(path: Path, tensors: dict[str, Tensor], kind: str, version: int, header: dict[str, Any]) -> None:
    """Write tensors and a JSON header as one safetensors file, atomically.

    Args:
        path: The file.
        tensors: Name → tensor.
        kind: What the file is, say `"learned loss"`; checked on reading.
        version: Format version of that kind.
        header: JSON content.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = {"kind": kind, "format_version": version, **header}
    content[DIGEST_KEY] = hash_content(json.dumps(content), plain)
    metadata = {HEADER_KEY: json.dumps(content)}  # one entry: several are written in an order that changes
    with replaced_atomically(path) as temporary:
        temporary.write_bytes(save(plain, metadata))


def hash_content(header: str, tensors: dict[str, Tensor]) -> str:
    """A hash of a file's header and tensors, to the bit."""
    found = hashlib.blake2b(header.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def read_tensors(path: Path, kind: str, version: int, check: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that `write_tensors` wrote; runs no code from it.

    Args:
        path: The file.
        kind: What it must be.
        version: The newest format version that can be read.
        check: Whether to compare the content with the hash that was written with it; reads all of the file.

    Returns:
        The tensors, on the CPU, and the header.

    Raises:
        UserError: If the file is missing, damaged, of another kind or of a newer format.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file (expected a {kind})")
    check_header_size(path)
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
        header = parse_json(metadata.get(HEADER_KEY, "null"))
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedFileError(f"{path}: is damaged or not a safetensors file: {str(error).splitlines()[0]}") from error
    written = header.pop(DIGEST_KEY, None) if isinstance(header, dict) else None
    if check and written is not None and written != hash_content(json.dumps(header), tensors):
        raise DamagedFileError(f"{path}: is damaged: its content is not what was written")
    if not isinstance(header, dict) or header.get("kind") != kind:
        found = header.get("kind") if isinstance(header, dict) else "a safetensors file of another program"
        raise UserError(f"{path}: is not a {kind} but {found}")
    if not isinstance(header.get("format_version"), int) or header["format_version"] > version:
        raise UserError(
            f"{path}: format version {header.get('format_version')} of a {kind} is newer than the {version} "
            "that this package reads: update lkd"
        )
    if written is None and kind not in OLDER_KINDS:
        raise DamagedFileError(f"{path}: is damaged: it has no hash of its content")
    return tensors, header


def check_header_size(path: Path) -> None:
    """Check the length that a safetensors file gives for its header, before anything is made of that size.

    Raises:
        UserError: If it is over `MOST_HEADER`, or the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if length > MOST_HEADER:
        raise DamagedFileError(
            f"{path}: is damaged or not a safetensors file: its header would have {length:,} bytes, at most "
            f"{MOST_HEADER:,} are read"
        )
