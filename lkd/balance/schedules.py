"""λ as a function of the training's progress alone."""

import math
from typing import Any

from lkd.balance.contract import Bounds, Moment, check_range


class ConstantBalance:
    """The same λ at every step.

    Args:
        weight: λ.

    Raises:
        ValueError: If it is negative or not finite.
    """

    def __init__(self, weight: float = 1.0) -> None:
        check_range("weight", weight, 0, 1e6)
        self.weight = weight

    def wants_gradients(self, step: int) -> bool:
        return False

    def set_weight(self, moment: Moment) -> float:
        return self.weight

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class LinearBalance(ConstantBalance):
    """λ from `start` to `end`, linear in progress.

    Args:
        start: λ at the first step.
        end: λ at the end of the training.

    Raises:
        ValueError: If one is negative or not finite.
    """

    def __init__(self, start: float = 1.0, end: float = 0.0) -> None:
        Bounds(min(start, end), max(start, end))
        self.start, self.end = start, end

    def set_weight(self, moment: Moment) -> float:
        return self.start + (self.end - self.start) * self.part(moment.progress)

    def part(self, progress: float) -> float:
        """How much of the way is gone, in [0, 1]."""
        return progress


class CosineBalance(LinearBalance):
    """λ from `start` to `end` along half a cosine: slow at both ends."""

    def part(self, progress: float) -> float:
        return (1 - math.cos(math.pi * progress)) / 2
