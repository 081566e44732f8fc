"""Files of tensors: safetensors with a JSON header and a hash of both; checkpoints are trees of them."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lkd.core.distributed import is_main, share_from_main
from lkd.core.errors import DamagedFileError, UserError, first_line
from lkd.core.files import (
    KEPT_FROM,
    MALFORMED,
    expand_home,
    find_cache,
    parse_json,
    read_json,
    refusing_malformed,
    replaced_atomically,
    write_json,
)

HEADER_KEY, DIGEST_KEY = "lkd", "content_hash"
MOST_HEADER = 1 << 26  # bytes of a header: its JSON takes up to twenty times as much memory
OLDER_KINDS = ("learned loss", "network")  # which people keep: files of them are older than hashes, and may have none


def write_tensors(path: Path, tensors: dict[str, Tensor], kind: str, version: int, header: dict[str, Any]) -> None:
    """Write tensors and a JSON header as one safetensors file, atomically.

    A file that says all of it already (`is_said`) stays as it is: a run that was through when it was called again did
    nothing by its new version, and what used the file knows it by its hash.

    `kind`: what the file is, say `"learned loss"`; checked on reading, as its format version is.
    """
    path = Path(expand_home(str(path)))
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = {"kind": kind, "format_version": version, **header}
    if is_said(path, kind, version, plain, content):
        return
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


def is_said(path: Path, kind: str, version: int, tensors: dict[str, Tensor], content: dict[str, Any]) -> bool:
    """Whether a file has these tensors and says all this, but for the environment and the recipe that it had.

    A run that goes on may have another folder, device or number of threads; in all else its recipe is the same. A test
    result that it does not ask for again stays.
    """
    with suppress(UserError, *MALFORMED):
        (known, said), now = read_tensors(path, kind, version), json.loads(json.dumps(content))
        before, after = (each.pop("provenance", {}) for each in (said, now))
        if said == now and hash_content("", known) == hash_content("", tensors):
            compared = {*before, *after} - {"environment", "recipe", *({"test"} - {*after})}
            return all(before.get(name) == after.get(name) for name in compared)
    return False


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
    path = Path(expand_home(str(path)))
    if not os.path.isfile(path):  # unlike Path's, it does not raise at a name that is too long
        raise UserError(f"{path}: no such file (expected a {kind})")
    check_header_size(path)
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
        header = parse_json(metadata.get(HEADER_KEY, "null"))
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:  # of the disk: nothing is known of the file
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        raise DamagedFileError(f"{path}: is damaged or not a safetensors file: {first_line(error)}") from error
    written = header.pop(DIGEST_KEY, None) if isinstance(header, dict) else None
    if check and written is not None and written != hash_content(json.dumps(header), tensors):
        raise DamagedFileError(f"{path}: is damaged: its content is not what was written")
    if not isinstance(header, dict) or header.get("kind") != kind:
        found = f"a {header.get('kind')}" if isinstance(header, dict) else "weights that another program saved"
        raise UserError(f"{path}: holds {found}; a {kind} that lkd wrote is expected here")
    if not isinstance(header.get("format_version"), int) or header["format_version"] > version:
        raise UserError(
            f"{path}: format version {header.get('format_version')} of a {kind} is newer than the {version} "
            "that this package reads: update lkd"
        )
    if written is None and kind not in OLDER_KINDS:
        raise DamagedFileError(f"{path}: is damaged: it has no hash of its content")
    return tensors, header


def check_header_size(path: Path) -> None:
    """Check the length that a safetensors file gives for its header, before anything is made of that size."""
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


# ----------------------------------------------------------------------------------------------------------------------
# A checkpoint: any tree of dicts, lists, numbers, strings and tensors, bit-exact, without pickle.

KIND, VERSION = "checkpoint", 2


def save_checkpoint(path: Path, tree: Any) -> None:
    """Write a tree atomically; what `state_dict()` of modules and optimisers return, and nests of them."""
    tensors: dict[str, Tensor] = {}
    structure = encode(tree, tensors)
    write_tensors(path, tensors, KIND, VERSION, {"tree": structure})


def load_checkpoint(path: Path) -> Any:
    """Read a tree that `save_checkpoint` wrote."""
    tensors, header = read_tensors(path, KIND, VERSION)
    with refusing_malformed(path, KIND):
        return decode(header["tree"], tensors)


def digest(tree: Any) -> str:
    """A hash of a tree: equal if and only if every number in it is equal to the bit."""
    tensors: dict[str, Tensor] = {}
    found = hashlib.blake2b(json.dumps(encode(tree, tensors)).encode(), digest_size=16)
    for tensor in tensors.values():
        found.update(str((tensor.dtype, tensor.shape)).encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def encode(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Turn a tree into JSON, moving its tensors into `tensors`. Keys keep their type (optimisers number parameters)."""
    if isinstance(tree, Tensor):
        name = str(len(tensors))
        tensors[name] = tree
        return {"tensor": name}
    if isinstance(tree, dict):
        return {"dict": [[key, encode(value, tensors)] for key, value in tree.items()]}
    if isinstance(tree, tuple):
        return {"tuple": [encode(value, tensors) for value in tree]}
    if isinstance(tree, list):
        return [encode(value, tensors) for value in tree]
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"a checkpoint cannot hold a {type(tree).__name__}")


def decode(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Undo `encode`."""
    if isinstance(tree, list):
        return [decode(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "tuple" in tree:
        return tuple(decode(value, tensors) for value in tree["tuple"])
    return {key: decode(value, tensors) for key, value in tree["dict"]}


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's global generators, by kind of device (dropout draws from them)."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state(*name_generator(device))
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type], *name_generator(device))


def name_generator(device: torch.device) -> tuple[torch.device, ...]:
    """What says whose generator is meant; MPS has one only, and older versions of torch take none."""
    return () if device.type == "mps" else (device,)


# ----------------------------------------------------------------------------------------------------------------------
# Results of trainings as JSON files that know what they hold: a damaged one is not read as another number.


def write_result(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file with a hash of its content, for `read_result`."""
    write_json(path, content | {DIGEST_KEY: hash_content(json.dumps(content), {})})


def read_result(path: Path) -> dict[str, Any]:
    """Read a JSON file that `write_result` wrote; one without a hash is taken as it is."""
    content = read_json(path)
    digest = content.pop(DIGEST_KEY, None) if isinstance(content, dict) else ""
    if digest is not None and digest != hash_content(json.dumps(content), {}):
        raise DamagedFileError(f"{path}: is damaged: its content is not what was written")
    return content


def keep_result(key: Any, make: Callable[[], dict[str, Any]], shared: bool = False) -> dict[str, Any]:
    """What `make` returns, JSON content; what it returned before, in the user's cache folder, under an equal key.

    Args:
        key: A tree with all that decides the result.
        make: Makes it.
        shared: Whether all processes that have met come here and make it together.
    """
    path = find_cache() / "results" / f"{digest(key)}.json"
    kept = None
    with suppress(UserError):
        kept = read_result(path)
    if shared:
        kept = share_from_main(kept)
    if kept is not None:
        return kept
    started = time.monotonic()
    made = make()
    if is_main() and time.monotonic() - started >= KEPT_FROM:
        with suppress(UserError):
            write_result(path, made)
    return made


def drop_damaged(paths: Iterable[Path], say: Callable[[str], None]) -> None:
    """Delete results that are not what was written, so that their trainings are done again."""
    for path in paths:
        try:
            if path.exists():
                read_result(path)
        except DamagedFileError as error:
            say(f"warning: {error}; it is done again")
            path.unlink(missing_ok=True)
