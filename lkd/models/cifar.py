"""The CIFAR networks of the distillation literature (RepDistiller's, which mdistiller and others share), for 32×32.

The submodules that hold weights have RepDistiller's names, so that its checkpoints load (`published_weights`), and
their initial weights are drawn as there. `num_classes` and `in_chans` are a network's classes and its images' channels.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d

from lkd.core.outputs import Outputs

# ----------------------------------------------------------------------------------------------------------------------
# What they share.


def convolve(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the size, up to its stride."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


def run_stages(images: Tensor, stages: Mapping[str, Callable[[Tensor], Tensor]]) -> dict[str, Tensor]:
    """Run stages one after another and keep what each returns."""
    features: dict[str, Tensor] = {}
    x = images
    for name, stage in stages.items():
        x = features[name] = stage(x)
    return features


def pool(feature: Tensor) -> Tensor:
    """Average over height and width, [B, C, H, W] → [B, C]."""
    return feature.mean((2, 3))


def initialize(network: nn.Module, classifier_std: float | None = None) -> None:
    """Draw initial weights as RepDistiller does.

    Args:
        network: Convolutions get He et al.'s normal weights (of fan-out) and no bias.
        classifier_std: Standard deviation of the classifier's weights, its bias being zero; None keeps torch's own.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and classifier_std is not None:
            nn.init.normal_(module.weight, 0, classifier_std)
            nn.init.zeros_(module.bias)


class Normalized(nn.Module):
    """Convolutions `conv1`, `conv2`, ... each with its BatchNorm `bn1`, `bn2`, ..."""

    def __init__(self, *convolutions: nn.Conv2d) -> None:
        super().__init__()
        self.count, self.channels = len(convolutions), convolutions[-1].out_channels
        for number, convolution in enumerate(convolutions, 1):
            self.add_module(f"conv{number}", convolution)
            self.add_module(f"bn{number}", nn.BatchNorm2d(convolution.out_channels))
        self.relu = nn.ReLU()

    def normalize(self, number: int, x: Tensor) -> Tensor:
        return self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(x))

    def activate(self, number: int, x: Tensor) -> Tensor:
        return self.relu(self.normalize(number, x))

    def add_layers(self, layers: Sequence[nn.Module]) -> None:
        """Make stages `layer1`, `layer2`, ..."""
        self.layers = [f"layer{number}" for number in range(1, len(layers) + 1)]
        for name, layer in zip(self.layers, layers, strict=True):
            self.add_module(name, layer)

    def run_layers(self, images: Tensor) -> dict[str, Tensor]:
        """The features `stem` (of the first convolution), `layer1`, `layer2`, ..."""
        layers = {name: self.get_submodule(name) for name in self.layers}
        return run_stages(images, {"stem": partial(self.activate, 1), **layers})


# ----------------------------------------------------------------------------------------------------------------------
# Residual networks (He et al., 2016), as RepDistiller's `resnet.py` and (`cifar_resnet50`) `resnetv2.py`.


