"""A student of the pool as a file."""

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lkd.files import refusing_malformed
from lkd.models import build
from lkd.models.given_network import GIVEN
from lkd.tensor_files import read_tensors, write_tensors
from lkd.training import Training
from meta import State

KIND, VERSION = "pool student", 1


class PoolStudent(NamedTuple):
    """A student as it was at some age.

    Attributes:
        state: Parameters, buffers and the optimiser's state.
        learning_rate: Of its next step.
        progress: Its age: the part of its training that was over, in [0, 1].
    """

    state: State
    learning_rate: float
    progress: float


def write_student(path: Path, training: Training) -> None:
    """Write a training's student as it is now."""
    tensors: dict[str, Tensor] = {f"parameters:{name}": tensor for name, tensor in training.student.named_parameters()}
    tensors |= {f"buffers:{name}": tensor for name, tensor in training.student.named_buffers()}
    for name, parameter in training.student.named_parameters():
        momentum = training.optimizer.state.get(parameter, {}).get("momentum_buffer")
        if momentum is not None:
            tensors[f"momentum_buffer:{name}"] = momentum
    header = {"learning_rate": training.learning_rate, "progress": training.progress, "step": training.step}
    write_tensors(path, tensors, KIND, VERSION, header)


def read_student(path: Path, architecture: dict[str, Any], device: torch.device) -> PoolStudent:
    """Read a student.

    Args:
        path: The file.
        architecture: Of the network that it must fit.
        device: Where its tensors go.

    Raises:
        UserError: If its file is missing or damaged, or of another network.
    """
    tensors, header = read_tensors(path, KIND, VERSION)
    parts: dict[str, dict[str, Tensor]] = {"parameters": {}, "buffers": {}, "momentum_buffer": {}}
    with refusing_malformed(path, KIND):
        check_student(tensors, architecture)
        for name, tensor in tensors.items():
            part, _, key = name.partition(":")
            parts[part][key] = tensor.to(device)
        momentum = parts.pop("momentum_buffer")
        state = State(**parts, optimizer={"momentum_buffer": momentum} if momentum else {})
        learning_rate, progress = float(header["learning_rate"]), float(header["progress"])
        if not (0 <= learning_rate < math.inf and 0 <= progress <= 1):
            raise ValueError(f"learning_rate {learning_rate}, progress {progress}")
    return PoolStudent(state, learning_rate, progress)


def check_student(tensors: dict[str, Tensor], architecture: dict[str, Any]) -> None:
    """Check that a student's tensors are those of a network of this architecture, if its name builds one.

    Raises:
        ValueError: If one is missing, unknown, or of another shape or type.
    """
    if str(architecture["name"]).startswith(GIVEN):
        return
    expected = list_tensors(json.dumps(architecture))
    names = tensors.keys() | {name for name in expected if not name.startswith("momentum_buffer:")}
    for name in sorted(names):
        found = (tensors[name].shape, tensors[name].dtype) if name in tensors else "missing"
        if found != expected.get(name):
            raise ValueError(f"{name} is {found}, not {expected.get(name, 'known')}")


@functools.cache
def list_tensors(architecture: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of each tensor that a student can have, by its name in the file; of an architecture as JSON."""
    with torch.device("meta"):
        network = build(**json.loads(architecture) | {"pretrained": False})
    parameters, buffers = dict(network.named_parameters()), dict(network.named_buffers())
    parts: dict[str, Mapping[str, Tensor]] = {
        "parameters": parameters,
        "buffers": buffers,
        "momentum_buffer": parameters,
    }
    return {f"{part}:{name}": (x.shape, x.dtype) for part, each in parts.items() for name, x in each.items()}
