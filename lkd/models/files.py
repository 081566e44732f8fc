"""A trained network as one safetensors file that says what it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from lkd.core.errors import UserError
from lkd.core.files import refusing_malformed
from lkd.core.tensor_files import read_tensors, write_tensors
from lkd.models.build import GIVEN, build, plain_state_dict, unwrap

KIND, VERSION = "network", 1
MOST_ENTRIES, MOST_NUMBER = 1000, 1 << 16  # of options of a network's file


def save_network(path: Path, network: nn.Module, architecture: dict[str, Any], provenance: dict[str, Any]) -> None:
    """Write a network's weights, under its library's own names.

    Args:
        path: The file.
        network: The network.
        architecture: Keyword arguments of `build`.
        provenance: What it was trained with and what it reached; JSON.
    """
    header = {"architecture": {**architecture, "pretrained": False}, "provenance": provenance}
    write_tensors(path, plain_state_dict(network), KIND, VERSION, header)


def load_network(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Read a network that `save_network` wrote, in eval mode.

    Returns:
        The network and the header (`architecture`, `provenance`).

    Raises:
        UserError: If the file is missing, damaged, not a network, or its weights do not fit its architecture.
    """
    tensors, header = read_tensors(path, KIND, VERSION)
    with refusing_malformed(path, KIND):
        name = str(header["architecture"]["name"])
        if name.startswith(GIVEN):
            raise UserError(
                f"{path}: holds the weights of a {name.removeprefix(GIVEN).split('@')[0]} of the caller's own, which "
                "no name builds: build it, and load them by load_state_dict(safetensors.torch.load_file(path))"
            )
        architecture = {"in_chans": 3} | header["architecture"] | {"pretrained": False}
        check_size(path, architecture, tensors)
        network = build(**architecture)
        unwrap(network).load_state_dict(tensors)
    return network.eval(), header | {"architecture": architecture}


def check_size(path: Path, architecture: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Check that a network is of the shapes of the weights, before it is made: a header can name one of any size."""
    check_options(architecture.get("options"))
    with torch.device("meta"), parameters_limited(4 * len(tensors) + 100):
        expected = plain_state_dict(build(**architecture))
    for name in [*expected, *tensors]:
        shapes = [tuple(each[name].shape) if name in each else "missing" for each in (tensors, expected)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{path}: its weights do not fit a {architecture['name']}: {name} is {shapes[0]}, there {shapes[1]}"
            )


def check_options(options: Any) -> None:
    """Check that no option is a number that a network would count to, or a list that it would walk, for ever."""
    if isinstance(options, dict | list):
        if len(options) > MOST_ENTRIES:
            raise ValueError(f"options has {len(options):,} entries, at most {MOST_ENTRIES:,} are taken")
        for each in options.values() if isinstance(options, dict) else options:
            check_options(each)
    elif isinstance(options, int | float) and not abs(options) <= MOST_NUMBER:
        raise ValueError(f"options has a number {options:g}, at most {MOST_NUMBER:,} is taken")


@contextmanager
def parameters_limited(most: int) -> Iterator[None]:
    """Within, modules register this many parameters at most."""
    left = most

    def count(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"the network has far more parameters than the file has weights, over {most:,}")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
