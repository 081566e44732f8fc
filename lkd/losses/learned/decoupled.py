"""The decoupled form of a learned loss over logits: α, τ and β of each sample (our reconstruction)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lkd.losses.dkd import decouple
from lkd.losses.functions import cross_entropies, label_of
from lkd.losses.learned.class_network import log_of_factor
from lkd.losses.learned.inputs import (
    CONDITIONING,
    LogProbabilities,
    Progress,
    as_progress,
    check_conditioning,
    name_sample_inputs,
    read_logits,
    sample_inputs,
)
from lkd.losses.learned.perceptron import Perceptron, bound_balance, unbound_balance
from lkd.outputs import Outputs


class DecoupledLoss(nn.Module):
    """Decoupled distillation (DKD, arXiv 2203.08679) whose three weights a small network sets for each sample.

    For sample i, a network sees what `BalanceLoss` does and sets α, τ and β; the loss is the mean of
    2 (1 − αᵢ) · CE(student, target) + 2 αᵢ · τᵢ² · (TCKD + βᵢ · NCKD), both divergences at temperature τᵢ: of the
    target class against the rest, and among the other classes. With α = 1/2 it is DKD as its authors weigh it, at home
    at DKD's learning rates. With β = 1 − the teacher's probability of the target at τ it is twice `BalanceLoss`; with
    β = 1 or more, what the teacher knows of the other classes counts on samples that it is sure of too. Of dense
    targets the most probable class is the target class.

    As DKD's, the teacher's terms are ramped up linearly from 0 at the start of training, here over most of it: fresh
    students trained on clean labels are better for it, and rollouts, which are shorter than trainings, do not find it.

    α, τ and β move with the student's logits, and the gradient says so.

    Args:
        hidden: Width of the two hidden layers.
        initial_weight: α before any meta-training, in (0, 1).
        initial_temperature: τ before any meta-training, between 1 and `maximal_temperature`.
        maximal_temperature: Upper bound of τ.
        maximal_factor: β starts at 1 and stays between 1 / `maximal_factor` and `maximal_factor`; greater than 1.
        warmup: Part of the training over which the teacher's terms are ramped up, in [0, 1]. Where `progress` is not
            given they have their full weight.
        conditioning: What the network sees besides the teacher: some of progress, state.
        lipschitz: Bound of the network's Lipschitz constant; 0 sets none.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        hidden: int = 16,
        initial_weight: float = 0.5,
        initial_temperature: float = 2.0,
        maximal_temperature: float = 4.0,
        maximal_factor: float = 8.0,
        warmup: float = 0.6,
        conditioning: Sequence[str] = CONDITIONING,
        lipschitz: float = 0.0,
    ) -> None:
        super().__init__()
        self.conditioning = check_conditioning(conditioning)
        if not 0 <= warmup <= 1:
            raise ValueError(f"warmup: {warmup} is not in [0, 1]")
        self.maximal_temperature = maximal_temperature
        self.warmup = warmup
        self.log_factor = log_of_factor(maximal_factor)
        self.architecture = {
            "hidden": hidden,
            "initial_weight": initial_weight,
            "initial_temperature": initial_temperature,
            "maximal_temperature": maximal_temperature,
            "maximal_factor": maximal_factor,
            "warmup": warmup,
            "conditioning": self.conditioning,
            "lipschitz": lipschitz,
        }
        bias = unbound_balance(initial_weight, initial_temperature, maximal_temperature)
        self.body = Perceptron(len(name_sample_inputs(self.conditioning)), hidden, 3, lipschitz)
        self.body.head.bias.data[:2] = bias

    def set_weights(self, logs: LogProbabilities, progress: Progress) -> tuple[Tensor, Tensor, Tensor]:
        """The α in (0, 1), τ in (1, `maximal_temperature`) and β of each sample, all [B]."""
        free = self.body(sample_inputs(logs, progress, self.conditioning))
        weight, temperature = bound_balance(free[:, :2], self.maximal_temperature)
        return weight, temperature, (self.log_factor * free[:, 2].tanh()).exp()

    def ramp(self, progress: Progress, like: Tensor) -> Tensor:
        """The part of the teacher's terms that counts at this progress, a scalar in [0, 1]."""
        if progress is None or not self.warmup:
            return torch.ones_like(like[0])
        return as_progress(progress, like).div(self.warmup).clamp(max=1)

    def weights_and_temperatures(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, progress: Progress = None
    ) -> tuple[Tensor, Tensor]:
        """The α and τ of each sample, both [B].

        Args:
            student_logits: [B, C].
            teacher_logits: [B, C].
            target: Class indices [B] or distributions [B, C].
            progress: How far the training is, in [0, 1]; none is taken as 0.
        """
        return self.set_weights(read_logits(student_logits, teacher_logits, target), progress)[:2]

    def forward(
        self, student: Outputs, teacher: Outputs, target: Tensor, progress: Progress = None
    ) -> dict[str, Tensor]:
        """Compute the terms `task`, `target_class` (TCKD) and `other_classes` (NCKD).

        Args:
            student: The student's outputs.
            teacher: The teacher's outputs for the same images.
            target: Class indices [B] or distributions [B, C].
            progress: How far the training is, in [0, 1].
        """
        with torch.autocast(student.logits.device.type, enabled=False):
            logs = read_logits(student.logits, teacher.logits, target)
            weight, temperature, factor = self.set_weights(logs, progress)
            label = label_of(target)
            (binary_s, other_s), (binary_t, other_t) = (
                decouple(logits / temperature.unsqueeze(1), label) for logits in (logs.student, logs.teacher)
            )
            scale = 2 * self.ramp(progress, weight) * weight * temperature.square()
            return {
                "task": (2 * (1 - weight) * cross_entropies(student.logits, target)).mean(),
                "target_class": (scale * (binary_t.exp() * (binary_t - binary_s)).sum(1)).mean(),
                "other_classes": (scale * factor * (other_t.exp() * (other_t - other_s)).sum(1)).mean(),
            }
