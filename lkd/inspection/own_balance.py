"""The weights and temperatures that a form of a learned loss has of its own."""

from typing import Any

import torch
from torch import nn

from lkd.inspection.probes import States, parts_at
from lkd.losses.learned import DecoupledLoss
from lkd.losses.learned.inputs import read_logits


@torch.no_grad()
def read_own_balance(loss: nn.Module, states: States, progress: float) -> dict[str, float]:
    """Their means over the states, by name; empty where the form has none.

    Args:
        loss: The loss.
        states: Where it is looked at.
        progress: How far the training is, in [0, 1].

    Returns:
        `weight` (α) and `temperature` (τ) as the form itself means them; of the decoupled form also `factor` (β of the
        other classes) and `ramp` (the part of the teacher's terms that counts at this progress).
    """
    part: Any = parts_at(loss, progress).get("logits")
    if not hasattr(part, "weights_and_temperatures"):
        return {}
    weight, temperature = part.weights_and_temperatures(states.student, states.teacher, states.target, progress)
    own = {"weight": float(weight.mean()), "temperature": float(temperature.mean())}
    if isinstance(part, DecoupledLoss):
        _, _, factor = part.set_weights(read_logits(states.student, states.teacher, states.target), progress)
        own |= {"factor": float(factor.mean()), "ramp": float(part.ramp(progress, weight))}
    return own
