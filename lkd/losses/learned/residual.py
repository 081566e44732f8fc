"""The residual form of a learned loss over logits: KD and a bounded residual (our reconstruction)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from lkd.losses.learned.class_network import ClassNetwork, class_divergences
from lkd.losses.learned.inputs import CONDITIONING, Progress, check_conditioning, read_logits
from lkd.losses.learned.perceptron import bound_balance, unbound_balance
from lkd.outputs import Outputs


class ResidualLoss(nn.Module):
    """Classic KD plus a residual that is never larger than a fraction of it, class by class.

    KD is (1 − α) · KL(label ‖ student) + α · τ² · KL(teacher_τ ‖ student_τ), both divergences sums over classes of
    q log(q / p) − q + p ≥ 0, with one learned α and one learned τ. A network over the class and its sample gives ρ of
    each divergence in (−`bound`, `bound`), and each class's divergence counts 1 + ρ times. So the loss lies between
    1 − bound and 1 + bound times KD's, is never negative, and starts as KD (less the entropy of a dense target).

    Args:
        hidden: Width of the network's hidden layers.
        initial_weight: α before any meta-training, in (0, 1).
        initial_temperature: τ before any meta-training, between 1 and `maximal_temperature`.
        maximal_temperature: Upper bound of τ.
        bound: Of the residual, relative to KD, in (0, 1).
        conditioning: What is seen of a sample besides the teacher: some of progress, state. The class's own student
            logit is always seen.
        lipschitz: Bound of the network's Lipschitz constant; 0 sets none.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        hidden: int = 16,
        initial_weight: float = 0.5,
        initial_temperature: float = 4.0,
        maximal_temperature: float = 10.0,
        bound: float = 0.5,
        conditioning: Sequence[str] = CONDITIONING,
        lipschitz: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 < bound < 1:
            raise ValueError(f"bound: {bound} is not in (0, 1)")
        self.conditioning = check_conditioning(conditioning)
        self.maximal_temperature = maximal_temperature
        self.bound = bound
        self.architecture = {
            "hidden": hidden,
            "initial_weight": initial_weight,
            "initial_temperature": initial_temperature,
            "maximal_temperature": maximal_temperature,
            "bound": bound,
            "conditioning": self.conditioning,
            "lipschitz": lipschitz,
        }
        self.base = nn.Parameter(unbound_balance(initial_weight, initial_temperature, maximal_temperature))
        self.classes = ClassNetwork(hidden, 2, self.conditioning, lipschitz)

    def weights_and_temperatures(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, progress: Progress = None
    ) -> tuple[Tensor, Tensor]:
        """KD's α and τ, the same for each sample, both [B]; the residual is not in them.

        Args:
            student_logits: [B, C].
            teacher_logits: Not read.
            target: Not read.
            progress: Not read.
        """
        weight, temperature = bound_balance(self.base, self.maximal_temperature)
        return weight.expand(student_logits.shape[0]), temperature.expand(student_logits.shape[0])

    def forward(
        self, student: Outputs, teacher: Outputs, target: Tensor, progress: Progress = None
    ) -> dict[str, Tensor]:
        """Compute the terms `task` and `distillation`.

        Args:
            student: The student's outputs.
            teacher: The teacher's outputs for the same images.
            target: Class indices [B] or distributions [B, C].
            progress: How far the training is, in [0, 1].
        """
        with torch.autocast(student.logits.device.type, enabled=False):
            logs = read_logits(student.logits, teacher.logits, target)
            weight, temperature = bound_balance(self.base, self.maximal_temperature)
            task, distillation = (1 + self.bound * self.classes.values(logs, progress)).unbind(2)
            task = task * class_divergences(logs.target, logs.student)
            distillation = distillation * class_divergences(
                (logs.teacher / temperature).softmax(1), log_softmax(logs.student / temperature, 1)
            )
            return {
                "task": (1 - weight) * task.sum(1).mean(),
                "distillation": weight * temperature.square() * distillation.sum(1).mean(),
            }
