"""Which network is it? Papers mix up MobileNets; a run says what it trains."""

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lkd.models.timm_network import TimmNetwork


def describe(
    network: nn.Module, name: str, input_shape: tuple[int, int, int], pretrained: bool = False
) -> dict[str, Any]:
    """Describe a network by one dry run.

    Args:
        network: The network, returning `Outputs`.
        name: The name that it was built from.
        input_shape: Channels, height and width of one image.
        pretrained: Whether it started from timm's weights.

    Returns:
        `architecture`, `parameters`, `flops` (of one forward pass of one image, a multiply-add counted as two),
        `activations` (class names),
        `pretrained_tag` (or "none"), and `stages` (stage name → shape for one image).
    """
    training = network.training
    network.eval()
    device = next(network.parameters()).device
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        outputs = network(torch.zeros(1, *input_shape, device=device))
    network.train(training)
    inner = network.model if isinstance(network, TimmNetwork) else network
    tag = (getattr(inner, "pretrained_cfg", None) or {}).get("tag", "") if pretrained else ""
    activations = {type(m).__name__ for m in network.modules() if type(m).__module__ == "torch.nn.modules.activation"}
    return {
        "architecture": name,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "flops": counter.get_total_flops(),
        "activations": sorted(activations) or ["none"],
        "pretrained_tag": tag or "none",
        "stages": {stage: list(feature.shape[1:]) for stage, feature in outputs.features.items()},
    }


def find_stages(network: nn.Module, input_shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    """Shape of each stage's feature for one image, by one dry run; stage names as `Outputs.features` has them.

    Args:
        network: The network, returning `Outputs`.
        input_shape: Channels, height and width of one image.
    """
    training = network.training
    device = next(network.parameters()).device
    with torch.no_grad():
        outputs = network.eval()(torch.zeros(1, *input_shape, device=device))
    network.train(training)
    return {stage: tuple(feature.shape[1:]) for stage, feature in outputs.features.items()}


def format_description(role: str, description: dict[str, Any]) -> str:
    """One line for the terminal: role, architecture, size, activation, tag."""
    return (
        f"{role}: {description['architecture']}, {description['parameters']:,} parameters, "
        f"{description['flops'] / 1e6:,.1f} MFLOPs an image, {'/'.join(description['activations'])}, "
        f"pretrained tag {description['pretrained_tag']}"
    )
