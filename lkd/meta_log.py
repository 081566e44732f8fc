"""What is logged of an outer step."""

from typing import Any

import torch
from torch import nn

from lkd.losses import LearnedLoss
from lkd.losses.learned import find_saturated, gradient_shares
from lkd.losses.learned.shares import SATURATED
from lkd.rollouts import InnerBatch
from meta import Audited, Estimator, OuterStep, call_module
from meta.types import Tensors

SHARE = "share/"


@torch.no_grad()
def measure_balance(
    loss: LearnedLoss, student: nn.Module, parameters: Tensors, buffers: Tensors, batch: InnerBatch
) -> dict[str, float]:
    """The loss's mean weight and temperature for a student on a batch, its terms' shares, and the progress there."""
    images, teacher, progress = batch
    outputs, _ = call_module(student, parameters, buffers, images.images)
    shares = gradient_shares(loss, outputs, teacher, images.target, progress)
    row = {"outer/progress": progress} | {SHARE + name: share for name, share in shares.items()}
    if "logits" not in loss.parts:
        return row
    part: Any = loss.parts["logits"]
    weight, temperature = part.weights_and_temperatures(outputs.logits, teacher.logits, images.target, progress)
    return row | {"loss/weight": float(weight.mean()), "loss/temperature": float(temperature.mean())}


def log_row(result: OuterStep, balances: list[dict[str, float]], estimator: Estimator) -> dict[str, float]:
    """One row of the log.

    Args:
        result: What the outer step did.
        balances: Of `measure_balance`, for each student.
        estimator: The estimator; an audited one adds its latest audit.
    """
    row = {
        "outer/value": result.value,
        "outer/hypergradient_norm": result.norm,
        "outer/clipped": float(result.clipped),
        "outer/left_out": float(len(result.left_out)),
        **{key: sum(balance[key] for balance in balances) / len(balances) for key in balances[0]},
    }
    if isinstance(estimator, Audited) and estimator.audits:
        latest = list(estimator.audits.values())[-1]
        row |= {"outer/audit_cosine": latest.cosine, "outer/audit_norm_ratio": latest.norm_ratio}
    return row


def describe_saturation(row: dict[str, float]) -> str | None:
    """A warning if a part of the loss has no gradient to speak of left, by one row of the log."""
    shares = {name.removeprefix(SHARE): share for name, share in row.items() if name.startswith(SHARE)}
    saturated = find_saturated(shares)
    return (
        f"warning: saturated, its gradient share is under {SATURATED:g}: {', '.join(saturated)}" if saturated else None
    )
