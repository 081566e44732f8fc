"""Which hypergradients are too large to count, and what a checkpoint must hold."""

import math
import statistics
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from lkd.meta_training.online_student import Point

# ----------------------------------------------------------------------------------------------------------------------
# What a checkpoint of meta-training must hold: checked before it is used, since it may be a stranger's.


def check_points(points: Any, loss: nn.Module) -> list[Point]:
    """Weights of a loss, and from which progress on they are in charge.

    Raises:
        ValueError: If the weights are not those of `loss`, or their starts are not in ascending order in [0, 1].
    """
    shapes = {name: tensor.shape for name, tensor in loss.state_dict().items()}
    checked = [(float(start), dict(state)) for start, state in points]
    starts = [start for start, _ in checked]
    if starts != sorted(starts) or not all(0 <= start <= 1 for start in starts):
        raise ValueError(f"points of progress {starts} do not ascend in [0, 1]")
    for _, state in checked:
        if {name: tensor.shape for name, tensor in state.items()} != shapes:
            raise ValueError("weights of a point of progress are not those of the loss")
    return checked


def check_rows(rows: Any, needed: Collection[str]) -> list[dict[str, float]]:
    """Rows of a log.

    Raises:
        ValueError: If a row lacks a figure that is needed, or one is no number.
    """
    checked = [dict(row) for row in rows]
    for row in checked:
        if missing := set(needed) - row.keys():
            raise ValueError(f"a row lacks {', '.join(sorted(missing))}")
        if not all(isinstance(name, str) and isinstance(value, int | float) for name, value in row.items()):
            raise ValueError("a row holds something else than numbers")
    return checked


def check_fields(state: Any, like: dict[str, Any]) -> dict[str, Any]:
    """Fields of an object.

    Raises:
        ValueError: If they are not those of `like`, or one is of another type.
    """
    if state.keys() != like.keys():
        raise ValueError(f"has the fields {', '.join(map(str, state))}, not {', '.join(like)}")
    for name, value in state.items():
        if type(value) is not type(like[name]):
            raise ValueError(f"{name} is a {type(value).__name__}, not a {type(like[name]).__name__}")
    return dict(state)


# ----------------------------------------------------------------------------------------------------------------------
# Which hypergradients are too large to count, and what follows when none has counted for long.

WINDOW = 50  # norms that the median is taken of
LEAST = 10  # with fewer known there is no bound
LOST_IN_A_ROW = 3  # outer steps
NAMED = 10  # reasons that are kept
LONGEST = 100  # letters of one


class OuterGuard:
    """Keeps exploding hypergradients out of the loss and of the outer optimiser's moments.

    A hypergradient that is not finite is left out always; one whose norm is more than `factor` times the median of the
    last 50 that counted (once 10 are known), too. After three outer steps in a row in which none counted rollouts are
    halved, or, once they are one step long, the outer learning rate; the norms known so far are then forgotten: they
    are those of longer rollouts.

    Args:
        factor: How many times the median a norm may be; 0 for any finite norm.

    Attributes:
        rate: What the outer learning rate is multiplied by.
        counted: Hypergradients that counted.
        left_out: Those that did not.
        reasons: Why, of the first of them.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.norms: list[float] = []
        self.lost = self.halvings = self.counted = self.left_out = 0
        self.rate = 1.0
        self.reasons: list[str] = []

    @property
    def bound(self) -> float:
        """The largest norm that counts in the next step."""
        if not self.factor or len(self.norms) < LEAST:
            return math.inf
        return self.factor * statistics.median(self.norms)

    def shorten(self, steps: int) -> int:
        """The length of a rollout that would have so many steps."""
        return max(1, steps >> self.halvings)

    def record(self, step: int, norms: Sequence[float], left_out: Sequence[str], rollout_steps: int) -> list[str]:
        """Take note of an outer step.

        Args:
            step: How many there were.
            norms: Of the hypergradients that counted, of all processes.
            left_out: What was wrong with the others.
            rollout_steps: Of its rollouts; 1 if they cannot be shortened.

        Returns:
            What to tell the user.
        """
        self.norms = [*self.norms, *norms][-WINDOW:]
        self.counted += len(norms)
        self.left_out += len(left_out)
        short = [reason if len(reason) <= LONGEST else f"{reason[:LONGEST]} ..." for reason in left_out]
        said = [f"outer step {step}: hypergradient left out: student {reason}" for reason in short]
        said = said[: NAMED - len(self.reasons)]
        self.reasons += said
        self.lost = 0 if norms else self.lost + 1
        if self.lost < LOST_IN_A_ROW:
            return said
        self.lost, self.norms = 0, []
        if rollout_steps > 1:
            self.halvings += 1
            change = f"rollouts are halved to {rollout_steps // 2} steps"
        else:
            self.rate /= 2
            change = f"the outer learning rate is halved to {self.rate:g} of what it was"
        return [
            *said,
            f"warning: outer step {step}: no hypergradient counted in {LOST_IN_A_ROW} steps in a row: {change}",
        ]

    def report(self) -> list[str]:
        """What became of all hypergradients, if any was left out."""
        if not self.left_out:
            return []
        lines = [f"{self.left_out} of {self.left_out + self.counted} hypergradients were left out"]
        if self.halvings:
            lines[0] += f"; rollouts were halved {self.halvings} times"
        if self.rate < 1:
            lines[0] += f"; the outer learning rate ended at {self.rate:g} of what was asked for"
        if not self.counted:
            lines.append("warning: none counted: nothing was learned; lower train.learning_rate or meta.rollout_steps")
        return lines

    def summarize(self) -> dict[str, Any]:
        """For the learned loss's provenance."""
        return {
            "counted": self.counted,
            "left_out": self.left_out,
            "rollouts_halved": self.halvings,
            "outer_rate": self.rate,
            "reasons": self.reasons,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on."""
        return vars(self).copy()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        vars(self).update(check_fields(state, vars(self)))
        self.norms, self.reasons = [float(norm) for norm in self.norms], [str(reason) for reason in self.reasons]
        if min(self.lost, self.halvings, self.counted, self.left_out) < 0 or not 0 <= self.rate <= 1:
            raise ValueError("counts are negative, or the outer rate is not in [0, 1]")
