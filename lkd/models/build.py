"""From a name to a network."""

import logging
from typing import Any

from torch import Tensor, nn

from lkd.errors import UserError, check_choice
from lkd.files import MALFORMED
from lkd.models.cifar import CIFAR_NETWORKS
from lkd.models.given_network import LogitNetwork
from lkd.models.small import SMALL_NETWORKS
from lkd.models.timm_network import TimmNetwork

OWN_NETWORKS = {**SMALL_NETWORKS, **CIFAR_NETWORKS}
# Options of timm.create_model that read other files or the internet: no recipe and no file of a stranger may set them.
REACHING_OUT = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "pretrained_strict")


def build(
    name: str, num_classes: int, in_chans: int = 3, pretrained: bool = False, options: dict[str, Any] | None = None
) -> nn.Module:
    """Build a network.

    Args:
        name: A timm model name, with its pretrained tag if it matters (`resnet50.tv_in1k`), one of the literature's
            CIFAR networks (`resnet32x4`, `wrn_40_2`, ...: `CIFAR_NETWORKS`), or one of the quickstart's
            (`small_resnet`, `small_cnn`, `tiny_cnn`, `small_mobilenet`).
        num_classes: Number of classes.
        in_chans: Channels of the input images.
        pretrained: Load timm's pretrained weights of that tag.
        options: Further keyword arguments of `timm.create_model`, say `{"act_layer": "relu"}`.

    Returns:
        A module whose forward maps images [B, in_chans, H, W] to `Outputs`.

    Raises:
        UserError: If the name is unknown, or pretrained weights or options are asked of a network that has none.
    """
    if name in OWN_NETWORKS:
        if pretrained or options:
            raise UserError(f"model {name!r} takes neither `pretrained` nor `options`: it is not one of timm's")
        return OWN_NETWORKS[name](num_classes, in_chans)
    import timm

    reaching_out = sorted(set(options or {}) & {*REACHING_OUT, "pretrained"})
    if reaching_out:
        raise UserError(f"model {name!r}: option {reaching_out[0]} is not taken; weights come from a file of their own")
    architecture, _, tag = name.partition(".")
    check_choice("model", architecture, [*timm.list_models(), *OWN_NETWORKS])
    if tag:
        check_choice(f"pretrained tag of {architecture}", name, timm.list_pretrained(f"{architecture}.*"))
    try:
        model = timm.create_model(
            name, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans, **(options or {})
        )
        network = TimmNetwork(model)
    except (*MALFORMED, OSError) as error:
        raise UserError(f"model {name!r} cannot be built with {options or {}}: {first_line(error)}") from error
    logging.getLogger("timm").setLevel(logging.WARNING)
    return network


def first_line(error: BaseException) -> str:
    """The first line of an exception's text."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def plain_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """The network's own weights under its library's names: a timm student loads with `timm.create_model`."""
    return (network.model if isinstance(network, TimmNetwork | LogitNetwork) else network).state_dict()
