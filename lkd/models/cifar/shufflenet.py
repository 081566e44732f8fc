"""ShuffleNet V1 (Zhang et al., 2018) and V2 (Ma et al., 2018) for 32×32.

As RepDistiller's `ShuffleNetv1.py` and `ShuffleNetv2.py`: a 1×1 stem, no max-pooling.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from lkd.core.outputs import Outputs
from lkd.models.cifar.parts import convolve, pool, run_stages, shuffle_channels


class Normalized(nn.Module):
    """Convolutions `conv1`, `conv2`, ... each with its BatchNorm `bn1`, `bn2`, ...

    Args:
        convolutions: The convolutions.
    """

    def __init__(self, *convolutions: nn.Conv2d) -> None:
        super().__init__()
        for number, convolution in enumerate(convolutions, 1):
            self.add_module(f"conv{number}", convolution)
            self.add_module(f"bn{number}", nn.BatchNorm2d(convolution.out_channels))
        self.relu = nn.ReLU()

    def normalize(self, number: int, x: Tensor) -> Tensor:
        """Convolution and BatchNorm of this number."""
        return self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(x))


class ShuffleBlockV1(Normalized):
    """Grouped 1×1, shuffle, depthwise 3×3, grouped 1×1; added to the input, or with stride 2 beside the pooled input.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        stride: 1 or 2.
        groups: Of the 1×1 convolutions; the very first has one.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        outside = outputs - inputs if stride == 2 else outputs
        inside = outside // 4
        self.groups = 1 if inputs == 24 else groups
        super().__init__(
            convolve(inputs, inside, 1, groups=self.groups),
            convolve(inside, inside, 3, stride, groups=inside),
            convolve(inside, outside, 1, groups=groups),
        )
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        out = shuffle_channels(self.relu(self.normalize(1, x)), self.groups)
        out = self.normalize(3, self.relu(self.normalize(2, out)))
        pooled = torch.cat([out, avg_pool2d(x, 3, 2, 1)], 1) if self.stride == 2 else out + x
        return self.relu(pooled)


class ShuffleBlockV2(Normalized):
    """Half of the channels pass; the others go through 1×1, depthwise 3×3, 1×1; then shuffle.

    Args:
        channels: Channels.
    """

    def __init__(self, channels: int) -> None:
        half = channels // 2
        super().__init__(convolve(half, half, 1), convolve(half, half, groups=half), convolve(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        passed, out = x.chunk(2, 1)
        out = self.normalize(2, self.relu(self.normalize(1, out)))
        return shuffle_channels(torch.cat([passed, self.relu(self.normalize(3, out))], 1), 2)


class DownsamplingV2(Normalized):
    """Two branches of stride 2, side by side, then shuffle.

    Args:
        inputs: Input channels.
        outputs: Output channels.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        half = outputs // 2
        super().__init__(
            convolve(inputs, inputs, 3, 2, groups=inputs),
            convolve(inputs, half, 1),
            convolve(inputs, half, 1),
            convolve(half, half, 3, 2, groups=half),
            convolve(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        left = self.relu(self.normalize(2, self.normalize(1, x)))
        right = self.normalize(4, self.relu(self.normalize(3, x)))
        return shuffle_channels(torch.cat([left, self.relu(self.normalize(5, right))], 1), 2)


class ShuffleNetV1(Normalized):
    """ShuffleNet V1 with 3 groups.

    Args:
        num_classes: Number of classes.
        in_chans: Channels of the images.
    """

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__(convolve(in_chans, 24, 1))
        channels = 24
        for number, (outputs, depth) in enumerate(((240, 4), (480, 8), (960, 4)), 1):
            first = ShuffleBlockV1(channels, outputs, 2, 3)
            rest = (ShuffleBlockV1(outputs, outputs, 1, 3) for _ in range(depth - 1))
            self.add_module(f"layer{number}", nn.Sequential(first, *rest))
            channels = outputs
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Outputs:
        """Compute logits and the features `stem`, `layer1` to `layer3`; `images` is [B, in_chans, H, W]."""
        features = run_stages(images, {"stem": lambda x: self.relu(self.normalize(1, x)), **layers_of(self)})
        return Outputs(self.linear(pool(features["layer3"])), features)


class ShuffleNetV2(Normalized):
    """ShuffleNet V2 of width 1.

    Args:
        num_classes: Number of classes.
        in_chans: Channels of the images.
    """

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__(convolve(in_chans, 24, 1), convolve(464, 1024, 1))
        channels = 24
        for number, (outputs, depth) in enumerate(((116, 3), (232, 7), (464, 3)), 1):
            rest = (ShuffleBlockV2(outputs) for _ in range(depth))
            self.add_module(f"layer{number}", nn.Sequential(DownsamplingV2(channels, outputs), *rest))
            channels = outputs
        self.linear = nn.Linear(1024, num_classes)

    def forward(self, images: Tensor) -> Outputs:
        """Compute logits and the features `stem`, `layer1` to `layer3`; `images` is [B, in_chans, H, W]."""
        features = run_stages(images, {"stem": lambda x: self.relu(self.normalize(1, x)), **layers_of(self)})
        return Outputs(self.linear(pool(self.relu(self.normalize(2, features["layer3"])))), features)


def layers_of(network: nn.Module) -> dict[str, nn.Module]:
    """The three stages of a ShuffleNet, by name."""
    return {name: network.get_submodule(name) for name in ("layer1", "layer2", "layer3")}