class ResidualBlock(Normalized):
    """Convolutions with BatchNorm, added to a shortcut: where they change the shape, a 1×1 convolution."""

    def __init__(self, *convolutions: nn.Conv2d) -> None:
        super().__init__(*convolutions)
        inputs, outputs = convolutions[0].in_channels, convolutions[-1].out_channels
        stride = max(convolution.stride[0] for convolution in convolutions)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(convolve(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for number in range(1, self.count):
            out = self.activate(number, out)
        return self.relu(self.normalize(self.count, out) + self.downsample(x))


def make_basic_block(inputs: int, width: int, stride: int) -> ResidualBlock:
    """Two 3×3 convolutions."""
    return ResidualBlock(convolve(inputs, width, 3, stride), convolve(width, width))


def make_bottleneck(inputs: int, width: int, stride: int) -> ResidualBlock:
    """1×1, 3×3, 1×1 convolutions; four times as wide on the outside."""
    return ResidualBlock(convolve(inputs, width, 1), convolve(width, width, 3, stride), convolve(width, 4 * width, 1))


class ResNet(Normalized):
    """A 3×3 stem and stages, of which all but the first halve the resolution.

    Args:
        make_block: From input channels, width and stride to a block.
        depths: Blocks of every stage.
        widths: Of the stem and of every stage.
    """

    def __init__(
        self,
        make_block: Callable[[int, int, int], ResidualBlock],
        depths: Sequence[int],
        widths: Sequence[int],
        num_classes: int,
        in_chans: int,
    ) -> None:
        super().__init__(convolve(in_chans, widths[0]))
        channels = widths[0]
        layers: list[nn.Module] = []
        for depth, width in zip(depths, widths[1:], strict=True):
            blocks: list[nn.Module] = []
            for number in range(depth):
                block = make_block(channels, width, 2 if number == 0 and layers else 1)
                blocks.append(block)
                channels = block.channels
            layers.append(nn.Sequential(*blocks))
        self.add_layers(layers)
        self.fc = nn.Linear(channels, num_classes)
        initialize(self)

    def forward(self, images: Tensor) -> Outputs:
        """Compute logits and the features `stem`, `layer1`, ...; `images` is [B, in_chans, H, W]."""
        features = self.run_layers(images)
        return Outputs(self.fc(pool(features[self.layers[-1]])), features)


# ----------------------------------------------------------------------------------------------------------------------
# Wide residual networks (Zagoruyko and Komodakis, 2016), as RepDistiller's `wrn.py`.


class PreActivationBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3×3 convolutions; a 1×1 shortcut where the channels change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = convolve(inputs, outputs, 3, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = convolve(outputs, outputs)
        self.relu = nn.ReLU()
        self.convShortcut = convolve(inputs, outputs, 1, stride) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """Add the convolutions to the shortcut; a shortcut with weights starts from the activated input."""
        active = self.relu(self.bn1(x))
        out = self.conv2(self.relu(self.bn2(self.conv1(active))))
        return out + (x if self.convShortcut is None else self.convShortcut(active))


class WideResNet(nn.Module):
    """WRN-(6 · depth + 4)-factor.

    Args:
        depth: Blocks of every stage.
        factor: Widening factor.
    """

    def __init__(self, depth: int, factor: int, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.conv1 = convolve(in_chans, 16)
        channels = 16
        for stage, width in enumerate((16 * factor, 32 * factor, 64 * factor), 1):
            first = PreActivationBlock(channels, width, 1 if stage == 1 else 2)
            blocks = nn.Sequential(first, *(PreActivationBlock(width, width, 1) for _ in range(depth - 1)))
            self.add_module(f"block{stage}", nn.Sequential(OrderedDict(layer=blocks)))
            channels = width
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(channels, num_classes)
        initialize(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Outputs:
        """Compute logits and the features `conv1`, `block1`, `block2`, `block3` (sums, before BatchNorm and ReLU)."""
        stages = {name: self.get_submodule(name) for name in ("conv1", "block1", "block2", "block3")}
        features = run_stages(images, stages)
        return Outputs(self.fc(pool(self.relu(self.bn1(features["block3"])))), features)


# ----------------------------------------------------------------------------------------------------------------------
# VGG with BatchNorm and one linear layer (Simonyan and Zisserman, 2015), as RepDistiller's `vgg.py`.


class VGG(nn.Module):
    """Five stages of 3×3 convolutions; max-pooling before all but the first and the last.

    Args:
        depth: Convolutions of every stage.
    """

    def __init__(self, depth: int, num_classes: int, in_chans: int) -> None:
        super().__init__()
        channels = in_chans
        for stage, width in enumerate((64, 128, 256, 512, 512)):
            layers: list[nn.Module] = []
            for _ in range(depth):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            self.add_module(f"block{stage}", nn.Sequential(*layers))
        self.classifier = nn.Linear(channels, num_classes)
        initialize(self, classifier_std=0.01)

    def forward(self, images: Tensor) -> Outputs:
        """Compute logits and the features `block0` to `block4`; `images` is [B, in_chans, H, W]."""

        def run_stage(stage: int, x: Tensor) -> Tensor:
            return self.get_submodule(f"block{stage}")(max_pool2d(x, 2) if stage in (1, 2, 3) else x)

        features = run_stages(images, {f"block{stage}": partial(run_stage, stage) for stage in range(5)})
        return Outputs(self.classifier(pool(features["block4"])), features)


# ----------------------------------------------------------------------------------------------------------------------
# MobileNetV2 (Sandler et al., 2018), as RepDistiller's `mobilenetv2.py`: ReLU, not ReLU6, and no dropout.

STAGES = (  # expansion, channels, blocks, stride of the first block
    (1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
)  # fmt: skip


def convolve_and_activate(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """A convolution, BatchNorm, ReLU."""
    return nn.Sequential(convolve(inputs, outputs, kernel, stride, groups), nn.BatchNorm2d(outputs), nn.ReLU())


class InvertedResidual(nn.Module):
    """Widen, convolve depthwise, narrow without an activation; a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.conv = nn.Sequential(
            *convolve_and_activate(inputs, width, 1),
            *convolve_and_activate(width, width, 3, stride, groups=width),
            convolve(width, outputs, 1),
            nn.BatchNorm2d(outputs),
        )
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.has_shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 whose stem halves the resolution and whose second stage does not.

    Args:
        width: Multiplies all channels but the last 1280.
    """

    def __init__(self, width: float, num_classes: int, in_chans: int) -> None:
        super().__init__()
        channels = int(32 * width)
        self.conv1 = convolve_and_activate(in_chans, channels, 3, 2)
        self.blocks = nn.ModuleList()
        for expansion, outputs, depth, stride in STAGES:
            stage = nn.Sequential()
            for number in range(depth):
                stage.append(InvertedResidual(channels, int(outputs * width), stride if number == 0 else 1, expansion))
                channels = int(outputs * width)
            self.blocks.append(stage)
        self.conv2 = convolve_and_activate(channels, 1280, 1)
        self.classifier = nn.Sequential(nn.Linear(1280, num_classes))
        initialize(self, classifier_std=0.01)

    def forward(self, images: Tensor) -> Outputs:
        """Compute logits and the features `conv1`, `blocks.0` to `blocks.6`; `images` is [B, in_chans, H, W]."""
        stages = {f"blocks.{number}": stage for number, stage in enumerate(self.blocks)}
        features = run_stages(images, {"conv1": self.conv1, **stages})
        return Outputs(self.classifier(pool(self.conv2(features["blocks.6"]))), features)


# ----------------------------------------------------------------------------------------------------------------------
# ShuffleNet V1 (Zhang et al., 2018) and V2 (Ma et al., 2018), as RepDistiller's `ShuffleNetv1.py` and
# `ShuffleNetv2.py`: a 1×1 stem, no max-pooling.

SHUFFLE_GROUPS = 3  # of V1's 1×1 convolutions; the very first has one


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of `groups` groups."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class ShuffleBlockV1(Normalized):
    """Grouped 1×1, shuffle, depthwise 3×3, grouped 1×1; added to the input, with stride 2 beside the pooled input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        outside = outputs - inputs if stride == 2 else outputs
        inside = outside // 4
        self.groups, self.stride = 1 if inputs == 24 else SHUFFLE_GROUPS, stride
        super().__init__(
            convolve(inputs, inside, 1, groups=self.groups),
            convolve(inside, inside, 3, stride, groups=inside),
            convolve(inside, outside, 1, groups=SHUFFLE_GROUPS),
        )

    def forward(self, x: Tensor) -> Tensor:
        out = shuffle_channels(self.activate(1, x), self.groups)
        out = self.normalize(3, self.activate(2, out))
        return self.relu(torch.cat([out, avg_pool2d(x, 3, 2, 1)], 1) if self.stride == 2 else out + x)


def make_stage_v1(inputs: int, outputs: int, depth: int) -> nn.Sequential:
    """Blocks of ShuffleNet V1, of which the first halves the resolution."""
    first = ShuffleBlockV1(inputs, outputs, 2)
    return nn.Sequential(first, *(ShuffleBlockV1(outputs, outputs, 1) for _ in range(depth - 1)))


class ShuffleBlockV2(Normalized):
    """Half of the channels pass; the others go through 1×1, depthwise 3×3, 1×1; then shuffle."""

    def __init__(self, channels: int) -> None:
        half = channels // 2
        super().__init__(convolve(half, half, 1), convolve(half, half, groups=half), convolve(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        passed, out = x.chunk(2, 1)
        out = self.activate(3, self.normalize(2, self.activate(1, out)))
        return shuffle_channels(torch.cat([passed, out], 1), 2)


class DownsamplingV2(Normalized):
    """Two branches of stride 2, side by side, then shuffle."""

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
        left = self.activate(2, self.normalize(1, x))
        right = self.activate(5, self.normalize(4, self.activate(3, x)))
        return shuffle_channels(torch.cat([left, right], 1), 2)


def make_stage_v2(inputs: int, outputs: int, depth: int) -> nn.Sequential:
    """Blocks of ShuffleNet V2 after one that halves the resolution."""
    return nn.Sequential(DownsamplingV2(inputs, outputs), *(ShuffleBlockV2(outputs) for _ in range(depth)))


class ShuffleNet(Normalized):
    """A stem of 24 channels, three stages and, in V2, a last 1×1 convolution.

    Args:
        make_stage: From input channels, channels and depth to a stage.
        stages: Channels and depth of every stage.
        last: Channels of the last convolution; 0 for none.
    """

    def __init__(
        self,
        make_stage: Callable[[int, int, int], nn.Sequential],
        stages: Sequence[tuple[int, int]],
        last: int,
        num_classes: int,
        in_chans: int,
    ) -> None:
        widths = [24, *(width for width, _ in stages)]
        convolutions = [convolve(in_chans, widths[0], 1)] + ([convolve(widths[-1], last, 1)] if last else [])
        super().__init__(*convolutions)
        self.add_layers([make_stage(inputs, *stage) for inputs, stage in zip(widths, stages, strict=False)])
        self.linear = nn.Linear(last or widths[-1], num_classes)

    def forward(self, images: Tensor) -> Outputs:
        """Compute logits and the features `stem`, `layer1` to `layer3`; `images` is [B, in_chans, H, W]."""
        features = self.run_layers(images)
        x = features["layer3"]
        return Outputs(self.linear(pool(self.activate(2, x) if self.count == 2 else x)), features)


# ----------------------------------------------------------------------------------------------------------------------
# By name.

NARROW, WIDE = (16, 16, 32, 64), (32, 64, 128, 256)  # channels of the stem and of every stage
RESNETS = {
    **{f"resnet{6 * depth + 2}": (depth, NARROW) for depth in (1, 3, 5, 7, 9, 18)},
    **{f"resnet{6 * depth + 2}x4": (depth, WIDE) for depth in (1, 5)},
}
WIDE_RESNETS = ((2, 2), (6, 1), (6, 2))  # blocks a stage, widening factor

CIFAR_NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    **{name: partial(ResNet, make_basic_block, (depth,) * 3, widths) for name, (depth, widths) in RESNETS.items()},
    "cifar_resnet50": partial(ResNet, make_bottleneck, (3, 4, 6, 3), (64, 64, 128, 256, 512)),
    **{f"wrn_{6 * depth + 4}_{factor}": partial(WideResNet, depth, factor) for depth, factor in WIDE_RESNETS},
    "cifar_vgg8": partial(VGG, 1),
    "cifar_vgg13": partial(VGG, 2),
    "cifar_mobilenetv2_half": partial(MobileNetV2, 0.5),
    "cifar_shufflenetv1": partial(ShuffleNet, make_stage_v1, ((240, 4), (480, 8), (960, 4)), 0),
    "cifar_shufflenetv2": partial(ShuffleNet, make_stage_v2, ((116, 3), (232, 7), (464, 3)), 1024),
}
"""From numbers of classes and of channels to a network."""
