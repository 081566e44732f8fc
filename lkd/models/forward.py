"""A network's forward pass made faster, its parameters, their names and its evaluation left alone."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lkd.config.parts import TrainRecipe
from lkd.core.errors import UserError
from lkd.core.outputs import Outputs

Forward = Callable[[Tensor], Outputs]


def build_forward(network: nn.Module, recipe: TrainRecipe) -> Forward:
    """The forward pass as a recipe asks for it.

    Args:
        network: The network; with `channels_last` its weights are laid out anew, in place.
        recipe: Its `compile` and `channels_last`.

    Returns:
        The network's own forward pass, or a compiled one. The compiled code is beside the network: its state dict,
        copies of it and its evaluation know nothing of it.

    Raises:
        UserError: From the forward pass, if torch.compile does not work here.
    """
    if recipe.channels_last:
        network.to(memory_format=torch.channels_last)
    if not recipe.compile:
        return network.__call__
    compiled = torch.compile(network.forward)

    def forward(images: Tensor) -> Outputs:
        try:
            return compiled(images)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"train.compile: torch.compile does not work here ({reason}); leave it out") from error

    return forward


def lay_out(images: Tensor, recipe: TrainRecipe) -> Tensor:
    """The images, [B, C, H, W], in the memory layout of the networks."""
    return images.contiguous(memory_format=torch.channels_last) if recipe.channels_last else images
