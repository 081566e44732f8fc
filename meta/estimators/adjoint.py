"""The exact hypergradient by an adjoint walk over recomputed segments."""

from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from meta.checks import check_inputs, find_unused
from meta.estimators.parts import collect, trace_fault
from meta.optim import build_optimizer
from meta.problem import Hypergradient, Problem
from meta.randomness import replaying
from meta.rollout import drop_missing, record, unroll
from meta.tensors import State, Tensors, as_leaves, detach, flatten_state, unflatten_state
from meta.trajectory import Storage
from meta.walk import outer_cotangents, walk_back


@torch.enable_grad()
def adjoint(problem: Problem, *, chunk: int = 1, storage: Storage = "memory") -> Hypergradient:
    """Walk the adjoint back over segments of `chunk` steps, each taken again with its graph.

    Exact, with buffers held constant. Costs about four gradient evaluations a step, three in the last segment, whose
    graph is built on the way forward. Holds K states and one segment's activations: the latter do not grow with K.
    Every operation of the inner loss needs a double backward. (The reverse mode of Franceschi et al. 2017 with
    the recomputation of Griewank 1992.)

    Args:
        problem: The problem.
        chunk: Steps in a segment; the first segment may be shorter.
        storage: How the K states are stored; see `meta.trajectory.Storage`.

    Raises:
        ValueError: The inputs make no bi-level problem, or an operation has no double backward; the message says why.
    """
    check_inputs(problem)
    if chunk < 1:
        raise ValueError(f"a segment needs at least one step, not {chunk}")
    hyper, batches, length = problem.hyper, problem.inner_batches, len(problem.inner_batches)
    problem = replace(problem, hyper=as_leaves(hyper))
    head = max(0, length - chunk)
    optimizer = build_optimizer(problem.optimizer, detach(problem.hyper))
    recorded = record(replace(problem, inner_batches=batches[:head]), optimizer, "graph", storage)

    def take(segment: range, before: State) -> _Segment:
        slots = {slot: as_leaves(tensors) for slot, tensors in before.optimizer.items()}
        start = State(as_leaves(before.parameters), before.buffers, slots)
        part = replace(problem, state=start, inner_batches=batches[segment.start : segment.stop])
        # Each segment needs its own graph from the settings to the outer parameters: differentiating frees it.
        end, losses = unroll(part, build_optimizer(problem.optimizer, problem.hyper), segment.start)
        return _Segment(start, end, losses)

    last = take(range(head, length), recorded.end)
    unused = problem.hyper

    def pull_back(segment: range, cotangents: State, to_start: bool) -> tuple[State, Tensors]:
        nonlocal unused
        if segment.start == head:
            taken = last
        else:
            step = recorded.steps[segment.start]
            with replaying(step.generators):
                taken = take(segment, step.before)
        pulled, grads = _differentiate(taken, cotangents, problem.hyper, to_start)
        unused = {name: leaf for name, leaf in unused.items() if name not in grads}
        unused = {name: unused[name] for name in find_unused(taken.losses, unused)}
        return pulled, grads

    value, cotangents = outer_cotangents(problem, last.end)
    bounds = [*sorted({0, *range(head, 0, -chunk)}), length]
    walk = walk_back([range(*pair) for pair in pairwise(bounds)], cotangents, pull_back)
    result = collect(value, walk.grads, hyper, last.end, unused, walk.norms)
    return trace_fault(result, problem, recorded.steps)


class _Segment(NamedTuple):
    """Steps taken with their graph."""

    start: State
    end: State
    losses: list[Tensor]


def _differentiate(segment: _Segment, cotangents: State, leaves: Tensors, to_start: bool) -> tuple[State, Tensors]:
    """Pull cotangents back through a segment's graph to its start (unless `to_start`) and to the outer parameters."""
    ends, weights = flatten_state(segment.end), flatten_state(cotangents)
    outputs = {key: ends[key] for key in weights if ends[key].requires_grad}
    inner = {} if to_start else flatten_state(segment.start)
    targets, along = [*inner.values(), *leaves.values()], [weights[key] for key in outputs]
    found = torch.autograd.grad(list(outputs.values()), targets, along, allow_unused=True)
    pulled = {key: value for key, value in zip(inner, found, strict=False) if value is not None}
    return unflatten_state(pulled), drop_missing(leaves, found[len(inner) :])
