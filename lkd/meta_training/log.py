"""What is logged of an outer step: figures, cost, pictures."""

import copy
import math
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import nn

from lkd.core.files import replaced_atomically
from lkd.losses.learned.file import NOT_LEARNED
from lkd.losses.learned.loss import LearnedLoss
from lkd.losses.learned.shares import SATURATED, balance_surface, find_saturated, gradient_shares, gradient_surface
from lkd.losses.logits import KDLoss
from lkd.meta_training.rollouts import InnerBatch
from lkd.pool.pool import World
from lkd.tracking.run import Run
from lkd.training.training import DivergedError
from meta import Audited, Estimator, OuterStep, Tensors, call_module

# ----------------------------------------------------------------------------------------------------------------------
# What meta-training cost, in units of one student training.

WARM_UP, TIMED = 3, 30


def read_clock(device: torch.device) -> float:
    """Seconds of work: on a CPU those of this process, which others do not disturb, else wall time."""
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def measure_training_seconds(worlds: list[World], loss: LearnedLoss) -> float:
    """Seconds by `read_clock` of one whole training with this loss, without evaluation; the worlds' mean.

    The median of a few steps, times their number: a training itself would take as long as it takes.
    """
    trainings = []
    for world in worlds:
        training = world.start(copy.deepcopy(loss).requires_grad_(False), world.seed)
        seconds = []
        for _ in range(min(WARM_UP + TIMED, training.total_steps)):
            started = read_clock(world.device)
            try:
                training.run_step()  # asks whether the loss is finite: the device has done its work when it returns
            except DivergedError:  # its steps took no longer than another's
                break
            finally:
                seconds.append(read_clock(world.device) - started)
        trainings.append(training.total_steps * statistics.median(seconds[WARM_UP:] or seconds))
    return sum(trainings) / len(trainings)


def summarize_cost(
    pool_trainings: float, reuse_trainings: float, outer_seconds: float, training_seconds: float
) -> dict[str, Any]:
    """What a learned loss's provenance says of its cost; both seconds are by `read_clock`.

    Of the outer steps count rollouts, hypergradients, and the trainings that the loss alternated with.
    """
    parts = {"pool": pool_trainings, "outer_steps": outer_seconds / training_seconds, "reuse": reuse_trainings}
    return {
        "cost_in_trainings": round(sum(parts.values()), 2),
        "parts_in_trainings": {name: round(value, 2) for name, value in parts.items()},
        "training_seconds": round(training_seconds, 2),
        "outer_seconds": round(outer_seconds, 2),
    }


# ----------------------------------------------------------------------------------------------------------------------
# What is logged of an outer step.

SCORE = "calibrated_cross_entropy"  # of looks at reuse: ranks like accuracy, but is less noisy
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
    result: OuterStep, balances: list[dict[str, float]], loss: LearnedLoss, estimator: Estimator | None
) -> dict[str, float]:
    """One row of the log: the mean of the students' `measure_balance`, and the latest audit of an audited estimator."""
    ages = [balance["outer/progress"] for balance in balances]
    row = {
        "outer/value": result.value,
        "outer/hypergradient_norm": result.norm,
        "outer/clipped": float(result.clipped),
        "outer/left_out": float(len(result.left_out)),
        **average_rows(balances),
        "outer/progress_least": min(ages),
        "outer/progress_most": max(ages),
        **{
            f"weights/{name}": float(sum(p.detach().square().sum() for p in part.parameters())) ** 0.5
            for name, part in loss.parts.items()
        },
    }
    if math.isfinite(result.signal_to_noise):  # there were two students at least
        row["outer/signal_to_noise"] = result.signal_to_noise
    if isinstance(estimator, Audited) and estimator.latest:
        latest = estimator.latest
        row |= {"outer/audit_cosine": latest.cosine, "outer/audit_norm_ratio": latest.norm_ratio}
    return row


def describe_audit(estimator: Estimator | None, step: int, said: str) -> str:
    """What the latest audit of an audited estimator says, in words; "" if there is none, or only that again."""
    if not (isinstance(estimator, Audited) and estimator.latest):
        return ""
    latest = estimator.latest
    if math.isnan(latest.cosine):
        return ""
    verdict = "adjoint, which is exact, takes over" if estimator.exact else "first_order is kept"
    line = (
        f"{verdict}: by an audit its hypergradient's cosine with the exact one is {latest.cosine:.3f} (from -1 to 1; "
        f"under {estimator.threshold:g} adjoint takes over), its norm {latest.norm_ratio:.3g} times as large (1 is "
        "equal; the loss is learned by Adam, to which a constant factor is none)"
    )
    return "" if verdict in said else f"outer step {step}: {line}"


