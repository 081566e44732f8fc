"""MobileNetV2 (Sandler et al., 2018) for 32×32, as RepDistiller's `mobilenetv2.py`: ReLU, not ReLU6, and no dropout."""

from torch import Tensor, nn

from lkd.core.outputs import Outputs
from lkd.models.cifar.parts import convolve, initialize, pool, run_stages

# Expansion, channels, blocks, stride of the first block.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """Widen, convolve depthwise, narrow without an activation; a shortcut where the shape stays.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        stride: Of the depthwise convolution.
        expansion: How many times wider the inside is.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.conv = nn.Sequential(
            *normalized(convolve(inputs, width, 1)),
            *normalized(convolve(width, width, 3, stride, groups=width)),
            convolve(width, outputs, 1),
            nn.BatchNorm2d(outputs),
        )
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        return x + self.conv(x) if self.has_shortcut else self.conv(x)


def normalized(convolution: nn.Conv2d) -> nn.Sequential:
    """A convolution, BatchNorm, ReLU."""
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU())


class MobileNetV2(nn.Module):
    """MobileNetV2 whose stem halves the resolution and whose second stage does not.

    Args:
        width: Multiplies all channels but the last 1280.
        num_classes: Number of classes.
        in_chans: Channels of the images.
    """

    def __init__(self, width: float, num_classes: int, in_chans: int) -> None:
        super().__init__()
        channels = int(32 * width)
        self.conv1 = normalized(convolve(in_chans, channels, 3, 2))
        self.blocks = nn.ModuleList()
        for expansion, outputs, depth, stride in STAGES:
            stage = nn.Sequential()
            for number in range(depth):
                stage.append(InvertedResidual(channels, int(outputs * width), stride if number == 0 else 1, expansion))
                channels = int(outputs * width)
            self.blocks.append(stage)
        self.conv2 = normalized(convolve(channels, 1280, 1))
        self.classifier = nn.Sequential(nn.Linear(1280, num_classes))
        initialize(self, classifier_std=0.01)

    def forward(self, images: Tensor) -> Outputs:
        """Compute logits and the features `conv1`, `blocks.0` to `blocks.6`; `images` is [B, in_chans, H, W]."""
        stages = {f"blocks.{number}": stage for number, stage in enumerate(self.blocks)}
        features = run_stages(images, {"conv1": self.conv1, **stages})
        return Outputs(self.classifier(pool(self.conv2(features["blocks.6"]))), features)
