"""Parts of a network by name: its classifier, and stages that are frozen."""

import copy
from collections import defaultdict
from typing import Any

from timm.layers import FrozenBatchNormAct2d
from timm.models import group_parameters
from timm.utils import freeze, unfreeze
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

from lkd.core.errors import UserError, check_choice
from lkd.models.build import unwrap

FROZEN_NORMS = (FrozenBatchNorm2d, FrozenBatchNormAct2d)


def find_head(network: nn.Module) -> tuple[str, ...]:
    """Names of the classifier's modules: those that timm names, else the last linear layer; none if there is none."""
    model = unwrap(network)
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    if named:
        return (named,) if isinstance(named, str) else tuple(named)
    return tuple([name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1:])


def is_within(name: str, modules: tuple[str, ...]) -> bool:
    """Whether a parameter belongs to one of these modules."""
    return any(name.startswith(f"{module}.") for module in modules)


def list_stages(network: nn.Module) -> dict[str, list[str]]:
    """Name → parameters of what can be frozen: stem, stage1, ... by timm's `group_matcher`, and every module."""
    model: Any = unwrap(network)
    stages: dict[str, list[str]] = defaultdict(list)
    for name, _ in model.named_parameters():
        words = name.split(".")
        for end in range(1, len(words)):
            stages[".".join(words[:end])].append(name)
    if hasattr(model, "group_matcher"):
        groups = group_parameters(model, model.group_matcher(coarse=True))
        own = {f"stage{number}" if number else "stem": names for number, names in groups.items()}
        head = find_head(model)
        stages |= {name: names for name, names in own.items() if not all(is_within(each, head) for each in names)}
    return stages


def freeze_stages(network: nn.Module, names: list[str]) -> nn.Module:
    """Freeze stages of a network: their parameters, and the statistics of their BatchNorm."""
    model, stages = unwrap(network), list_stages(network)
    for stage in names:
        check_choice("freeze", stage, stages)
        for name in stages[stage]:
            model.get_parameter(name).requires_grad_(False)
    modules = {name.rpartition(".")[0] for stage in names for name in stages[stage]} - {""}
    if modules:
        freeze(model, sorted(modules))
    for name in sorted(modules):
        if isinstance(norm := model.get_submodule(name), _BatchNorm):
            raise UserError(
                f"freeze: {name} is a {type(norm).__name__}, whose statistics would go on moving: those of BatchNorm2d "
                "alone can be frozen; name other stages"
            )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"freeze: {', '.join(names)} leaves nothing of this network to train; leave one out")
    return network


def thaw(network: nn.Module) -> nn.Module:
    """A copy whose frozen BatchNorm is BatchNorm again, or the network itself if it has none."""
    if not any(isinstance(module, FROZEN_NORMS) for module in network.modules()):
        return network
    network = copy.deepcopy(network)
    unfreeze(unwrap(network))
    return network
