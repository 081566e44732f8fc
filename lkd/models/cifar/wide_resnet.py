"""Wide residual networks (Zagoruyko and Komodakis, 2016), as RepDistiller's `wrn.py`."""

from collections import OrderedDict

from torch import Tensor, nn

from lkd.models.cifar.parts import convolve, initialize, pool, run_stages
from lkd.outputs import Outputs


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
