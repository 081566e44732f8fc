"""What `lkd.distill` and `lkd.meta_train` give."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lkd.losses import LearnedLoss, ReplayedLoss


@dataclass(frozen=True)
class Distilled:
    """What `distill` gives.

    Attributes:
        student: The trained network, in eval mode, on the device it was trained on: of the given class, or, for a name,
            one that returns `Outputs`.
        path: Its file, in the run directory.
        history: For each epoch its step and its figures on meta-validation: top1 and top5 in percent, cross_entropy,
            calibrated_cross_entropy, ...
    """

    student: nn.Module
    path: Path
    history: list[dict[str, float]]

    @property
    def run_dir(self) -> Path:
        """The run directory: config, versions, log, checkpoints."""
        return self.path.parent

    @property
    def last(self) -> dict[str, float]:
        """Figures of the last epoch."""
        return self.history[-1]

    @property
    def best(self) -> dict[str, float]:
        """Figures of the epoch with the highest top1."""
        return max(self.history, key=lambda row: row["top1"])


@dataclass(frozen=True)
class MetaTrained:
    """What `meta_train` gives.

    Attributes:
        loss: The learned loss, frozen.
        path: Its file, in the run directory; `lkd.load_loss` reads it.
        history: A row for each outer step.
    """

    loss: LearnedLoss | ReplayedLoss
    path: Path
    history: list[dict[str, Any]]

    @property
    def run_dir(self) -> Path:
        """The run directory: config, versions, log, checkpoints, pool."""
        return self.path.parent