def average_rows(rows: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure over the rows that have it."""
    found = dict.fromkeys(key for row in rows for key in row)
    columns = {key: [row[key] for row in rows if key in row] for key in found}
    return {key: sum(column) / len(column) for key, column in columns.items()}


def is_logged(step: int, outer_steps: int) -> bool:
    """Whether the step of this number, counted from 1, is logged: all, or of many every so many, and the last."""
    return (step - 1) % -(-outer_steps // ROWS) == 0 or step == outer_steps


def is_pictured(step: int, outer_steps: int, every: int) -> bool:
    """Whether the loss is drawn after this step: every so many, 0 for never, or in a long run as rarely as it takes."""
    return bool(every) and step % (every * -(-outer_steps // (every * PICTURES))) == 0


def show_loss(loss: LearnedLoss, step: int, run: Run, kept: str = "") -> None:
    """Draw what the loss over logits does to a student, beside KD; a loss without one has no such picture.

    `step`: outer steps taken.
    `kept`: what to call the loss that is kept, whose picture has a name of its own.
    """
    if "logits" not in loss.parts:
        return
    path = run.path / "pictures" / ("kept-loss.png" if kept else f"learned-loss-{step:05}.png")
    over_logits = copy.deepcopy(loss.leave_out_features()).cpu()
    plot_learned_loss(over_logits, KDLoss(0.5, 4.0), "KD(0.5, 4)", path, kept or "learned")
    run.tracker.show(step, "kept_loss" if kept else "learned_loss", path)


def find_kept_row(curve: Sequence[dict[str, Any]], kept_step: int | None) -> dict[str, Any]:
    """The row of the log that was measured with the loss that is kept, that after so many outer steps.

    A step is measured before its update: it is the next one's. After the last step, or where it is not said which loss
    is kept, it is the last row; an empty one if there is none.
    """
    rows = [row for row in curve if kept_step is not None and row["step"] > kept_step] or [*curve[-1:]]
    return rows[0] if rows else {}


def describe_reuse(
    best: dict[str, float], steps: int, classes: Mapping[str, int], start: str | None = None
) -> list[str]:
    """Which loss is saved, that of the best look's row, and whether it is worth more than a guess.

    `classes`: name → number of classes of each world; "" for the only one. `start`: the learned loss that it started
    from; None for fresh networks.
    """
    lines = [f"best by reuse: the loss after outer step {best['step']} of {steps}"]
    if best["step"] == 0:
        initial = f"the start, {start}, is kept" if start else f"the initial one; {NOT_LEARNED}"
        lines[0] += f": {initial}: no later one is better on meta-validation"
    if "regret" in best:
        regrets = {name: best[f"world/{name}/regret"] for name in classes if f"world/{name}/regret" in best}
        worst = max(regrets, key=regrets.__getitem__, default="")
        named = f", the worst {regrets[worst]:+.4f} in {worst}" if regrets else ""
        lines.append(f"regret, its calibrated cross-entropy less meta.reference's: mean {best['regret']:+.4f}{named}")
    for name, count in classes.items():
        reached, guessed = best[f"world/{name}/{SCORE}" if name else SCORE], math.log(count)
        if not reached < WORTH * guessed:
            lines.append(
                f"warning: {name and f'{name}: '}students that are trained with it know no more than a guess "
                f"(calibrated cross-entropy {reached:.4g} of {guessed:.4g}): lower train.learning_rate"
            )
    return lines


def describe_saturation(row: dict[str, float]) -> str | None:
    """A warning if a part of the loss has no gradient to speak of left, by one row of the log."""
    found = find_saturated({name.removeprefix(SHARE): share for name, share in row.items() if name.startswith(SHARE)})
    return f"warning: saturated, its gradient share is under {SATURATED:g}: {', '.join(found)}" if found else None


def check_rows(rows: Any, needed: Collection[str] = ()) -> list[dict[str, float]]:
    """Check rows of a log that a checkpoint holds: it may be a stranger's.

    Raises:
        ValueError: If a row lacks its step or a figure that is needed, or one is no number.
    """
    checked = [dict(row) for row in rows]
    for row in checked:
        numbers = all(isinstance(name, str) and isinstance(value, int | float) for name, value in row.items())
        if not numbers or not row.keys() >= {"step", *needed}:
            raise ValueError(f"a row of a log needs {', '.join(('step', *needed))}, and numbers alone")
    return checked


# ----------------------------------------------------------------------------------------------------------------------
# A picture of what a loss learned.

EXTENT = (0.0, 1.0, 0.0, 1.0)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG; no text in it is a formula: names of methods and classes may have a dollar sign.

    Figures are made without pyplot, whose backend and settings are those of whoever called.
    """
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    with matplotlib.rc_context({"text.parse_math": False}), replaced_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def plot_learned_loss(
    loss: LearnedLoss, kd: KDLoss, kd_label: str, path: Path, name: str = "learned", progress: float = 0.5
) -> None:
    """Draw the learned loss's gradient at the student's target logit beside KD's, and its weight and temperature."""
    weight, temperature = balance_surface(loss, progress)
    learned, hand_made = gradient_surface(loss, progress), gradient_surface(kd, progress)
    bound = max(float(learned.abs().max()), float(hand_made.abs().max()))
    panels: list[tuple[str, torch.Tensor, dict[str, Any]]] = [
        (f"{name}: gradient at the target logit", learned, {"cmap": "RdBu_r", "vmin": -bound, "vmax": bound}),
        (f"{kd_label}: gradient at the target logit", hand_made, {"cmap": "RdBu_r", "vmin": -bound, "vmax": bound}),
        (f"{name}: weight of the teacher, α", weight, {"cmap": "viridis", "vmin": 0, "vmax": 1}),
        (f"{name}: temperature, τ", temperature, {"cmap": "viridis", "vmin": 1}),
    ]
    figure = Figure(figsize=(15, 3.4), layout="constrained")
    axes = figure.subplots(1, 4)
    for axis, (title, surface, style) in zip(axes, panels, strict=True):
        picture = axis.imshow(surface.numpy(), origin="lower", extent=EXTENT, aspect="auto", **style)
        figure.colorbar(picture, ax=axis)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("student's probability of the label")
    axes[0].set_ylabel("teacher's probability of the label")
    save_figure(figure, path)
