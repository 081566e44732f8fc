"""The steps of a rollout, and how they are stored until the walk back."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from meta.randomness import GeneratorStates
from meta.tensors import State, Tensors

Storage = Literal["memory", "bfloat16"]
"""How a rollout's steps are stored:

- `memory`: as they are, on their device.
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

    Their tensors are copied into blocks of memory that are laid out once for all steps, and made anew when a step is
    read: many small objects that outlive the activations around them would fragment the heap.
    """

    def __init__(self, storage: Storage, capacity: int) -> None:
        """Store nothing yet.

        `capacity`: how many steps to keep; the oldest one makes room, but for `bfloat16`, which takes no more.
        """
        if storage not in get_args(Storage):
            raise ValueError(f"no storage {storage!r}; there are {', '.join(get_args(Storage))}")
        self._storage = storage
        self._capacity = capacity
        self._rows: deque[_Row] = deque(maxlen=capacity)
        self._next_place = 0
        self._blocks: dict[_Key, Tensor] = {}
        self._layout: _Layout = {}
        self._start: Tensors = {}
        # The parameters that are read back for the step `_position`.
        self._parameters: Tensors = {}
        self._position = 0

    def append(self, step: Step) -> None:
        if self._storage == "bfloat16":
            step = replace(step, before=self._encode(step.before))
        trees = _list_trees(step)
        layout = {tree: _lay_out(tree, tensors) for tree, tensors in trees.items()}
        if layout != self._layout:
            self._layout = layout
        row = _Row(step.index, step.batch, self._layout, self._next_place, self._reserve(self._layout))
        for tree, places in self._layout.items():
            for name, place in places.items():
                self._view(row, place).copy_(trees[tree][name])
        self._rows.append(row)
        self._next_place = (self._next_place + 1) % self._capacity

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Step:  # type: ignore[override]  # nobody slices it
        index = range(len(self))[index]
        step = self._read(self._rows[index])
        return replace(step, before=self._decode(step.before, index)) if self._storage == "bfloat16" else step

    def _read(self, row: "_Row") -> Step:
        slots = {tree.removeprefix(SLOT): self._read_tree(row, tree) for tree in row.layout if tree.startswith(SLOT)}
        # torch.set_rng_state crashes on a view.
        generators = {name: self._view(row, place).clone() for name, place in row.layout["generators"].items()}
        return Step(
            row.number,
            State(self._read_tree(row, "parameters"), self._read_tree(row, "buffers"), slots),
            row.batch,
            generators,
            self._read_tree(row, "gradients"),
            self._read_tree(row, "outer gradients"),
        )

    def _read_tree(self, row: "_Row", tree: str) -> Tensors:
        return {name: self._view(row, place) for name, place in row.layout[tree].items()}

    def _view(self, row: "_Row", place: "_Place") -> Tensor:
        if place.key[2].type == "meta":
            return torch.empty_strided(place.shape, place.stride, dtype=place.key[1], device="meta")
        block = row.own[place.key] if place.key in row.own else self._blocks[place.key][row.place]
        return block[place.start : place.start + place.shape.numel()].as_strided(place.shape, place.stride)

    def _reserve(self, layout: "_Layout") -> dict["_Key", Tensor]:
        """Make the blocks that are not there yet; memory of its own for a step that does not fit into its row."""
        widths: dict[_Key, int] = {}
        for places in layout.values():
            for place in places.values():
                if place.key[2].type != "meta":
                    widths[place.key] = place.start + place.shape.numel()
        own = {}
        for key, width in widths.items():
            _, dtype, device = key
            if key not in self._blocks:
                self._blocks[key] = torch.empty(self._capacity, width, dtype=dtype, device=device)
            elif self._blocks[key].shape[1] != width:
                own[key] = torch.empty(width, dtype=dtype, device=device)
        return own

    def _encode(self, before: State) -> State:
        if self._rows:
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
            deltas = self._read_tree(self._rows[self._position], "parameters")
            self._parameters = {name: tensor - deltas[name] for name, tensor in self._parameters.items()}
            self._position -= 1
        while self._position < index:
            self._position += 1
            deltas = self._read_tree(self._rows[self._position], "parameters")
            self._parameters = {name: tensor + deltas[name] for name, tensor in self._parameters.items()}
        if index == 0:
            # Nothing comes back from infinity by subtraction: whoever looks for a fault begins here.
            self._parameters = self._start


SLOT = "optimizer "
_Key = tuple[str, torch.dtype, torch.device]  # a block holds one tree's tensors of one type on one device


class _Place(NamedTuple):
    """Where in its row of which block a tensor lies; one on the `meta` device lies nowhere."""

    key: _Key
    start: int
    shape: torch.Size
    stride: tuple[int, ...]


_Layout = dict[str, dict[str, _Place]]


class _Row(NamedTuple):
    """A stored step: its row in the blocks, and blocks of its own where it does not fit there."""

    number: int
    batch: Any
    layout: _Layout
    place: int
    own: dict[_Key, Tensor]


def _list_trees(step: Step) -> dict[str, Tensors]:
    """All of a step's named tensors but the batch."""
    return {
        "parameters": step.before.parameters,
        "buffers": step.before.buffers,
        "gradients": step.gradients,
        "outer gradients": step.hyper_gradients,
        "generators": step.generators,
        **{SLOT + slot: tensors for slot, tensors in step.before.optimizer.items()},
    }


def _lay_out(tree: str, tensors: Tensors) -> dict[str, _Place]:
    """Give every tensor its place in a row."""
    filled: dict[_Key, int] = {}
    places = {}
    for name, tensor in tensors.items():
        key = (tree, tensor.dtype, tensor.device)
        dense = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        stride = tensor.stride() if dense else torch.empty(tensor.shape, device="meta").stride()
        places[name] = _Place(key, filled.get(key, 0), tensor.shape, stride)
        filled[key] = filled.get(key, 0) + tensor.numel()
    return places
