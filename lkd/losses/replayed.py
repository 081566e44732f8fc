"""A learned loss that changed while a student was trained with it, replayed by progress."""

import itertools
from bisect import bisect_right
from collections.abc import Sequence

from torch import Tensor, nn

from lkd.losses.learned import LearnedLoss
from lkd.outputs import Outputs


class ReplayedLoss(nn.Module):
    """The course of a learned loss: at each progress, the loss that was in charge there.

    *Our reconstruction* of the reuse of LKD's dynamic strategy. Steps, not interpolates: a student meets exactly the
    losses that the recorded students met.

    Args:
        losses: The losses, in order.
        starts: Progress from which each is in charge; the first is 0, and they increase.

    Raises:
        ValueError: If there is not one start for each loss, or they do not increase from 0.
    """

    def __init__(self, losses: Sequence[LearnedLoss], starts: Sequence[float]) -> None:
        super().__init__()
        increasing = all(a < b for a, b in itertools.pairwise(starts))
        if len(losses) != len(starts) or not starts or starts[0] != 0 or not increasing:
            raise ValueError(f"starts: {list(starts)} do not increase from 0, one for each of {len(losses)} losses")
        self.losses = nn.ModuleList(losses)
        self.starts = [float(start) for start in starts]

    @property
    def teacher_stages(self) -> tuple[str, ...]:
        """The teacher's stages whose features the losses read."""
        return getattr(self.losses[0], "teacher_stages", ())

    def at(self, progress: float | Tensor | None) -> nn.Module:
        """The loss in charge at this progress.

        Raises:
            ValueError: If progress is None.
        """
        if progress is None:
            raise ValueError("progress: None; a replayed loss must be told how far the training is, in [0, 1]")
        return self.losses[max(bisect_right(self.starts, float(progress)) - 1, 0)]

    def forward(
        self, student: Outputs, teacher: Outputs, target: Tensor, progress: float | Tensor | None = None
    ) -> dict[str, Tensor]:
        """Compute the terms of the loss in charge.

        Args:
            student: The student's outputs.
            teacher: The teacher's outputs for the same images.
            target: Class indices [B] or distributions [B, C].
            progress: How far the training is, in [0, 1].

        Raises:
            ValueError: If progress is None.
        """
        return self.at(progress)(student, teacher, target, progress)
