"""The exact hypergradient by an adjoint walk over recomputed segments."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from meta.checks import check_inputs, find_unused
from meta.estimators.parts import collect, find_fault, is_finite
from meta.optim import OptimizerOrRecipe, build_optimizer
from meta.randomness import replaying
from meta.rollout import record, unroll
from meta.tensors import as_leaves, flatten_state, unflatten_state
from meta.trajectory import Storage
from meta.types import Hypergradient, InnerLoss, OuterLoss, State, Tensors
from meta.walk import outer_cotangents, walk_back


@torch.enable_grad()
def adjoint(
    inner_loss: InnerLoss,
    outer_loss: OuterLoss,
    state: State,
    hyper: Tensors,
    inner_batches: Sequence[Any],
    outer_batch: Any,
    optimizer: OptimizerOrRecipe,
    *,
    chunk: int = 1,
    max_growth: float | None = None,
    storage: Storage = "memory",
) -> Hypergradient:
    """Walk the adjoint back over segments of `chunk` steps, each taken again with its graph.

    Exact, with buffers held constant. Costs about four gradient evaluations a step, three in the last segment, whose
    graph is built on the way forward. Holds K states and one segment's activations: the latter do not grow with K.
    Every operation of the inner loss needs a double backward. (The reverse mode of Franceschi et al. 2017 with
    the recomputation of Griewank 1992.)

    Args (beside those of every `Estimator`):
        chunk: Steps in a segment; the first segment may be shorter.
        max_growth: Stop the walk where the adjoint's norm has grown by more than this factor; None never stops.
        storage: How the K states are stored; see `meta.trajectory.Storage`.

    Raises:
        ValueError: The inputs make no bi-level problem, or an operation has no double backward; the message says why.
    """
    check_inputs(state, hyper, inner_batches)
    if chunk < 1:
        raise ValueError(f"a segment needs at least one step, not {chunk}")
    leaves = as_leaves(hyper)
    head = max(0, len(inner_batches) - chunk)
    detached = build_optimizer(optimizer, {name: leaf.detach() for name, leaf in leaves.items()})
    recorded = record(inner_loss, state, leaves, inner_batches[:head], detached, "graph", storage)

    def take(segment: range, before: State) -> _Segment:
        start = State(
            as_leaves(before.parameters),
            before.buffers,
            {slot: as_leaves(tensors) for slot, tensors in before.optimizer.items()},
        )
        batches = inner_batches[segment.start : segment.stop]
        # Each segment needs its own graph from the settings to the outer parameters: differentiating frees it.
        built = build_optimizer(optimizer, leaves)
        end, losses = unroll(inner_loss, start, leaves, batches, built, segment.start)
        return _Segment(start, end, losses)

    last = take(range(head, len(inner_batches)), recorded.end)
    unused = leaves

    def pull_back(segment: range, cotangents: State, to_start: bool) -> tuple[State, Tensors]:
        nonlocal unused
        if segment.start == head:
            taken = last
        else:
            step = recorded.steps[segment.start]
            with replaying(step.generators):
                taken = take(segment, step.before)
        pulled, grads = _differentiate(taken, cotangents, leaves, to_start)
        unused = {name: leaf for name, leaf in unused.items() if name not in grads}
        unused = {name: unused[name] for name in find_unused(taken.losses, unused)}
        return pulled, grads

    value, cotangents = outer_cotangents(outer_loss, last.end, outer_batch)
    starts = sorted({0, *range(head, 0, -chunk)})
    bounds = [*starts, len(inner_batches)]
    walk = walk_back([range(*pair) for pair in pairwise(bounds)], cotangents, pull_back, max_growth)
    truncated_at = None if walk.segments_left == 0 else bounds[walk.segments_left]
    # Steps that were not crossed may use what the others do not.
    unused = {} if walk.segments_left else unused
    result = collect(value, walk.grads, hyper, last.end, unused, walk.norms, truncated_at)
    if is_finite(result):
        return result
    return result._replace(fault=find_fault(inner_loss, leaves, recorded.steps, last.end))


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
    found = torch.autograd.grad(
        list(outputs.values()),
        [*inner.values(), *leaves.values()],
        [weights[key] for key in outputs],
        allow_unused=True,
    )
    pulled = {key: value for key, value in zip(inner, found, strict=False) if value is not None}
    grads = {name: value for name, value in zip(leaves, found[len(inner) :], strict=True) if value is not None}
    return unflatten_state(pulled), grads
