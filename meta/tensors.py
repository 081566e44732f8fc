"""Named tensors, the state of an inner training, and arithmetic on both."""

from typing import NamedTuple

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
"""Named tensors: parameters, buffers, gradients, or outer parameters."""

PARAMETERS = "parameters"


class State(NamedTuple):
    """Everything an inner training needs to go on: what a rollout starts from and what it leaves.

    Attributes:
        parameters: The inner parameters, by name.
        buffers: Non-trained tensors such as BatchNorm statistics, by name.
        optimizer: The inner optimiser's state: slot name (say `momentum_buffer`) → parameter name → tensor. Empty
            before the first step.
    """

    parameters: Tensors
    buffers: Tensors
    optimizer: dict[str, Tensors]

    def detach(self) -> "State":
        """Copy the state, cut off from every graph and sharing no memory with the original."""
        slots = {slot: copy(tensors) for slot, tensors in self.optimizer.items()}
        return State(copy(self.parameters), copy(self.buffers), slots)


def copy(tensors: Tensors) -> Tensors:
    """Copy the tensors' values; no graph and no memory is shared."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def detach(tensors: Tensors) -> Tensors:
    """Cut the tensors off from their graph; memory is shared."""
    return {name: tensor.detach() for name, tensor in tensors.items()}


def as_leaves(tensors: Tensors) -> Tensors:
    """Copy the tensors' handles to new leaves that require gradients; memory is shared, graphs are not."""
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}


def add(first: Tensors, second: Tensors) -> Tensors:
    """Add by name; a name that one of the two lacks counts as zero there."""
    total = dict(first)
    for name, tensor in second.items():
        total[name] = total[name] + tensor if name in total else tensor
    return total


def flatten_state(state: State) -> dict[tuple[str, str], Tensor]:
    """Lay out a state's parameters and optimiser slots as one dict; buffers are left out."""
    trees = {PARAMETERS: state.parameters, **state.optimizer}
    return {(tree, name): tensor for tree, tensors in trees.items() for name, tensor in tensors.items()}


def unflatten_state(tensors: dict[tuple[str, str], Tensor]) -> State:
    """Undo `flatten_state`; the buffers are empty."""
    trees: dict[str, Tensors] = {PARAMETERS: {}}
    for (tree, name), tensor in tensors.items():
        trees.setdefault(tree, {})[name] = tensor
    return State(trees.pop(PARAMETERS), {}, trees)


def cosine_similarity(first: Tensors, second: Tensors) -> float:
    """Return the cosine between two sets of tensors, each taken as one vector; NaN if one of them vanishes."""
    dot = torch.stack([(first[name].double() * tensor.double()).sum() for name, tensor in second.items()]).sum()
    return (dot / (global_norm(first).double() * global_norm(second).double())).item()


def global_norm(tensors: Tensors) -> Tensor:
    """Return the 2-norm of all the tensors taken as one vector."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors.values()]))
