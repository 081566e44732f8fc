"""The outer step: average the hypergradients of several students, guard, clip, update."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from meta.types import Hypergradient


class OuterStep(NamedTuple):
    """What an outer step did.

    Attributes:
        value: Mean outer loss of the students that counted; NaN if none did.
        norm: Norm of the averaged hypergradient before clipping; NaN if no student counted.
        clipped: Whether the norm was above the bound.
        skipped: Whether no student had a finite hypergradient, so that nothing was updated.
        left_out: For each student left out, its index and what was not finite, such as `"2: weight, outer value"`.
    """

    value: float
    norm: float
    clipped: bool
    skipped: bool
    left_out: tuple[str, ...]


def outer_step(
    hypergradients: Sequence[Hypergradient],
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    clip_norm: float | None = None,
) -> OuterStep:
    """Average the finite hypergradients, clip the average to `clip_norm`, and let `optimizer` apply it.

    Args:
        hypergradients: One per student.
        parameters: The outer parameters, under the names that the hypergradients use.
        optimizer: The outer optimiser of these parameters.
        clip_norm: Largest norm of the average that passes unchanged; None never clips.

    Raises:
        ValueError: There is no hypergradient, or its names are not those of `parameters`.
    """
    if not hypergradients:
        raise ValueError("an outer step needs at least one hypergradient")
    for hypergradient in hypergradients:
        if hypergradient.grads.keys() != parameters.keys():
            strangers = sorted(hypergradient.grads.keys() ^ parameters.keys())
            raise ValueError(f"names in only one of the hypergradient and the outer parameters: {', '.join(strangers)}")

    faults = [_name_nonfinite(hypergradient) for hypergradient in hypergradients]
    left_out = tuple(f"{index}: {', '.join(names)}" for index, names in enumerate(faults) if names)
    counted = [hypergradient for hypergradient, names in zip(hypergradients, faults, strict=True) if not names]
    if not counted:
        return OuterStep(float("nan"), float("nan"), clipped=False, skipped=True, left_out=left_out)

    for name, parameter in parameters.items():
        parameter.grad = torch.stack([hypergradient.grads[name] for hypergradient in counted]).mean(0).to(parameter)
    value = torch.stack([hypergradient.outer_value for hypergradient in counted]).mean().item()
    bound = float("inf") if clip_norm is None else clip_norm
    norm = nn.utils.clip_grad_norm_(parameters.values(), bound).item()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return OuterStep(value, norm, clipped=norm > bound, skipped=False, left_out=left_out)


def _name_nonfinite(hypergradient: Hypergradient) -> list[str]:
    """Name what is not finite in a hypergradient."""

    def is_finite(tensor: Tensor) -> bool:
        return bool(torch.isfinite(tensor).all())

    names = [name for name, gradient in hypergradient.grads.items() if not is_finite(gradient)]
    return names if is_finite(hypergradient.outer_value) else [*names, "outer value"]
