"""The generic form of a learned loss over logits (our reconstruction)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lkd.losses.learned.class_network import ClassNetwork, class_divergences, log_of_factor, mix_target
from lkd.losses.learned.inputs import (
    CONDITIONING,
    LogProbabilities,
    Progress,
    check_conditioning,
    name_sample_inputs,
    read_logits,
    sample_inputs,
)
from lkd.losses.learned.perceptron import BalanceNetwork
from lkd.outputs import Outputs


class GenericLoss(nn.Module):
    """A free loss over logits: one network, shared by all classes, weighs how far each class is from its target.

    The loss is the mean over samples of Σ_c g(x_c) · [q_c log(q_c / p_c) − q_c + p_c], with p the student's
    probabilities and q = (1 − α) · label + α · softmax(teacher / τ) the target. A network over the student's and the
    teacher's logit of the class in several normalised forms, its label, and what is seen of the sample gives g, between
    1 / `maximal_factor` and `maximal_factor`; another gives α and τ of each sample. Both move with the student.

    The bracket and its gradient vanish where p = q, and only there; so do those of g times the bracket, for any g.
    The loss is therefore never negative and has zero gradient where the student equals its target, and any function of
    this kind that is separable over classes is such a product, up to the bound on g. The minimum is at q; elsewhere
    the loss need not be convex, and g can make other points stationary. It starts as KL(q ‖ p).

    The paper learns "generic loss networks for logits"; their inputs and layers are not public, this form is ours.

    Args:
        hidden: Width of the hidden layers of both networks.
        initial_weight: α before any meta-training, in (0, 1).
        initial_temperature: τ before any meta-training, between 1 and `maximal_temperature`.
        maximal_temperature: Upper bound of τ.
        maximal_factor: Upper bound of g, greater than 1.
        conditioning: What is seen of a sample besides the teacher: some of progress, state. The class's own student
            logit is always seen.
        lipschitz: Bound of each network's Lipschitz constant; 0 sets none.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        hidden: int = 16,
        initial_weight: float = 0.5,
        initial_temperature: float = 2.0,
        maximal_temperature: float = 10.0,
        maximal_factor: float = 8.0,
        conditioning: Sequence[str] = CONDITIONING,
        lipschitz: float = 0.0,
    ) -> None:
        super().__init__()
        self.conditioning = check_conditioning(conditioning)
        self.log_factor = log_of_factor(maximal_factor)
        self.architecture = {
            "hidden": hidden,
            "initial_weight": initial_weight,
            "initial_temperature": initial_temperature,
            "maximal_temperature": maximal_temperature,
            "maximal_factor": maximal_factor,
            "conditioning": self.conditioning,
            "lipschitz": lipschitz,
        }
        inputs = len(name_sample_inputs(self.conditioning))
        self.balance = BalanceNetwork(
            inputs, hidden, initial_weight, initial_temperature, maximal_temperature, lipschitz
        )
        self.classes = ClassNetwork(hidden, 1, self.conditioning, lipschitz)

    def weights_and_temperatures(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, progress: Progress = None
    ) -> tuple[Tensor, Tensor]:
        """The α and τ of each sample's target, both [B].

        Args:
            student_logits: [B, C].
            teacher_logits: [B, C].
            target: Class indices [B] or distributions [B, C].
            progress: How far the training is, in [0, 1]; none is taken as 0.
        """
        logs = read_logits(student_logits, teacher_logits, target)
        return self.balance.balance(sample_inputs(logs, progress, self.conditioning))

    def mix_target(self, logs: LogProbabilities, progress: Progress = None) -> Tensor:
        """The target q, [B, C]."""
        return mix_target(logs, *self.balance.balance(sample_inputs(logs, progress, self.conditioning)))

    def forward(
        self, student: Outputs, teacher: Outputs, target: Tensor, progress: Progress = None
    ) -> dict[str, Tensor]:
        """Compute the term `divergence`.

        Args:
            student: The student's outputs.
            teacher: The teacher's outputs for the same images.
            target: Class indices [B] or distributions [B, C].
            progress: How far the training is, in [0, 1].
        """
        with torch.autocast(student.logits.device.type, enabled=False):
            logs = read_logits(student.logits, teacher.logits, target)
            factor = (self.log_factor * self.classes.values(logs, progress).squeeze(2)).exp()
            divergence = class_divergences(self.mix_target(logs, progress), logs.student)
            return {"divergence": (factor * divergence).sum(1).mean()}
