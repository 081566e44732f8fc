"""λ from the gradients of both losses, in closed form (DTO-KD, ICLR 2026)."""

from typing import Any

import torch

from lkd.balance.contract import Bounds, Moment, check_range


class DTOKDBalance:
    """The weights at which the step is equally aligned with the gradients of log task and of log distillation.

    Established: π_dist = (g22 − g12) / (g11 + g22 − 2 g12) and π_task = 1 − π_dist, on the logarithms of the losses,
    with g11 = |∇ log D|², g22 = |∇ log T|² and g12 their product. *Ours*: only the ratio is taken, λ = (π_dist / D) /
    (π_task / T), the step's scale stays that of the loss; the products are taken every so many steps and averaged; and
    a π that is negative, which asks for ascent of one loss, puts λ at a bound. A factor of the teacher's part changes
    nothing: λ makes up for it.

    Args:
        initial: λ before the first gradients, where these decide nothing.
        every: Steps between two looks at the gradients, which cost two more backward passes.
        smoothing: Decay of the moving averages, a look at a time, in [0, 1).
        minimum: Least λ.
        maximum: Greatest λ.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        initial: float = 1.0,
        every: int = 10,
        smoothing: float = 0.9,
        minimum: float = 0.0,
        maximum: float = 10.0,
    ) -> None:
        self.bounds = Bounds(minimum, maximum)
        check_range("initial", initial, minimum, maximum)
        check_range("every", every, 1, 1e9)
        check_range("smoothing", smoothing, 0, 1 - 1e-9)
        self.weight, self.every, self.smoothing = initial, every, smoothing
        self.averages: list[float] = []  # of T, D, ∇T·∇T, ∇T·∇D, ∇D·∇D

    def wants_gradients(self, step: int) -> bool:
        return step % self.every == 0

    def set_weight(self, moment: Moment) -> float:
        if moment.gradients is None:
            return self.weight
        task, distillation = moment.gradients
        products = torch.stack([task @ task, task @ distillation, distillation @ distillation]).tolist()
        now = [moment.task, moment.distillation, *products]
        before = self.averages or now
        self.averages = [
            self.smoothing * old + (1 - self.smoothing) * new for old, new in zip(before, now, strict=True)
        ]
        self.weight = self.bounds.clamp(balance_logarithms(self.averages, self.weight))
        return self.weight

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "averages": self.averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight, self.averages = state["weight"], list(state["averages"])


def balance_logarithms(averages: list[float], otherwise: float) -> float:
    """DTO-KD's λ; infinite where the task's weight is not positive.

    Args:
        averages: T, D, ∇T · ∇T, ∇T · ∇D, ∇D · ∇D.
        otherwise: The answer where a loss is not positive or the gradients of the logarithms are equal.
    """
    task, distillation, task_task, task_teacher, teacher_teacher = averages
    if not (task > 0 and distillation > 0):
        return otherwise
    g11, g22, g12 = teacher_teacher / distillation**2, task_task / task**2, task_teacher / (task * distillation)
    for_teacher, for_task = g22 - g12, g11 - g12
    if not for_teacher + for_task > 0:
        return otherwise
    if for_teacher <= 0:
        return 0.0
    return for_teacher * task / (for_task * distillation) if for_task > 0 else float("inf")
