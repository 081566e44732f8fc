"""The outer step: average the hypergradients of several students, guard, clip, update."""

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meta.problem import Hypergradient
from meta.tensors import Tensors


class OuterStep(NamedTuple):
    """What an outer step did.

    Attributes:
        value: Mean outer loss of the students that counted; NaN if none did.
        norm: Norm of the averaged hypergradient before clipping; NaN if no student counted.
        clipped: Whether the norm was above the bound.
        skipped: Whether no student's hypergradient counted, so that nothing was updated.
        left_out: For each of this process's students left out, its index and what was not finite, such as
            `"2: weight, outer value"` or `"2: inner step 4: gradient of 'conv.weight'"`, or its norm over the bound.
        signal_to_noise: Norm of the averaged hypergradient over its standard error, both over all outer parameters,
            the error from how the students differ; NaN if fewer than two counted.
        norms: Norm of the hypergradient of each of this process's students that counted.
    """

    value: float
    norm: float
    clipped: bool
    skipped: bool
    left_out: tuple[str, ...]
    signal_to_noise: float = float("nan")
    norms: tuple[float, ...] = ()


def outer_step(
    hypergradients: Sequence[Hypergradient],
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    clip_norm: float | None = None,
    bound: float = math.inf,
) -> OuterStep:
    """Average the finite hypergradients, clip the average to `clip_norm`, and let `optimizer` apply it.

    Under torch.distributed the average is over the students of all processes, each of which must call this with the
    same parameters and ends with the same update. Processes may bring different numbers of students.

    Args:
        hypergradients: One per student.
        parameters: The outer parameters, under the names that the hypergradients use.
        optimizer: The outer optimiser of these parameters.
        clip_norm: Largest norm of the average that passes unchanged; None never clips.
        bound: Largest norm of a hypergradient that counts.

    Raises:
        ValueError: There is no hypergradient, or its names are not those of `parameters`.
    """
    if not hypergradients:
        raise ValueError("an outer step needs at least one hypergradient")
    for hypergradient in hypergradients:
        if hypergradient.grads.keys() != parameters.keys():
            strangers = sorted(hypergradient.grads.keys() ^ parameters.keys())
            raise ValueError(f"names in only one of the hypergradient and the outer parameters: {', '.join(strangers)}")

    faults = [_find_faults(hypergradient, bound) for hypergradient in hypergradients]
    left_out = tuple(f"{index}: {', '.join(names)}" for index, names in enumerate(faults) if names)
    counted = [hypergradient for hypergradient, names in zip(hypergradients, faults, strict=True) if not names]
    value, grads, count, mean_square = _average(counted, parameters)
    if count == 0:
        return OuterStep(float("nan"), float("nan"), clipped=False, skipped=True, left_out=left_out)

    for name, parameter in parameters.items():
        parameter.grad = grads[name]
    largest = math.inf if clip_norm is None else clip_norm
    norm = nn.utils.clip_grad_norm_(parameters.values(), largest).item()
    if math.isfinite(norm):  # else finite hypergradients have a sum that is not
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    error = max(mean_square - norm**2, 0.0) / (count - 1) if count > 1 else float("nan")
    ratio = norm / error**0.5 if error else float("inf")
    norms = tuple(float(hypergradient.norm) for hypergradient in counted)
    return OuterStep(value, norm, norm > largest, not math.isfinite(norm), left_out, ratio, norms)


def _average(
    hypergradients: Sequence[Hypergradient], parameters: dict[str, nn.Parameter]
) -> tuple[float, Tensors, int, float]:
    """Average outer values and hypergradients over the students of every process.

    Returns:
        Mean outer value, mean hypergradient, how many students there were, and the mean of their squared norms.
    """
    like = next(iter(parameters.values()))
    rows = [
        torch.cat([h.outer_value.to(like).reshape(1), *(h.grads[name].to(like).flatten() for name in parameters)])
        for h in hypergradients
    ]
    if dist.is_available() and dist.is_initialized():
        # Gathered, not reduced: the sum is then taken in one order, whatever the number of processes.
        parts: list[list[Tensor]] = [[]] * dist.get_world_size()
        dist.all_gather_object(parts, [row.cpu() for row in rows])
        rows = [row.to(like) for part in parts for row in part]
    if not rows:
        return float("nan"), {}, 0, float("nan")
    squares = sum(float(row[1:].square().sum()) for row in rows)
    value, *flat = torch.stack(rows).mean(0).split([1, *(parameter.numel() for parameter in parameters.values())])
    grads = {n: entry.view_as(p).to(p) for (n, p), entry in zip(parameters.items(), flat, strict=True)}
    return value.item(), grads, len(rows), squares / len(rows)


def _find_faults(hypergradient: Hypergradient, bound: float) -> list[str]:
    """Name what is not finite in a hypergradient, or its norm if that is too large to count."""
    if hypergradient.fault is not None:
        return [hypergradient.fault]

    def is_finite(tensor: Tensor) -> bool:
        return bool(torch.isfinite(tensor).all())

    names = [name for name, gradient in hypergradient.grads.items() if not is_finite(gradient)]
    names += [] if is_finite(hypergradient.outer_value) else ["outer value"]
    norm = float(hypergradient.norm)
    if not names and not norm <= min(bound, sys.float_info.max):
        return [f"norm {norm:.3g} > {bound:.3g}"]
    return names
