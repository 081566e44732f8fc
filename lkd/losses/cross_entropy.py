"""Cross-entropy with the target: the student without a teacher."""

from torch import Tensor, nn

from lkd.losses.functions import cross_entropies
from lkd.outputs import Outputs


class CrossEntropyLoss(nn.Module):
    """Mean cross-entropy; the teacher is ignored."""

    def forward(
        self, student: Outputs, teacher: Outputs | None, target: Tensor, progress: float | None = None
    ) -> dict[str, Tensor]:
        """Compute the term `task`.

        Args:
            student: The student's outputs.
            teacher: Ignored.
            target: Class indices [B] or distributions [B, C].
            progress: Ignored.
        """
        return {"task": cross_entropies(student.logits, target).mean()}
