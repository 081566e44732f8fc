"""Files of tensors: safetensors with a JSON header of our own, and a hash of both."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lkd.errors import DamagedFileError, UserError
from lkd.files import parse_json, replaced_atomically

HEADER_KEY, DIGEST_KEY = "lkd", "content_hash"
MOST_HEADER = 1 << 26  # bytes of a header: its JSON takes up to twenty times as much memory
OLDER_KINDS = ("learned loss", "network")  # which people keep: files of them are older than hashes, and may have none


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
    if not os.path.isfile(path):  # unlike Path's, it does not raise at a name that is too long
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
