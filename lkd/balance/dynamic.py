"""λ that rises as the loss falls (Kim, Kim, Kim, Jo, 2025, arXiv 2505.06270).

Established of the paper: the loss is a task's plus λ times the distillation's, and λ should rise as the loss falls. Its
expansion and formula are not public to us: the rule here is *our reconstruction*, from an identity. With
L_t = T_t + λ_t D_t,

    L_{t+1} = (T_{t+1} + λ_t D_{t+1}) + (λ_{t+1} − λ_t) D_{t+1},

so that a step which made the loss fall by `drop` at the old λ admits an increase of λ by less than drop / D_{t+1}.
"""

from typing import Any

from lkd.balance.contract import Bounds, Moment, check_range


class DynamicBalance:
    """λ_{t+1} = λ_t + growth · drop / D_{t+1}, within bounds.

    `drop` is by how much the loss fell at the old λ, negative where it rose: then λ falls, or noise alone would make it
    rise. With whole-batch losses (`smoothing` 0), growth < 1 and exact descent the total never rises; beyond 1 it does.
    On mini-batches the losses are moving averages, and nothing is guaranteed.

    Args:
        initial: λ at the start.
        growth: The part of the admissible increase that is taken, positive.
        minimum: Least λ.
        maximum: Greatest λ.
        warmup: Progress until which λ stays as it is, in [0, 1].
        smoothing: Decay of the moving averages of both losses, in [0, 1).
        direction: 1, or −1 for the opposite of the paper's direction, a control.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        initial: float = 1.0,
        growth: float = 0.5,
        minimum: float = 0.0,
        maximum: float = 10.0,
        warmup: float = 0.0,
        smoothing: float = 0.9,
        direction: int = 1,
    ) -> None:
        self.bounds = Bounds(minimum, maximum)
        check_range("initial", initial, minimum, maximum)
        check_range("growth", growth, 1e-9, 1e6)
        check_range("warmup", warmup, 0, 1)
        check_range("smoothing", smoothing, 0, 1 - 1e-9)
        self.weight, self.growth, self.warmup, self.smoothing = initial, growth, warmup, smoothing
        self.direction = direction
        self.averages: list[float] = []

    def wants_gradients(self, step: int) -> bool:
        return False

    def set_weight(self, moment: Moment) -> float:
        now = [moment.task, moment.distillation]
        before = self.averages or now
        task, distillation = self.averages = [
            self.smoothing * old + (1 - self.smoothing) * new for old, new in zip(before, now, strict=True)
        ]
        if moment.progress >= self.warmup and distillation > 0:
            drop = before[0] - task + self.weight * (before[1] - distillation)
            self.weight = self.bounds.clamp(self.weight + self.direction * self.growth * drop / distillation)
        return self.weight

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "averages": self.averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight, self.averages = state["weight"], list(state["averages"])
