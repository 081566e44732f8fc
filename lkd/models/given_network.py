"""A user's own network, made to return `Outputs`."""

from typing import Any

import torch
from torch import Tensor, nn

from lkd.errors import UserError
from lkd.models.timm_network import TimmNetwork
from lkd.outputs import Outputs

GIVEN = "object/"
"""What the name of a network starts with that was given as an object: no name builds it."""


class LogitNetwork(nn.Module):
    """A network that gives logits alone, returning `Outputs` without features.

    Args:
        model: Maps images [B, C, H, W] to logits [B, classes], or to an object that has them as `logits`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Outputs:
        """Compute logits; `images` is [B, C, H, W]."""
        answer = self.model(images)
        return Outputs(getattr(answer, "logits", answer), {})


def adapt_given(network: nn.Module, role: str, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Make a network return `Outputs`, and check by a dry run that it fits the images.

    Args:
        network: Returns logits, or an object that has them as `logits`, or `Outputs`; of a timm model, features are
            read too.
        role: What it is, for messages.
        num_classes: Of the images.
        image_shape: Channels, height, width.

    Returns:
        The network itself, or around it a module that returns `Outputs`.

    Raises:
        UserError: If it has no parameters, fails on such images, or answers with something else.
    """
    name, parameter = type(network).__name__, next(network.parameters(), None)
    if parameter is None:
        raise UserError(f"{role}: this {name} has no parameters")
    answer = run_dry(network, name, role, torch.zeros(2, *image_shape, device=parameter.device))
    logits = getattr(answer, "logits", answer)
    found = list(logits.shape) if isinstance(logits, Tensor) else type(answer).__name__
    if found != [2, num_classes]:
        raise UserError(
            f"{role}: this {name} answers 2 images with {found}, not with logits [2, {num_classes}] for the "
            f"{num_classes} classes of the images (read_images takes num_classes)"
        )
    if isinstance(answer, Outputs):
        return network
    is_timm = all(hasattr(network, part) for part in ("forward_intermediates", "forward_head", "feature_info"))
    return TimmNetwork(network) if is_timm else LogitNetwork(network)


def run_dry(network: nn.Module, name: str, role: str, images: Tensor) -> Any:
    """What a network answers, in eval mode; its mode and the random state stay.

    Raises:
        UserError: If it fails.
    """
    modes = [(module, module.training) for module in network.modules()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return network.eval()(images)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{role}: this {name} fails on images {list(images.shape)}: {reason}") from error
    finally:
        for module, training in modes:
            module.training = training
