"""The recipe of looking at a loss."""

from dataclasses import dataclass
from typing import Any


@dataclass
class InspectRecipe:
    """Say what a loss does, without training anything (OUT/inspection.json, OUT/inspection.png).

    Args:
        loss: The path of a learned-loss file; or, to compare, a loss name or {name: ..., ...} (see docs/losses.md).
        out: Where the files go; NAME-inspection beside the loss's file, or in this folder for a named loss, if left
            out.
        kd_weight: Weight of the teacher in the KD that the loss is drawn beside, in [0, 1].
        kd_temperature: Temperature of that KD.
        num_classes: Number of classes of the made-up answers that the loss is looked at with.
        seed: Of these answers.
    """

    loss: dict[str, Any] | str
    out: str | None = None
    kd_weight: float = 0.5
    kd_temperature: float = 4.0
    num_classes: int = 10
    seed: int = 0
