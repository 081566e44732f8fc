"""The loss networks.

*Our reconstruction*: the text and code of LKD (Ran, Huang, Yang, PLOS ONE 2025) are not public.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, one_hot

from lkd.losses.functions import cross_entropies, kl_divergences, widen
from lkd.outputs import Outputs

Progress = float | Tensor | None


class LogitLoss(nn.Module):
    """Distillation over logits whose balance and temperature a small network sets for each sample.

    For sample i, a network sees six numbers and sets α and τ; the loss is the mean of
    (1 − αᵢ) · CE(student, target) + αᵢ · τᵢ² · KL(teacher_τ ‖ student_τ).
    The six numbers are the student's and the teacher's probability of the target, both entropies over log C, the
    squashed KL divergence at τ = 1, and the training's progress. None depends on the order or the number of the
    classes. α and τ move with the student's logits, and the gradient says so: the loss is a function, its Hessian is
    symmetric, and every hypergradient estimator is exact on it or as near as it states.

    The paper learns "generic loss networks for logits" with the balancing weight folded in; this form of it is ours.
    α in (0, 1) and a bounded τ keep its value between those of cross-entropy and of KD; nothing normalises its
    gradient, so compare losses at learning rates of their own.

    Args:
        hidden: Width of the two hidden layers.
        initial_weight: α before any meta-training, in (0, 1).
        initial_temperature: τ before any meta-training, between 1 and `maximal_temperature`.
        maximal_temperature: Upper bound of τ.

    Raises:
        ValueError: If an initial value is out of range.
    """

    INPUTS = (
        "student target probability",
        "teacher target probability",
        "student entropy",
        "teacher entropy",
        "KL",
        "progress",
    )

    def __init__(
        self,
        hidden: int = 16,
        initial_weight: float = 0.5,
        initial_temperature: float = 4.0,
        maximal_temperature: float = 10.0,
    ) -> None:
        super().__init__()
        if not 0 < initial_weight < 1:
            raise ValueError(f"initial_weight: {initial_weight} is not in (0, 1)")
        if not 1 < initial_temperature < maximal_temperature:
            raise ValueError(
                f"initial_temperature: {initial_temperature} is not between 1 and "
                f"maximal_temperature {maximal_temperature}"
            )
        self.architecture = {
            "hidden": hidden,
            "initial_weight": initial_weight,
            "initial_temperature": initial_temperature,
            "maximal_temperature": maximal_temperature,
        }
        self.maximal_temperature = maximal_temperature
        head = nn.Linear(hidden, 2)
        self.body = nn.Sequential(
            nn.Linear(len(self.INPUTS), hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), head
        )
        nn.init.zeros_(head.weight)
        share = (initial_temperature - 1) / (maximal_temperature - 1)
        head.bias.data.copy_(torch.logit(torch.tensor([initial_weight, share])))

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
        student = log_softmax(widen(student_logits), 1)
        teacher = log_softmax(widen(teacher_logits.detach()), 1)
        dense = (target if target.is_floating_point() else one_hot(target, student.shape[1])).to(student.dtype)
        divergence = (teacher.exp() * (teacher - student)).sum(1)
        elapsed = torch.as_tensor(0.0 if progress is None else progress, dtype=student.dtype, device=student.device)
        inputs = torch.stack(
            [
                (dense * student.exp()).sum(1),
                (dense * teacher.exp()).sum(1),
                -(student.exp() * student).sum(1) / math.log(student.shape[1]),
                -(teacher.exp() * teacher).sum(1) / math.log(student.shape[1]),
                divergence / (1 + divergence),
                elapsed.expand(len(student)),
            ],
            1,
        )
        weight, share = self.body(2 * inputs.to(next(self.parameters()).dtype) - 1).sigmoid().unbind(1)
        return weight, 1 + share * (self.maximal_temperature - 1)

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


class LearnedLoss(nn.Module):
    """A learned loss: the sum of named parts, each a loss network with all weights inside.

    Args:
        parts: Part name → loss network; each part's terms are named `part/term`.
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(dict(parts))

    def forward(
        self, student: Outputs, teacher: Outputs, target: Tensor, progress: Progress = None
    ) -> dict[str, Tensor]:
        """Compute every part's terms.

        Args:
            student: The student's outputs.
            teacher: The teacher's outputs for the same images.
            target: Class indices [B] or distributions [B, C].
            progress: How far the training is, in [0, 1].
        """
        return {
            f"{name}/{term}": value
            for name, part in self.parts.items()
            for term, value in part(student, teacher, target, progress).items()
        }
