"""A trained network as one safetensors file that says what it is."""

from pathlib import Path
from typing import Any

from torch import nn

from lkd.errors import UserError
from lkd.files import read_tensors, write_tensors
from lkd.models.build import build, plain_state_dict
from lkd.models.given_network import GIVEN
from lkd.models.timm_network import TimmNetwork

KIND, VERSION = "network", 1


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
    name = str(header["architecture"]["name"])
    if name.startswith(GIVEN):
        raise UserError(
            f"{path}: holds the weights of a {name.removeprefix(GIVEN).split('@')[0]} of the caller's own, which no "
            "name builds: build it, and load them by load_state_dict(safetensors.torch.load_file(path))"
        )
    network = build(**header["architecture"])
    inner = network.model if isinstance(network, TimmNetwork) else network
    try:
        inner.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path}: its weights do not fit a {header['architecture']['name']}: {error}") from error
    return network.eval(), header
