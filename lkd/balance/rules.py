"""Rules that set λ, the weight of distillation against the task: schedules, dynamic, DTO-KD, variance-optimal."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

# ----------------------------------------------------------------------------------------------------------------------
# What a balance sees, gives and keeps.


class Moment(NamedTuple):
    """What a balance sees before the gradient of a step is taken.

    Attributes:
        step: Steps taken before this one.
        progress: How far the training is, in [0, 1].
        task: The loss's `task` term, on this step's batch.
        distillation: The sum of its other terms.
        gradients: Of `task` and of `distillation` with respect to the student, each [P]; None unless asked for.
    """

    step: int
    progress: float
    task: float
    distillation: float
    gradients: tuple[Tensor, Tensor] | None = None


class Balance:
    """A rule that sets λ.

    Attributes:
        kept: What of it is needed to go on to the bit.
    """

    kept: ClassVar[tuple[str, ...]] = ()

    def wants_gradients(self, step: int) -> bool:
        """Whether the step's moment must hold gradients."""
        return False

    def set_weight(self, moment: Moment) -> float:
        """The λ of this step, finite and not negative."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on to the bit."""
        return {name: getattr(self, name) for name in self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        for name in self.kept:
            setattr(self, name, state[name])


@dataclass(frozen=True)
class Bounds:
    """The least and the greatest λ."""

    minimum: float
    maximum: float

    def __post_init__(self) -> None:
        if not 0 <= self.minimum <= self.maximum < math.inf:
            raise ValueError(f"minimum {self.minimum}, maximum {self.maximum}: not 0 <= minimum <= maximum < infinity")

    def clamp(self, weight: float) -> float:
        return min(max(weight, self.minimum), self.maximum)


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Check an option."""
    if not low <= value <= high:
        raise ValueError(f"{name}: {value} is not in [{low:g}, {high:g}]")


def check_count(name: str, value: int, low: int) -> None:
    """Check an option that counts something."""
    if not isinstance(value, int) or value < low:
        raise ValueError(f"{name}: {value} is not a whole number of at least {low}")


# ----------------------------------------------------------------------------------------------------------------------
# λ from the gradients of both losses, in closed form (DTO-KD, ICLR 2026).


class DTOKDBalance(Balance):
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
    """

    kept = ("weight", "averages")

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
        check_count("every", every, 1)
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


# ----------------------------------------------------------------------------------------------------------------------
# λ that rises as the loss falls (Kim, Kim, Kim, Jo, 2025, arXiv 2505.06270). Established of the paper: the loss is a
# task's plus λ times the distillation's, and λ should rise as the loss falls. Its expansion and formula are not
# public to us: the rule here is *our reconstruction*, from an identity. With L_t = T_t + λ_t D_t, L_{t+1} = (T_{t+1}
# + λ_t D_{t+1}) + (λ_{t+1} − λ_t) D_{t+1}, so that a step which made the loss fall by `drop` at the old λ admits an
# increase of λ by less than drop / D_{t+1}.


class DynamicBalance(Balance):
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
    """

    kept = ("weight", "averages")
    direction = 1

    def __init__(
        self,
        initial: float = 1.0,
        growth: float = 0.5,
        minimum: float = 0.0,
        maximum: float = 10.0,
        warmup: float = 0.0,
        smoothing: float = 0.9,
    ) -> None:
        self.bounds = Bounds(minimum, maximum)
        check_range("initial", initial, minimum, maximum)
        check_range("growth", growth, 1e-9, 1e6)
        check_range("warmup", warmup, 0, 1)
        check_range("smoothing", smoothing, 0, 1 - 1e-9)
        self.weight, self.growth, self.warmup, self.smoothing = initial, growth, warmup, smoothing
        self.averages: list[float] = []

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


class ReversedBalance(DynamicBalance):
    """The opposite of the paper's direction, a control."""

    direction = -1


# ----------------------------------------------------------------------------------------------------------------------
# λ as a function of the training's progress alone.


class ConstantBalance(Balance):
    """The same λ at every step.

    Args:
        weight: λ.
    """

    def __init__(self, weight: float = 1.0) -> None:
        check_range("weight", weight, 0, 1e6)
        self.weight = weight

    def set_weight(self, moment: Moment) -> float:
        return self.weight


class LinearBalance(ConstantBalance):
    """λ from `start` to `end`, linear in progress.

    Args:
        start: λ at the first step.
        end: λ at the end of the training.
    """

    def __init__(self, start: float = 1.0, end: float = 0.0) -> None:
        Bounds(min(start, end), max(start, end))
        self.start, self.end = start, end

    def set_weight(self, moment: Moment) -> float:
        return self.start + (self.end - self.start) * self.part(moment.progress)

    def part(self, progress: float) -> float:
        """How much of the way is gone, in [0, 1]."""
        return progress


class CosineBalance(LinearBalance):
    """λ from `start` to `end` along half a cosine: slow at both ends."""

    def part(self, progress: float) -> float:
        return (1 - math.cos(math.pi * progress)) / 2


# ----------------------------------------------------------------------------------------------------------------------
# λ that makes the gradient least noisy (Safaryan, Peste, Alistarh, NeurIPS 2023, arXiv 2305.17581). Established: for
# softmax regression at temperature 1 the gradient of (1 − λ) CE + λ KL is that of the student's cross-entropy minus λ
# times that of the teacher's on the same batch, so distillation is a control variate. The formulas of the best λ and
# of the noise that is left are *our derivation*, which has the paper's shape; constants may differ.


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
        # A checkpoint's are on the CPU.
        self.products = products if self.products is None else self.products.to(products) + products
        self.sums = [total.to(new) + new for total, new in zip(self.sums, (g, h), strict=True)] if self.sums else [g, h]
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


class VarianceOptimalBalance(Balance):
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
        check_count("samples", samples, 2)
        check_count("every", every, samples)
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
