"""Several students in one rollout."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from meta.optim import build_optimizer
from meta.optim.wrappers import clip_each_student
from meta.problem import Problem
from meta.tensors import State, Tensors


def stack_students(problems: Sequence[Problem]) -> Problem:
    """Turn the problems of several students into one, in which they are trained side by side under `torch.func.vmap`.

    Any estimator then gives the mean of the students' hypergradients. The inner losses are added, so that each student
    is trained as if it were alone, its gradient clipped by its own norm, and the outer losses are averaged. Faster
    where one student leaves the machine idle (16 small perceptrons on one CPU thread: six times), slower for
    convolutions on a CPU (four ResNet-8: a third).

    Args:
        problems: One of each student. Losses, outer parameters and optimiser are the first one's: the students share
            one architecture, and their optimisers have taken equally many steps.

    Raises:
        ValueError: There are no students, their states do not have the same names, or their optimisers have taken
            different numbers of steps.
    """
    if not problems:
        raise ValueError("there are no students to stack")
    first, states = problems[0], [problem.state for problem in problems]
    trees = [{"parameters": s.parameters, "buffers": s.buffers, **s.optimizer} for s in states]
    names = [{tree: sorted(tensors) for tree, tensors in student.items()} for student in trees]
    if any(found != names[0] for found in names):
        raise ValueError("the students' states do not have the same names")
    counts = [[int(count) for count in state.optimizer.get("step", {}).values()] for state in states]
    if any(found != counts[0] for found in counts):
        raise ValueError(
            "the students' optimisers have taken different numbers of steps, of which a stack has one: stack students "
            "of one age, or with State(parameters, buffers, {})"
        )

    def inner_loss(parameters: Tensors, buffers: Tensors, hyper: Tensors, batch: Any) -> tuple[Tensor, Tensors]:
        over_students = torch.func.vmap(first.inner_loss, in_dims=(0, 0, None, 0), randomness="different")
        losses, updated = over_students(parameters, buffers, hyper, batch)
        return losses.sum(), updated

    def outer_loss(parameters: Tensors, buffers: Tensors, batch: Any) -> Tensor:
        return torch.func.vmap(first.outer_loss, randomness="different")(parameters, buffers, batch).mean()

    # A count of steps is one number for all the students of a stack.
    slots = {
        slot: tensors if slot == "step" else _stack([state.optimizer[slot] for state in states])
        for slot, tensors in states[0].optimizer.items()
    }
    return replace(
        first,
        optimizer=lambda hyper: clip_each_student(build_optimizer(first.optimizer, hyper)),
        inner_loss=inner_loss,
        outer_loss=outer_loss,
        state=State(_stack([s.parameters for s in states]), _stack([s.buffers for s in states]), slots),
        inner_batches=[_stack(batches) for batches in zip(*(p.inner_batches for p in problems), strict=True)],
        outer_batch=_stack([problem.outer_batch for problem in problems]),
    )


def unstack_state(state: State) -> list[State]:
    """Take a stacked state apart again, one state for every student."""
    count = len(next(iter(state.parameters.values())))
    trees = (state.parameters, state.buffers, state.optimizer)
    return [State(*tree_map(lambda x: x[index].clone() if x.dim() else x.clone(), trees)) for index in range(count)]  # noqa: B023


def _stack(students: Sequence[Any]) -> Any:
    """Stack the students' trees of tensors to one; what is no tensor is taken from the first."""
    return tree_map(lambda *leaves: torch.stack(leaves) if isinstance(leaves[0], Tensor) else leaves[0], *students)
