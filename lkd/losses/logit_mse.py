"""Logit matching (Ba, Caruana, "Do Deep Nets Really Need to be Deep?", NeurIPS 2014, arXiv 1312.6184)."""

from torch import Tensor, nn

from lkd.losses.functions import check_options, cross_entropies, widen
from lkd.outputs import Outputs


class LogitMSELoss(nn.Module):
    """task · CE(student, target) + distillation · mean over batch and classes of (student − teacher)².

    The paper regresses on the logits alone (`task: 0`), with ½ and a sum over the classes; the mean is that of
    `torch.nn.MSELoss`, so that one weight suits any number of classes.

    Args:
        task: Weight of cross-entropy.
        distillation: Weight of the squared error.

    Raises:
        ValueError: If a weight is negative.
    """

    def __init__(self, task: float = 1.0, distillation: float = 1.0) -> None:
        super().__init__()
        check_options(task=task, distillation=distillation)
        self.task = task
        self.distillation = distillation

    def forward(
        self, student: Outputs, teacher: Outputs, target: Tensor, progress: float | None = None
    ) -> dict[str, Tensor]:
        """Compute the terms `task` and `distillation`.

        Args:
            student: The student's outputs.
            teacher: The teacher's outputs for the same images.
            target: Class indices [B] or distributions [B, C].
            progress: Ignored.
        """
        error = (widen(student.logits) - widen(teacher.logits)).square().mean()
        return {
            "task": self.task * cross_entropies(student.logits, target).mean(),
            "distillation": self.distillation * error,
        }
