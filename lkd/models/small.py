"""The small networks of the quickstart, for images of about 28×28.

A teacher and a student of the residual and the plain convolutional kind, and a student of another family
(depthwise-separable, as MobileNet V1) that no meta-training sees.
"""

from collections import OrderedDict

from torch import Tensor, nn

from lkd.core.outputs import Outputs


class StagedNetwork(nn.Module):
    """Stages in sequence, global average pooling, a linear classifier.

    Args:
        stages: Stage name → module; each output is a feature.
        channels: Channels of the last stage.
        num_classes: Number of classes.
    """

    def __init__(self, stages: "OrderedDict[str, nn.Module]", channels: int, num_classes: int) -> None:
        super().__init__()
        self.stages = nn.ModuleDict(stages)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Outputs:
        """Compute logits and the output of every stage; `images` is [B, in_chans, H, W]."""
        features: dict[str, Tensor] = {}
        x = images
        for name, stage in self.stages.items():
            x = features[name] = stage(x)
        return Outputs(self.classifier(x.mean((2, 3))), features)


def convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def separable(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Depthwise 3×3 then pointwise 1×1 (Howard et al., 2017)."""
    return nn.Sequential(
        *convolution(inputs, inputs, stride=stride, groups=inputs), *convolution(inputs, outputs, kernel=1)
    )


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (He et al., 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *convolution(inputs, outputs, stride=stride),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = (
            nn.Identity()
            if stride == 1 and inputs == outputs
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Add the block's body to its shortcut."""
        return nn.functional.relu(self.body(x) + self.shortcut(x))


def small_resnet(num_classes: int, in_chans: int) -> StagedNetwork:
    """The quickstart's teacher: a residual network with 0.3 M parameters."""
    return StagedNetwork(
        OrderedDict(
            stem=convolution(in_chans, 32),
            stage1=ResidualBlock(32, 32, stride=2),
            stage2=ResidualBlock(32, 64, stride=2),
            stage3=ResidualBlock(64, 128, stride=2),
        ),
        128,
        num_classes,
    )


def small_cnn(num_classes: int, in_chans: int) -> StagedNetwork:
    """The quickstart's student: three strided convolutions, 6 k parameters."""
    return StagedNetwork(
        OrderedDict(
            stage1=convolution(in_chans, 8, stride=2),
            stage2=convolution(8, 16, stride=2),
            stage3=convolution(16, 32, stride=2),
        ),
        32,
        num_classes,
    )


def tiny_cnn(num_classes: int, in_chans: int) -> StagedNetwork:
    """A student that can learn little: three strided convolutions, 1.4 k parameters."""
    return StagedNetwork(
        OrderedDict(
            stage1=convolution(in_chans, 4, stride=2),
            stage2=convolution(4, 8, stride=2),
            stage3=convolution(8, 12, stride=2),
        ),
        12,
        num_classes,
    )


def small_mobilenet(num_classes: int, in_chans: int) -> StagedNetwork:
    """The student that meta-training never sees: depthwise-separable, 14 k parameters."""
    return StagedNetwork(
        OrderedDict(
            stem=convolution(in_chans, 16, stride=2),
            stage1=separable(16, 32, stride=2),
            stage2=nn.Sequential(separable(32, 64, stride=2), separable(64, 128, stride=1)),
        ),
        128,
        num_classes,
    )


SMALL_NETWORKS = {
    "small_resnet": small_resnet,
    "small_cnn": small_cnn,
    "tiny_cnn": tiny_cnn,
    "small_mobilenet": small_mobilenet,
}
