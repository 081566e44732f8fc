"""Replaying dropout and other random numbers by stored generator states."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from meta.tensors import Tensors


class GeneratorStates(NamedTuple):
    """States of the default generators that a computation may draw from; of CUDA devices by their index."""

    cpu: Tensor
    cuda: dict[int, Tensor]


def read_generators(parameters: Tensors) -> GeneratorStates:
    """Read the generators of the CPU and of every CUDA device that holds a parameter."""
    devices = {tensor.device.index for tensor in parameters.values() if tensor.is_cuda}
    return GeneratorStates(torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in devices})


@contextmanager
def replaying(states: GeneratorStates) -> Iterator[None]:
    """Draw, inside the context, the numbers that were drawn after `states` were read; outside, nothing changes."""
    with torch.random.fork_rng(list(states.cuda)):
        torch.set_rng_state(states.cpu)
        for device, state in states.cuda.items():
            torch.cuda.set_rng_state(state, device)
        yield
