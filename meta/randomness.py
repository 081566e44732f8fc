"""Replaying dropout and other random numbers by stored generator states."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from meta.tensors import Tensors

GeneratorStates = dict[str, Tensor]
"""States of the default generators that a computation may draw from, by device: the CPU's and `cuda:0`'s, say."""


def read_generators(parameters: Tensors) -> GeneratorStates:
    """Read the generators of the CPU and of every accelerator that holds a parameter."""
    devices = {"cpu", *(str(tensor.device) for tensor in parameters.values())} - {"meta"}
    return {device: _call("get_rng_state", device) for device in sorted(devices)}


@contextmanager
def replaying(states: GeneratorStates) -> Iterator[None]:
    """Draw, inside the context, the numbers that were drawn after `states` were read; outside, nothing changes."""
    before = {device: _call("get_rng_state", device) for device in states}
    try:
        for device, state in states.items():
            _call("set_rng_state", device, state)
        yield
    finally:
        for device, state in before.items():
            _call("set_rng_state", device, state)


def _call(function: str, device: str, *state: Tensor) -> Tensor:
    """Call what reads or writes a device's generator; the CPU and MPS have one only, and are given no device."""
    kind = torch.device(device).type
    module = torch if kind == "cpu" else torch.get_device_module(kind)
    found: Tensor = getattr(module, function)(*state, *(() if kind in ("cpu", "mps") else (device,)))
    return found
