"""λ that makes the gradient least noisy (Safaryan, Peste, Alistarh, NeurIPS 2023, arXiv 2305.17581).

Established: for softmax regression at temperature 1 the gradient of (1 − λ) CE + λ KL is that of the student's
cross-entropy minus λ times that of the teacher's on the same batch, so distillation is a control variate. The formulas
of the best λ and of the noise that is left are *our derivation*, which has the paper's shape; constants may differ.
"""

from typing import Any

import torch
from torch import Tensor

from lkd.balance.contract import Bounds, Moment, check_range


class GradientMoments:
    """Second moments of pairs of mini-batch gradients, streaming: two vectors and three numbers.

    The pairs are g, the task's gradient, and h, what distillation takes away from it: g − λ h is the gradient of
    (1 − λ) · task + λ · distillation with h = g − ∇distillation. In softmax regression h is the teacher's own gradient;
    elsewhere it is the teacher's error carried back through the student's Jacobian (our reading for any pair).
    """

    def __init__(self) -> None:
        self.count = 0
        self.sums: list[Tensor] = []  # of g, h
        self.products: Tensor | None = None  # sums of g·g, g·h, h·h

    def add(self, gradient: Tensor, control: Tensor) -> None:
        """Take in one mini-batch's g and h, both [P]."""
        g, h = gradient.detach(), control.detach()
        products = torch.stack([g @ g, g @ h, h @ h]).double()
        self.products = products if self.products is None else self.products + products
        self.sums = [total + new for total, new in zip(self.sums, (g, h), strict=True)] if self.sums else [g, h]
        self.count += 1

    def covariances(self) -> tuple[float, float, float]:
        """Unbiased Var g, Cov(g, h), Var h, each summed over the parameters; needs two pairs."""
        assert self.products is not None
        g, h = self.sums
        means = torch.stack([g @ g, g @ h, h @ h]).double() / self.count
        centred = (self.products - means) / (self.count - 1)
        return float(centred[0]), float(centred[1]), float(centred[2])

    def squared_bias(self) -> float:
        """|E h|², without the part that comes from having few pairs; not negative."""
        mean = self.sums[1] / self.count
        return max(float(mean @ mean) - self.covariances()[2] / self.count, 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "sums": self.sums, "products": self.products}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.sums, self.products = state["count"], list(state["sums"]), state["products"]


def optimal_share(moments: GradientMoments, horizon: float) -> tuple[float, float]:
    """λ* and N(λ*) / N(0), where N(λ) = Var(g − λ h) + λ² (1 + horizon) |E h|².

    With horizon = 1 / (γ μ), γ the learning rate and μ the strong convexity, and g at the optimum, this is λ* = E g·h /
    (E |h|² + |E h|² / (γ μ)) and 1 − ρ² / (1 + β). Where g is not at the optimum its mean is taken off.

    Returns:
        λ*, of the convex combination (1 − λ) · task + λ · distillation, and the ratio in [0, 1]. Where h vanishes, as
        with a teacher that says what the labels say, nothing is to be subtracted: 0 and 1.
    """
    noise, together, control = moments.covariances()
    denominator = control + (1 + horizon) * moments.squared_bias()
    if not (noise > 0 and denominator > 0):
        return 0.0, 1.0
    share = together / denominator
    return share, min(max(1 - together * share / noise, 0.0), 1.0)


class VarianceOptimalBalance:
    """λ estimated again every so many steps from the gradients of consecutive mini-batches.

    The share λ* of the convex combination becomes the weight λ* / (1 − λ*); with `normalize` (the default here) the
    total is twice that combination, of the terms as the loss gives them: take a loss whose own weights are equal.

    Args:
        initial: λ until the first estimate.
        every: Steps between the starts of two estimates.
        samples: Mini-batches of an estimate, each with two more backward passes; the student moves meanwhile.
        horizon: 1 / (γ μ): how much bias costs against noise. μ is not known for a network, so this is to be tuned.
        minimum: Least λ.
        maximum: Greatest λ.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        initial: float = 1.0,
        every: int = 100,
        samples: int = 10,
        horizon: float = 10.0,
        minimum: float = 0.0,
        maximum: float = 10.0,
    ) -> None:
        self.bounds = Bounds(minimum, maximum)
        check_range("initial", initial, minimum, maximum)
        check_range("samples", samples, 2, 1e6)
        check_range("every", every, samples, 1e9)
        check_range("horizon", horizon, 0, 1e12)
        self.weight, self.every, self.samples, self.horizon = initial, every, samples, horizon
        self.moments = GradientMoments()

    def wants_gradients(self, step: int) -> bool:
        return step % self.every < self.samples

    def set_weight(self, moment: Moment) -> float:
        if moment.gradients is None:
            return self.weight
        task, distillation = moment.gradients
        self.moments.add(task, task - distillation)
        if self.moments.count == self.samples:
            share, _ = optimal_share(self.moments, self.horizon)
            self.weight = self.bounds.clamp(share / (1 - share) if share < 1 else self.bounds.maximum)
            self.moments = GradientMoments()
        return self.weight

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "moments": self.moments.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight = state["weight"]
        self.moments.load_state_dict(state["moments"])
