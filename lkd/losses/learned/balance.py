"""The balance form of a learned loss over logits: α and τ of each sample (our reconstruction)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lkd.losses.functions import cross_entropies, kl_divergences
from lkd.losses.learned.inputs import (
    CONDITIONING,
    Progress,
    check_conditioning,
    name_sample_inputs,
    read_logits,
    sample_inputs,
)
from lkd.losses.learned.perceptron import BalanceNetwork
from lkd.outputs import Outputs


class BalanceLoss(nn.Module):
    """Distillation over logits whose balance and temperature a small network sets for each sample.

    For sample i, a network sees up to six numbers and sets α and τ; the loss is the mean of
    (1 − αᵢ) · CE(student, target) + αᵢ · τᵢ² · KL(teacher_τ ‖ student_τ).
    The six numbers are the student's and the teacher's probability of the target, both entropies over log C, the
    squashed KL divergence at τ = 1, and the training's progress. None depends on the order or the number of the
    classes. α and τ move with the student's logits, and the gradient says so: the loss is a function, its Hessian is
    symmetric, and every hypergradient estimator is exact on it or as near as it states.

    The paper learns "generic loss networks for logits" with the balancing weight folded in; this form of it is ours.
    α in (0, 1) and a bounded τ keep its value between those of cross-entropy and of KD. By itself nothing normalises
    its gradient (see `LearnedLoss`), so compare losses at learning rates of their own.

    Args:
        hidden: Width of the two hidden layers.
        initial_weight: α before any meta-training, in (0, 1).
        initial_temperature: τ before any meta-training, between 1 and `maximal_temperature`.
        maximal_temperature: Upper bound of τ.
        conditioning: What the network sees besides the teacher: some of progress, state.
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
        conditioning: Sequence[str] = CONDITIONING,
        lipschitz: float = 0.0,
    ) -> None:
        super().__init__()
        self.conditioning = check_conditioning(conditioning)
        self.architecture = {
            "hidden": hidden,
            "initial_weight": initial_weight,
            "initial_temperature": initial_temperature,
            "maximal_temperature": maximal_temperature,
            "conditioning": self.conditioning,
            "lipschitz": lipschitz,
        }
        inputs = len(name_sample_inputs(self.conditioning))
        self.body = BalanceNetwork(inputs, hidden, initial_weight, initial_temperature, maximal_temperature, lipschitz)

    def weights_and_temperatures(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, progress: Progress = None
    ) -> tuple[Tensor, Tensor]:
        """The α in (0, 1) and τ in (1, `maximal_temperature`) of each sample, both [B].

        Args:
            student_logits: [B, C].
            teacher_logits: [B, C].
            target: Class indices [B] or distributions [B, C].
            progress: How far the training is, in [0, 1]; none is taken as 0.
        """
        logs = read_logits(student_logits, teacher_logits, target)
        return self.body.balance(sample_inputs(logs, progress, self.conditioning))

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
            weight, temperature = self.weights_and_temperatures(student.logits, teacher.logits, target, progress)
            divergence = kl_divergences(student.logits, teacher.logits, temperature.unsqueeze(1))
            return {
                "task": ((1 - weight) * cross_entropies(student.logits, target)).mean(),
                "distillation": (weight * temperature.square() * divergence).mean(),
            }
