"""The target form of a learned loss over logits: cross-entropy to a learned target (our reconstruction)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from lkd.losses.learned.class_network import mix_target, negative_entropies
from lkd.losses.learned.inputs import (
    CONDITIONING,
    LogProbabilities,
    Progress,
    check_conditioning,
    name_sample_inputs,
    read_logits,
    sample_inputs,
)
from lkd.losses.learned.perceptron import Perceptron, bound_balance, unbound_balance
from lkd.outputs import Outputs


class TargetLoss(nn.Module):
    """Cross-entropy to a learned mixture of label and tempered teacher, convex in the student's logits.

    The target is q = (1 − α) · label + α · softmax(teacher / τ), with α and τ set by a network that sees the teacher
    and the progress, and the loss is KL(q ‖ student): cross-entropy less the entropy of q, which the student cannot
    change. With a target that followed the student it would not be convex. The state comes in so: the network gives
    `targets` mixtures q_k and their shares π_k, and the loss is their soft maximum
    T · log Σ_k π_k exp(KL(q_k ‖ student) / T), with T learned. A soft maximum of convex functions is convex; its
    gradient is p − Σ_k w_k q_k, with the more weight w_k on a target the farther the student still is from it. Without
    `state` there is one target.

    The gradient at the logits is a difference of two distributions, as cross-entropy's is: this form cannot act as a
    learning rate in disguise, whatever its weights. The loss is never negative.

    Args:
        hidden: Width of the network's hidden layers.
        initial_weight: α before any meta-training, in (0, 1); several targets start around it.
        initial_temperature: τ before any meta-training, between 1 and `maximal_temperature`.
        maximal_temperature: Upper bound of τ.
        targets: Number of targets if conditioned on the state, at least 2.
        conditioning: Some of progress, state.
        lipschitz: Bound of the network's Lipschitz constant; 0 sets none.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        hidden: int = 16,
        initial_weight: float = 0.5,
        initial_temperature: float = 2.0,
        maximal_temperature: float = 10.0,
        targets: int = 2,
        conditioning: Sequence[str] = CONDITIONING,
        lipschitz: float = 0.0,
    ) -> None:
        super().__init__()
        if targets < 2:
            raise ValueError(f"targets: {targets} is not at least 2; leave state out of conditioning for one target")
        self.conditioning = check_conditioning(conditioning)
        self.maximal_temperature = maximal_temperature
        self.architecture = {
            "hidden": hidden,
            "initial_weight": initial_weight,
            "initial_temperature": initial_temperature,
            "maximal_temperature": maximal_temperature,
            "targets": targets,
            "conditioning": self.conditioning,
            "lipschitz": lipschitz,
        }
        self.seen = [kind for kind in self.conditioning if kind != "state"]
        self.targets = targets if "state" in self.conditioning else 1
        free = unbound_balance(initial_weight, initial_temperature, maximal_temperature).repeat(self.targets, 1)
        free[:, 0] += torch.linspace(-0.5, 0.5, self.targets) if self.targets > 1 else 0
        self.body = Perceptron(len(name_sample_inputs(self.seen)), hidden, 3 * self.targets, lipschitz)
        self.body.head.bias.data.view(self.targets, 3)[:, :2] = free
        if self.targets > 1:
            self.sharpness = nn.Parameter(torch.zeros(()))

    def compare_targets(self, logs: LogProbabilities, progress: Progress) -> tuple[Tensor, Tensor, Tensor]:
        """The α and τ of every target, and log π_k + KL(q_k ‖ student) / T; all [targets, B]."""
        free = self.body(sample_inputs(logs, progress, self.seen)).view(-1, self.targets, 3).transpose(0, 1)
        weight, temperature = bound_balance(free[..., :2], self.maximal_temperature)
        divergences = []
        for each_weight, each_temperature in zip(weight, temperature, strict=True):
            target = mix_target(logs, each_weight, each_temperature)
            divergences.append((negative_entropies(target) - target * logs.student).sum(1))
        return weight, temperature, log_softmax(free[..., 2], 0) + torch.stack(divergences) / self.hardness()

    def hardness(self) -> Tensor | float:
        """T of the soft maximum, between e⁻² and e²; 1 where there is one target."""
        return (2 * self.sharpness.tanh()).exp() if self.targets > 1 else 1.0

    def weights_and_temperatures(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, progress: Progress = None
    ) -> tuple[Tensor, Tensor]:
        """α and τ of each sample, averaged over its targets as the gradient weighs them, both [B].

        Args:
            student_logits: [B, C].
            teacher_logits: [B, C].
            target: Class indices [B] or distributions [B, C].
            progress: How far the training is, in [0, 1]; none is taken as 0.
        """
        weight, temperature, scores = self.compare_targets(
            read_logits(student_logits, teacher_logits, target), progress
        )
        share = scores.softmax(0)
        return (share * weight).sum(0), (share * temperature).sum(0)

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
            scores = self.compare_targets(logs, progress)[2]
            return {"divergence": (self.hardness() * scores.logsumexp(0)).mean()}
