"""A module as a pure function of its parameters and buffers."""

from typing import Any

from torch import nn
from torch.func import functional_call

from meta.types import Tensors


def call_module(
    module: nn.Module, parameters: Tensors, buffers: Tensors, *args: Any, **kwargs: Any
) -> tuple[Any, Tensors]:
    """Call `module` with other parameters and buffers; write to neither of them nor to the module.

    Args:
        module: The network. Its training mode is respected.
        parameters: Parameter name → tensor. Names that are left out keep the module's own values.
        buffers: Buffer name → tensor, as they are before the call.
        *args: Passed to the module's `forward`.
        **kwargs: Passed to the module's `forward`.

    Returns:
        The module's output, and the buffers after the call (BatchNorm moves its statistics in train mode).
    """
    # The clones are made here, inside the differentiated function: torch.func refuses writes to captured tensors.
    updated = {name: buffer.clone() for name, buffer in buffers.items()}
    output = functional_call(module, {**parameters, **updated}, args, kwargs)
    return output, updated
