"""The small networks of the quickstart, for images of about 28×28.

A teacher and a student of the residual and the plain convolutional kind, and a student of another family
(depthwise-separable, as MobileNet V1) that no meta-training sees.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from lkd.core.outputs import Outputs
from lkd.models.cifar import convolve_and_activate as convolution
from lkd.models.cifar import pool, run_stages


class StagedNetwork(nn.Module):
    """Stages in sequence, global average pooling, a linear classifier.

    Args:
        stages: Stage name → module; each output is a feature.
        channels: Channels of the last stage.
        num_classes: Number of classes.
    """

    def __init__(self, stages: Mapping[str, nn.Module], channels: int, num_classes: int) -> None:
        super().__init__()
        self.stages = nn.ModuleDict(dict(stages))
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Outputs:
        """Compute logits and the output of every stage; `images` is [B, in_chans, H, W]."""
        features = run_stages(images, dict(self.stages.items()))
        return Outputs(self.classifier(pool(features[next(reversed(features))])), features)


def separable(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Depthwise 3×3 then pointwise 1×1 (Howard et al., 2017)."""
    return nn.Sequential(*convolution(inputs, inputs, stride=stride, groups=inputs), *convolution(inputs, outputs, 1))


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions, the first with stride 2, and a 1×1 shortcut (He et al., 2016)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *convolution(inputs, outputs, stride=2),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.body(x) + self.shortcut(x))


def strided_cnn(widths: Sequence[int], num_classes: int, in_chans: int) -> StagedNetwork:
    """Strided convolutions, one a stage."""
    pairs = zip((in_chans, *widths), widths, strict=False)
    stages = {f"stage{number}": convolution(*pair, stride=2) for number, pair in enumerate(pairs, 1)}
    return StagedNetwork(stages, widths[-1], num_classes)


def small_resnet(num_classes: int, in_chans: int) -> StagedNetwork:
    """The quickstart's teacher: a residual network with 0.3 M parameters."""
    stages = {
        "stem": convolution(in_chans, 32),
        "stage1": ResidualBlock(32, 32),
        "stage2": ResidualBlock(32, 64),
        "stage3": ResidualBlock(64, 128),
    }
    return StagedNetwork(stages, 128, num_classes)


def small_mobilenet(num_classes: int, in_chans: int) -> StagedNetwork:
    """The student that meta-training never sees: depthwise-separable, 14 k parameters."""
    stages = {
        "stem": convolution(in_chans, 16, stride=2),
        "stage1": separable(16, 32, stride=2),
        "stage2": nn.Sequential(separable(32, 64, stride=2), separable(64, 128, stride=1)),
    }
    return StagedNetwork(stages, 128, num_classes)


SMALL_NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "small_resnet": small_resnet,
    "small_cnn": partial(strided_cnn, (8, 16, 32)),  # the quickstart's student: 6 k parameters
    "tiny_cnn": partial(strided_cnn, (4, 8, 12)),  # a student that can learn little: 1.4 k parameters
    "small_mobilenet": small_mobilenet,
}
"""From numbers of classes and of channels to a network."""
