"""Logit standardisation (Sun, Ren, Li, Wang, Cao, CVPR 2024, arXiv 2403.01427)."""

from torch import Tensor, nn

from lkd.losses.functions import check_options, widen
from lkd.outputs import Outputs


class LogitStandardizationLoss(nn.Module):
    """A logit loss whose teacher terms see Z(z) = (z − mean) / (ε + standard deviation) in place of the logits z.

    Mean and deviation are over the classes of each sample, of student and teacher alike; the term `task` sees the
    logits as they are. The defaults are those of the authors' code for KD: 0.1 · CE + 9 · τ² · KL at τ = 2, which is
    ten times the teacher's term of `{name: kd, weight: 0.9, temperature: 2}`. The paper divides by the deviation with
    1 / C; here it is the one with 1 / (C − 1), and ε = 1e-7, as in that code.

    Args:
        loss: The loss: a module with a term `task`.
        distillation: Factor of all its other terms.

    Raises:
        ValueError: If the factor is negative.
    """

    def __init__(self, loss: nn.Module, distillation: float = 10.0) -> None:
        super().__init__()
        check_options(distillation=distillation)
        self.loss = loss
        self.distillation = distillation

    def forward(
        self, student: Outputs, teacher: Outputs, target: Tensor, progress: float | None = None
    ) -> dict[str, Tensor]:
        """Compute the terms of the loss.

        Args:
            student: The student's outputs.
            teacher: The teacher's outputs for the same images.
            target: Class indices [B] or distributions [B, C].
            progress: How far the training is, in [0, 1].
        """
        standard = (Outputs(standardize(outputs.logits), {}) for outputs in (student, teacher))
        terms = self.loss(*standard, target, progress)
        task = self.loss(student, teacher, target, progress)["task"]
        return {name: task if name == "task" else self.distillation * term for name, term in terms.items()}


def standardize(logits: Tensor, eps: float = 1e-7) -> Tensor:
    """Zero mean and unit deviation over the classes, [B, C] → [B, C]; equal logits give zeros, with zero gradient."""
    logits = widen(logits)
    variance = logits.var(1, keepdim=True).clamp_min(eps**2)
    return (logits - logits.mean(1, keepdim=True)) / (eps + variance.sqrt())
