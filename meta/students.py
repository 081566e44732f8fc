"""Several students in one rollout."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from meta.types import InnerLoss, OuterLoss, State, Tensors


class StackedProblem(NamedTuple):
    """A problem whose every parameter, buffer and batch has a leading dimension of students."""

    inner_loss: InnerLoss
    outer_loss: OuterLoss
    state: State


def stack_students(inner_loss: InnerLoss, outer_loss: OuterLoss, states: Sequence[State]) -> StackedProblem:
    """Turn the problem of one student into one of several, trained side by side under `torch.func.vmap`.

    Any estimator then gives the mean of the students' hypergradients. Students must share one architecture; the inner
    losses are added, so that each student is trained as if it were alone, and the outer losses are averaged. An
    optimiser that couples parameters (gradient clipping by the global norm) couples the students. Faster where one
    student leaves the machine idle (16 small perceptrons on one CPU thread: six times), slower for convolutions on a
    CPU (four ResNet-8: a third).

    Args:
        inner_loss: Of one student.
        outer_loss: Of one student.
        states: The students. Their optimisers must have taken equally many steps.

    Raises:
        ValueError: There are no students, or their states do not have the same names.
    """
    if not states:
        raise ValueError("there are no students to stack")
    trees = [{"parameters": s.parameters, "buffers": s.buffers, **s.optimizer} for s in states]
    names = [{tree: sorted(tensors) for tree, tensors in student.items()} for student in trees]
    if any(found != names[0] for found in names):
        raise ValueError("the students' states do not have the same names")

    def stacked_inner(parameters: Tensors, buffers: Tensors, hyper: Tensors, batch: Any) -> tuple[Tensor, Tensors]:
        over_students = torch.func.vmap(inner_loss, in_dims=(0, 0, None, 0), randomness="different")
        losses, updated = over_students(parameters, buffers, hyper, batch)
        return losses.sum(), updated

    def stacked_outer(parameters: Tensors, buffers: Tensors, batch: Any) -> Tensor:
        return torch.func.vmap(outer_loss, randomness="different")(parameters, buffers, batch).mean()

    def stack(pick: Any) -> Tensors:
        first = pick(states[0])
        return {name: torch.stack([pick(student)[name] for student in states]) for name in first}

    # A count of steps is one number for all the students of a stack.
    slots = {
        slot: states[0].optimizer[slot] if slot == "step" else stack(lambda student, slot=slot: student.optimizer[slot])
        for slot in states[0].optimizer
    }
    state = State(stack(lambda student: student.parameters), stack(lambda student: student.buffers), slots)
    return StackedProblem(stacked_inner, stacked_outer, state)


def stack_batches(batches: Sequence[Any]) -> Any:
    """Stack one batch of every student, tensor by tensor, to a batch of `stack_students`' problem."""
    return tree_map(lambda *leaves: torch.stack(leaves) if isinstance(leaves[0], Tensor) else leaves[0], *batches)


def unstack_state(state: State) -> list[State]:
    """Take a stacked state apart again, one state for every student."""
    count = len(next(iter(state.parameters.values())))

    def pick(tensors: Tensors, index: int) -> Tensors:
        return {name: tensor[index].clone() if tensor.dim() else tensor.clone() for name, tensor in tensors.items()}

    return [
        State(
            pick(state.parameters, index),
            pick(state.buffers, index),
            {slot: pick(tensors, index) for slot, tensors in state.optimizer.items()},
        )
        for index in range(count)
    ]
