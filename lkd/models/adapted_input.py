"""A network that was trained on images of another normalisation or size than those it is given."""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from lkd.outputs import Outputs

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel, of pixels in [0, 1]."""


class AdaptedInput(nn.Module):
    """The network, seeing the same pixels in its own normalisation and size.

    Args:
        network: The network, returning `Outputs`.
        given: What images are normalised with.
        wanted: What the network was trained with.
        size: Height and width that images are scaled to, bilinearly, antialiased; 0 keeps theirs.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, given: Statistics, wanted: Statistics, size: int = 0) -> None:
        super().__init__()
        self.network = network
        self.size = size
        mean, std, own_mean, own_std = (torch.tensor(part).view(-1, 1, 1) for part in (*given, *wanted))
        self.register_buffer("scale", std / own_std, persistent=False)
        self.register_buffer("shift", (mean - own_mean) / own_std, persistent=False)

    def forward(self, images: Tensor) -> Outputs:
        """Answer images [B, C, H, W]."""
        images = images * self.scale + self.shift
        if self.size and images.shape[-2:] != (self.size, self.size):
            images = interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        outputs: Outputs = self.network(images)
        return outputs


def adapt_input(network: nn.Module, given: Statistics, wanted: Statistics, size: int = 0) -> nn.Module:
    """The network as it is, or adapted if what it wants differs from what it is given."""
    return AdaptedInput(network, given, wanted, size).train(network.training) if size or given != wanted else network
