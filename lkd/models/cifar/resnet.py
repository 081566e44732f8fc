"""Residual networks (He et al., 2016) and wide ones (Zagoruyko and Komodakis, 2016), as RepDistiller has them."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from lkd.core.outputs import Outputs
from lkd.models.cifar.parts import convolve, initialize, pool, run_stages

# ----------------------------------------------------------------------------------------------------------------------
# Residual networks (He et al., 2016), as RepDistiller's `resnet.py` and (`cifar_resnet50`) `resnetv2.py`.


class ResidualBlock(nn.Module):
    """Convolutions with BatchNorm, added to a shortcut.

    Args:
        convolutions: One after another; where they change the shape, the shortcut is a 1×1 convolution.
    """

    def __init__(self, *convolutions: nn.Conv2d) -> None:
        super().__init__()
        self.count = len(convolutions)
        stride = 1
        for number, convolution in enumerate(convolutions, 1):
            self.add_module(f"conv{number}", convolution)
            self.add_module(f"bn{number}", nn.BatchNorm2d(convolution.out_channels))
            stride *= convolution.stride[0]
        self.relu = nn.ReLU()
        inputs, outputs = convolutions[0].in_channels, convolutions[-1].out_channels
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(convolve(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Add the convolutions to the shortcut."""
        out = x
        for number in range(1, self.count + 1):
            out = self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(out))
            out = self.relu(out + self.downsample(x) if number == self.count else out)
        return out


def make_basic_block(inputs: int, width: int, stride: int) -> ResidualBlock:
    """Two 3×3 convolutions."""
    return ResidualBlock(convolve(inputs, width, 3, stride), convolve(width, width))


def make_bottleneck(inputs: int, width: int, stride: int) -> ResidualBlock:
    """1×1, 3×3, 1×1 convolutions; four times as wide on the outside."""
    return ResidualBlock(convolve(inputs, width, 1), convolve(width, width, 3, stride), convolve(width, 4 * width, 1))


class ResNet(nn.Module):
    """A 3×3 stem and stages, of which all but the first halve the resolution.

    Args:
        make_block: From input channels, width and stride to a block.
        depths: Blocks of every stage.
        widths: Of the stem and of every stage.
        num_classes: Number of classes.
        in_chans: Channels of the images.
    """

    def __init__(
        self,
        make_block: Callable[[int, int, int], ResidualBlock],
        depths: Sequence[int],
        widths: Sequence[int],
        num_classes: int,
        in_chans: int,
    ) -> None:
        super().__init__()
        self.conv1 = convolve(in_chans, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.stage_names = [f"layer{number}" for number in range(1, len(depths) + 1)]
        channels = widths[0]
        for name, depth, width in zip(self.stage_names, depths, widths[1:], strict=True):
            blocks = []
            for number in range(depth):
                stride = 2 if number == 0 and name != "layer1" else 1
                blocks.append(make_block(channels, width, stride))
                channels = blocks[-1].get_submodule(f"bn{blocks[-1].count}").num_features  # type: ignore[assignment]
            self.add_module(name, nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, num_classes)
        initialize(self)

    def forward(self, images: Tensor) -> Outputs:
        """Compute logits and the features `stem`, `layer1`, ...; `images` is [B, in_chans, H, W]."""
        stages = {name: self.get_submodule(name) for name in self.stage_names}
        features = run_stages(images, {"stem": lambda x: self.relu(self.bn1(self.conv1(x))), **stages})
        return Outputs(self.fc(pool(features[self.stage_names[-1]])), features)


# ----------------------------------------------------------------------------------------------------------------------
# Wide residual networks (Zagoruyko and Komodakis, 2016), as RepDistiller's `wrn.py`.


class PreActivationBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3×3 convolutions; a 1×1 shortcut where the channels change.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        stride: Of the first convolution.
    """

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
        num_classes: Number of classes.
        in_chans: Channels of the images.
    """

    def __init__(self, depth: int, factor: int, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.conv1 = convolve(in_chans, 16)
        channels = 16
        for name, width in (("block1", 16 * factor), ("block2", 32 * factor), ("block3", 64 * factor)):
            blocks = []
            for number in range(depth):
                blocks.append(PreActivationBlock(channels, width, 2 if number == 0 and name != "block1" else 1))
                channels = width
            self.add_module(name, nn.Sequential(OrderedDict(layer=nn.Sequential(*blocks))))
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
