"""A checkpoint: any tree of dicts, lists, numbers, strings and tensors, bit-exact, without pickle."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lkd.files import refusing_malformed
from lkd.tensor_files import read_tensors, write_tensors

KIND, VERSION = "checkpoint", 2


def save_checkpoint(path: Path, tree: Any) -> None:
    """Write a tree atomically; what `state_dict()` of modules and optimisers return, and nests of them."""
    tensors: dict[str, Tensor] = {}
    structure = encode(tree, tensors)
    write_tensors(path, tensors, KIND, VERSION, {"tree": structure})


def load_checkpoint(path: Path) -> Any:
    """Read a tree that `save_checkpoint` wrote.

    Raises:
        UserError: If the file is missing, damaged, or not a checkpoint.
    """
    tensors, header = read_tensors(path, KIND, VERSION)
    with refusing_malformed(path, KIND):
        return decode(header["tree"], tensors)


def digest(tree: Any) -> str:
    """A hash of a tree: equal if and only if every number in it is equal to the bit."""
    tensors: dict[str, Tensor] = {}
    found = hashlib.blake2b(json.dumps(encode(tree, tensors)).encode(), digest_size=16)
    for tensor in tensors.values():
        found.update(str((tensor.dtype, tensor.shape)).encode())
        found.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
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
    """The state of torch's global generators (dropout draws from them)."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
