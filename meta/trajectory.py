"""The steps of a rollout, and how they are stored until the walk back."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args, overload

import torch
from torch import Tensor

from meta.randomness import GeneratorStates
from meta.types import State, Tensors

Storage = Literal["memory", "cpu", "bfloat16"]
"""How a rollout's steps are stored:

- `memory`: as they are, on their device.
- `cpu`: parameters, buffers, gradients and optimiser state of CUDA rollouts in pinned CPU memory; else as `memory`.
- `bfloat16`: parameters as bfloat16 differences from step to step, optimiser state rounded to bfloat16, gradients as
  they are: for each float32 parameter and step 2 bytes instead of 4. Each difference is taken to the parameters that
  will be read back for the step before, so that errors do not add up over the steps: every step is off by 2⁻⁹ of its
  own difference, and by what the additions round.

Gradients and optimiser state are only stored where the walk back reads them. Cosine of the hypergradient with
`bfloat16` to that with `memory`, ResNet-8, K = 20: under SGD with momentum `adjoint` 1.0000, `first_order` 1.0000 with
a learned loss and 0.9998 with distillation beside it; under Adam from a cold start `adjoint` 0.9999, `first_order`,
which is itself far from exact there, 0.94."""


@dataclass(frozen=True)
class Step:
    """One inner step: all that the walk back needs to take it again.

    Attributes:
        index: The step within the rollout, 0 … K-1.
        before: The state that the step started from.
        batch: Its batch.
        generators: Where the random generators stood.
        gradients: The inner loss's gradients with respect to the parameters that it reached.
        hyper_gradients: The same with respect to the outer parameters; empty if they were not asked for.
    """

    index: int
    before: State
    batch: Any
    generators: GeneratorStates
    gradients: Tensors
    hyper_gradients: Tensors


class Trajectory(NamedTuple):
    """The steps of a rollout and the state after the last one."""

    steps: Sequence[Step]
    end: State


def without_values(tensors: Tensors) -> Tensors:
    """Names, shapes and types alone, for what the walk back asks no more of: tensors on the `meta` device."""
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}


class StoredSteps(Sequence[Step]):
    """The last steps of a rollout, to be read one after the other, from either end.

    Their tensors are copied into blocks of memory that are laid out once for all steps: many small tensors that outlive
    the activations around them would fragment the heap.
    """

    def __init__(self, storage: Storage, capacity: int) -> None:
        """Store nothing yet.

        Args:
            storage: How steps are stored.
            capacity: How many steps to keep; the oldest one makes room.

        Raises:
            ValueError: There is no such storage.
        """
        if storage not in get_args(Storage):
            raise ValueError(f"no storage {storage!r}; there are {', '.join(get_args(Storage))}")
        self._storage = storage
        self._stored: deque[Step] = deque(maxlen=capacity)
        self._capacity = capacity
        self._row = 0
        self._blocks: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._device = torch.device("cpu")
        self._start: Tensors = {}
        # The parameters that are read back for the step `_position`.
        self._parameters: Tensors = {}
        self._position = 0

    def append(self, step: Step) -> None:
        """Store a step."""
        if len(self) == self._capacity:
            self._drop_oldest()
        if self._storage == "bfloat16":
            step = replace(step, before=self._encode(step.before))
        self._device = next(iter(step.before.parameters.values())).device
        self._stored.append(_map_trees(step, self._copy))
        self._row = (self._row + 1) % self._capacity

    def __len__(self) -> int:
        return len(self._stored)

    @overload
    def __getitem__(self, index: int) -> Step: ...
    @overload
    def __getitem__(self, index: slice) -> list[Step]: ...
    def __getitem__(self, index: int | slice) -> Step | list[Step]:
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        index = range(len(self))[index]
        step = self._stored[index]
        if self._storage == "cpu":
            return _map_trees(step, self._upload)
        if self._storage == "bfloat16":
            return replace(step, before=self._decode(step.before, index))
        return step

    def _upload(self, tree: str, tensors: Tensors) -> Tensors:
        # Adam's step counts lie on the CPU all along.
        return {
            name: tensor.to(self._device, non_blocking=True) if tensor.is_pinned() else tensor
            for name, tensor in tensors.items()
        }

    def _copy(self, tree: str, tensors: Tensors) -> Tensors:
        """Copy tensors into this step's row of the tree's blocks, one block for each data type and device."""
        sizes: dict[tuple[torch.dtype, torch.device], int] = {}
        for tensor in tensors.values():
            key = (tensor.dtype, tensor.device)
            sizes[key] = sizes.get(key, 0) + tensor.numel()
        rows = {key: self._reserve(tree, size, *key) for key, size in sizes.items() if key[1].type != "meta"}
        copies = {}
        for name, tensor in tensors.items():
            if tensor.is_meta:
                copies[name] = tensor
                continue
            key = (tensor.dtype, tensor.device)
            place, rows[key] = rows[key][: tensor.numel()], rows[key][tensor.numel() :]
            dense = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
            view = place.as_strided(tensor.shape, tensor.stride()) if dense else place.view(tensor.shape)
            copies[name] = view.copy_(tensor, non_blocking=self._storage == "cpu")
        return copies

    def _reserve(self, tree: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        pinned = self._storage == "cpu" and device.type == "cuda"
        place = {"pin_memory": True} if pinned else {"device": device}
        block = self._blocks.setdefault((tree, dtype, device), torch.empty(0))
        if not len(block):
            block = self._blocks[tree, dtype, device] = torch.empty(self._capacity, size, dtype=dtype, **place)
        # A step that reaches other parameters than the first one did gets memory of its own.
        return block[self._row] if block.shape[1] == size else torch.empty(size, dtype=dtype, **place)

    def _drop_oldest(self) -> None:
        if self._storage == "bfloat16" and len(self) > 1:
            self._seek(1)
            self._start, self._position = self._parameters, 0
        self._stored.popleft()

    def _encode(self, before: State) -> State:
        if self._stored:
            self._seek(len(self) - 1)
        else:
            self._start = self._parameters = before.parameters
        deltas = {name: (tensor - self._parameters[name]).bfloat16() for name, tensor in before.parameters.items()}
        self._parameters = {name: tensor + deltas[name] for name, tensor in self._parameters.items()}
        self._position = len(self)
        slots = {
            slot: {name: tensor.bfloat16() if tensor.dim() else tensor for name, tensor in tensors.items()}
            for slot, tensors in before.optimizer.items()
        }
        return State(deltas, before.buffers, slots)

    def _decode(self, before: State, index: int) -> State:
        self._seek(index)
        parameters = self._parameters
        slots = {
            slot: {name: tensor.to(parameters[name].dtype) for name, tensor in tensors.items()}
            for slot, tensors in before.optimizer.items()
        }
        return State(parameters, before.buffers, slots)

    def _seek(self, index: int) -> None:
        while self._position > index:
            deltas = self._stored[self._position].before.parameters
            self._parameters = {name: tensor - deltas[name] for name, tensor in self._parameters.items()}
            self._position -= 1
        while self._position < index:
            self._position += 1
            deltas = self._stored[self._position].before.parameters
            self._parameters = {name: tensor + deltas[name] for name, tensor in self._parameters.items()}
        if index == 0:
            # Nothing comes back from infinity by subtraction: whoever looks for a fault begins here.
            self._parameters = self._start


def _map_trees(step: Step, function: Callable[[str, Tensors], Tensors]) -> Step:
    """Apply a function to all of a step's named tensors but the batch, tree by tree."""
    before = State(
        function("parameters", step.before.parameters),
        function("buffers", step.before.buffers),
        {slot: function(f"optimizer {slot}", tensors) for slot, tensors in step.before.optimizer.items()},
    )
    return replace(
        step,
        before=before,
        gradients=function("gradients", step.gradients),
        hyper_gradients=function("outer gradients", step.hyper_gradients),
    )
