"""From a live `torch.optim` optimiser to its functional equal and its state."""

from typing import Any

import torch
from torch import nn

from meta.optim.adam import Adam, AdamW
from meta.optim.base import Optimizer
from meta.optim.sgd import SGD
from meta.optim.wrappers import Grouped
from meta.tensors import Tensors

_UNSUPPORTED = ("amsgrad", "maximize", "differentiable")


def from_torch(optimizer: torch.optim.Optimizer, module: nn.Module) -> Optimizer:
    """Return the functional optimiser that takes the steps that `optimizer` takes now, with its parameter groups.

    Args:
        optimizer: An SGD, Adam or AdamW of torch.
        module: The network whose parameters it steps; gives them their names.

    Raises:
        ValueError: The optimiser, or a setting of it, has no functional equal here.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"{optimizer!r} is no optimiser of torch: give an object, as torch.optim.SGD(parameters, 0.1)")
    groups = [_convert(type(optimizer), group) for group in optimizer.param_groups]
    if len(groups) == 1:
        return groups[0]
    names = {parameter: name for name, parameter in module.named_parameters()}
    pairs = zip(groups, optimizer.param_groups, strict=True)
    chosen = {names[parameter]: built for built, group in pairs for parameter in group["params"]}
    return Grouped(chosen.__getitem__)


def read_slots(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensors]:
    """Copy the optimiser's state out as slot name → parameter name → tensor."""
    slots: dict[str, Tensors] = {}
    for name, parameter in module.named_parameters():
        for slot, tensor in optimizer.state.get(parameter, {}).items():
            if tensor is not None:
                slots.setdefault(slot, {})[name] = torch.as_tensor(tensor).detach().clone()
    return slots


def _convert(kind: type, group: dict[str, Any]) -> Optimizer:
    if active := [setting for setting in _UNSUPPORTED if group.get(setting)]:
        raise ValueError(f"unsupported setting of {kind.__name__}: {', '.join(active)}")
    if kind is torch.optim.SGD:
        momentum, dampening = group["momentum"], group["dampening"]
        return SGD(group["lr"], momentum, dampening, group["nesterov"], group["weight_decay"])
    if kind in (torch.optim.Adam, torch.optim.AdamW):
        decoupled = group.get("decoupled_weight_decay", kind is torch.optim.AdamW)
        functional = AdamW if decoupled else Adam
        return functional(group["lr"], group["betas"], group["eps"], group["weight_decay"])
    raise ValueError(f"unsupported inner optimiser {kind.__name__}: SGD, Adam or AdamW")
