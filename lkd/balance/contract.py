"""What a balance sees, gives and keeps."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Moment(NamedTuple):
    """What a balance sees before the gradient of a step is taken.

    Attributes:
        step: Steps taken before this one.
        progress: How far the training is, in [0, 1].
        task: The loss's `task` term, on this step's batch.
        distillation: The sum of its other terms.
        gradients: Of `task` and of `distillation` with respect to the student, each [P]; None unless asked for.
    """

    step: int
    progress: float
    task: float
    distillation: float
    gradients: tuple[Tensor, Tensor] | None = None


class Balance(Protocol):
    """A rule that sets λ."""

    def wants_gradients(self, step: int) -> bool:
        """Whether the step's moment must hold gradients."""

    def set_weight(self, moment: Moment) -> float:
        """The λ of this step, finite and not negative."""

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on to the bit."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""


@dataclass(frozen=True)
class Bounds:
    """The least and the greatest λ.

    Raises:
        ValueError: If they are negative, not finite or out of order.
    """

    minimum: float
    maximum: float

    def __post_init__(self) -> None:
        if not 0 <= self.minimum <= self.maximum < math.inf:
            raise ValueError(f"minimum {self.minimum}, maximum {self.maximum}: not 0 <= minimum <= maximum < infinity")

    def clamp(self, weight: float) -> float:
        """The nearest weight within the bounds."""
        return min(max(weight, self.minimum), self.maximum)


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Check an option.

    Raises:
        ValueError: If it is not in [low, high].
    """
    if not low <= value <= high:
        raise ValueError(f"{name}: {value} is not in [{low:g}, {high:g}]")
