"""What is logged of an outer step."""

import math
from typing import Any

import torch
from torch import nn

from lkd.losses import KDLoss, LearnedLoss
from lkd.losses.learned import find_saturated, gradient_shares
from lkd.losses.learned.shares import SATURATED
from lkd.rollouts import InnerBatch
from lkd.run import Run
from meta import Audited, Estimator, OuterStep, call_module
from meta.types import Tensors

SHARE = "share/"
WORTH = 0.99  # of the cross-entropy of guessing: what a student has learned anything below
ROWS = 1000  # of a log, and of the curve that checkpoints carry along, at most
PICTURES = 100  # of a run, at most


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


def log_row(
    result: OuterStep, balances: list[dict[str, float]], loss: LearnedLoss, estimator: Estimator
) -> dict[str, float]:
    """One row of the log.

    Args:
        result: What the outer step did.
        balances: Of `measure_balance`, for each student.
        loss: The loss, after the step; the norm of each part's weights is logged.
        estimator: The estimator; an audited one adds its latest audit.
    """
    ages = [balance["outer/progress"] for balance in balances]
    row = {
        "outer/value": result.value,
        "outer/hypergradient_norm": result.norm,
        "outer/clipped": float(result.clipped),
        "outer/left_out": float(len(result.left_out)),
        **{key: sum(balance[key] for balance in balances) / len(balances) for key in balances[0]},
        "outer/progress_least": min(ages),
        "outer/progress_most": max(ages),
        **{f"weights/{name}": measure_weights(part) for name, part in loss.parts.items()},
    }
    if math.isfinite(result.signal_to_noise):  # there were two students at least
        row["outer/signal_to_noise"] = result.signal_to_noise
    if isinstance(estimator, Audited) and estimator.audits:
        latest = list(estimator.audits.values())[-1]
        row |= {"outer/audit_cosine": latest.cosine, "outer/audit_norm_ratio": latest.norm_ratio}
    return row


def is_logged(step: int, outer_steps: int) -> bool:
    """Whether the step of this number, counted from 1, is logged: all, or of many every so many, and the last."""
    return (step - 1) % -(-outer_steps // ROWS) == 0 or step == outer_steps


def is_pictured(step: int, outer_steps: int, every: int) -> bool:
    """Whether the loss is drawn after this step: every so many, 0 for never, or in a long run as rarely as it takes."""
    return bool(every) and step % (every * -(-outer_steps // (every * PICTURES))) == 0


def measure_weights(part: nn.Module) -> float:
    """Norm of all weights of a part of the loss."""
    return float(sum(parameter.detach().square().sum() for parameter in part.parameters())) ** 0.5


def show_loss(loss: LearnedLoss, step: int, run: Run) -> None:
    """Draw what the loss over logits does to a student, beside KD; a loss without one has no such picture."""
    if "logits" not in loss.parts:
        return
    from lkd.plots import plot_learned_loss

    path = run.path / "pictures" / f"learned-loss-{step:05}.png"
    plot_learned_loss(loss, KDLoss(0.5, 4.0), "KD(0.5, 4)", path)
    run.tracker.show(step, "learned_loss", path)


def describe_reuse(best: dict[str, float], steps: int, classes: int) -> list[str]:
    """Which loss is saved, and whether it is worth anything.

    Args:
        best: The best look's row.
        steps: Outer steps taken.
        classes: What a student that knows nothing guesses among.
    """
    lines = [f"best by reuse: the loss after outer step {best['step']} of {steps}"]
    if best["step"] == 0:
        lines[0] += ": the initial one; none that was learned is better on meta-validation"
    if not best["calibrated_cross_entropy"] < WORTH * math.log(classes):
        entropies = f"{best['calibrated_cross_entropy']:.4g} of {math.log(classes):.4g}"
        lines.append(
            "warning: students that are trained with it know no more than a guess (calibrated cross-entropy "
            f"{entropies}): lower train.learning_rate"
        )
    return lines


def describe_saturation(row: dict[str, float]) -> str | None:
    """A warning if a part of the loss has no gradient to speak of left, by one row of the log."""
    shares = {name.removeprefix(SHARE): share for name, share in row.items() if name.startswith(SHARE)}
    saturated = find_saturated(shares)
    return (
        f"warning: saturated, its gradient share is under {SATURATED:g}: {', '.join(saturated)}" if saturated else None
    )
