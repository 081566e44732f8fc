"""The CIFAR networks of the distillation literature (RepDistiller's, which mdistiller and others share), for 32×32.

The submodules that hold weights have RepDistiller's names, so that its checkpoints load; see `foreign_checkpoint`.
"""

from collections.abc import Callable
from functools import partial

from torch import nn

from lkd.models.cifar.mobilenet import MobileNetV2
from lkd.models.cifar.resnet import ResNet, WideResNet, make_basic_block, make_bottleneck
from lkd.models.cifar.shufflenet import ShuffleNetV1, ShuffleNetV2
from lkd.models.cifar.vgg import VGG

# Blocks a stage, then channels of the stem and of every stage.
BASIC_RESNETS = {
    "resnet8": (1, (16, 16, 32, 64)),
    "resnet20": (3, (16, 16, 32, 64)),
    "resnet32": (5, (16, 16, 32, 64)),
    "resnet44": (7, (16, 16, 32, 64)),
    "resnet56": (9, (16, 16, 32, 64)),
    "resnet110": (18, (16, 16, 32, 64)),
    "resnet8x4": (1, (32, 64, 128, 256)),
    "resnet32x4": (5, (32, 64, 128, 256)),
}
WIDE_RESNETS = {"wrn_16_2": (2, 2), "wrn_40_1": (6, 1), "wrn_40_2": (6, 2)}  # blocks a stage, widening factor
VGGS = {"cifar_vgg8": 1, "cifar_vgg13": 2}  # convolutions a stage

CIFAR_NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    **{
        name: partial(ResNet, make_basic_block, (depth,) * 3, widths) for name, (depth, widths) in BASIC_RESNETS.items()
    },
    "cifar_resnet50": partial(ResNet, make_bottleneck, (3, 4, 6, 3), (64, 64, 128, 256, 512)),
    **{name: partial(WideResNet, depth, factor) for name, (depth, factor) in WIDE_RESNETS.items()},
    **{name: partial(VGG, depth) for name, depth in VGGS.items()},
    "cifar_mobilenetv2_half": partial(MobileNetV2, 0.5),
    "cifar_shufflenetv1": ShuffleNetV1,
    "cifar_shufflenetv2": ShuffleNetV2,
}
