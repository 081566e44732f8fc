"""Classic knowledge distillation (Hinton, Vinyals, Dean, 2015, arXiv 1503.02531)."""

from torch import Tensor, nn

from lkd.losses.functions import cross_entropies, kl_divergences
from lkd.outputs import Outputs


class KDLoss(nn.Module):
    """(1 − w) · CE(student, target) + w · τ² · KL(teacher_τ ‖ student_τ).

    Args:
        weight: w in [0, 1], the balance between task and teacher.
        temperature: τ > 0.

    Raises:
        ValueError: If `weight` or `temperature` is out of range.
    """

    def __init__(self, weight: float = 0.5, temperature: float = 4.0) -> None:
        super().__init__()
        if not 0 <= weight <= 1:
            raise ValueError(f"weight: {weight} is not in [0, 1]")
        if not temperature > 0:
            raise ValueError(f"temperature: {temperature} is not positive")
        self.weight = weight
        self.temperature = temperature

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
        divergence = kl_divergences(student.logits, teacher.logits, self.temperature).mean()
        return {
            "task": (1 - self.weight) * cross_entropies(student.logits, target).mean(),
            "distillation": self.weight * self.temperature**2 * divergence,
        }
