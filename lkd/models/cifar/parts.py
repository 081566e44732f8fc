"""What the CIFAR networks share."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn


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


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of `groups` groups (Zhang et al., 2018)."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


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
