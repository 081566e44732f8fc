"""Adam and AdamW."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from meta.optim.base import Schedule, Setting, UpdateAdjoint, is_active, pair_settings, setting_at
from meta.tensors import State, Tensors

SLOTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Adam:
    """Adam, equal to `torch.optim.Adam`. Slots: `step`, `exp_avg`, `exp_avg_sq`.

    Where an element's second moment is zero the root has no derivative; it is taken as zero, so that a parameter whose
    gradient vanishes (behind a dead ReLU, say) does not turn the hypergradient into NaN.

    Attributes:
        learning_rate: A number, a zero-dimensional tensor, or a function of the step within the rollout.
        betas: Decay rates of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: L2 penalty, added to the gradient (for AdamW: see there).
    """

    learning_rate: Schedule
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: Setting = 0.0

    _decoupled = False

    def update(self, before: State, gradients: Tensors, step: int) -> State:
        learning_rate = setting_at(self.learning_rate, step)
        new_parameters = dict(before.parameters)
        slots = {slot: dict(before.optimizer.get(slot, {})) for slot in SLOTS}
        for name, gradient in gradients.items():
            parameter = before.parameters[name]
            moments = self._advance(parameter, gradient, {slot: slots[slot].get(name) for slot in slots})
            if self._decoupled and is_active(self.weight_decay):
                parameter = parameter - learning_rate * self.weight_decay * parameter
            new_parameters[name] = parameter - learning_rate * moments.direction
            slots["step"][name] = moments.steps
            slots["exp_avg"][name] = moments.mean
            slots["exp_avg_sq"][name] = moments.square
        return State(new_parameters, before.buffers, slots)

    def adjoint(self, before: State, gradients: Tensors, step: int, cotangents: State) -> UpdateAdjoint:
        learning_rate = setting_at(self.learning_rate, step)
        beta1, beta2 = self.betas
        to_parameters, to_gradients = dict(cotangents.parameters), {}
        to_means = dict(cotangents.optimizer.get("exp_avg", {}))
        to_squares = dict(cotangents.optimizer.get("exp_avg_sq", {}))
        to_rate: list[Tensor] = []
        to_decay: list[Tensor] = []

        for name, gradient in gradients.items():
            parameter, to_parameter = before.parameters[name], to_parameters[name]
            old = {slot: before.optimizer.get(slot, {}).get(name) for slot in SLOTS}
            moments = self._advance(parameter, gradient, old)
            to_direction = -learning_rate * to_parameter
            to_mean = to_direction / moments.correction1 / moments.denominator
            # direction = mean / (correction1 · (root + eps)), and root = √(square / correction2)
            to_root = -to_mean * moments.mean / moments.denominator
            to_square = torch.where(moments.root > 0, to_root / (2 * moments.correction2 * moments.root), 0.0)
            if name in to_means:
                to_mean = to_mean + to_means[name]
            if name in to_squares:
                to_square = to_square + to_squares[name]

            to_decayed = (1 - beta1) * to_mean + 2 * (1 - beta2) * to_square * moments.decayed
            to_gradients[name] = to_decayed
            to_means[name], to_squares[name] = beta1 * to_mean, beta2 * to_square
            if is_active(self.weight_decay):
                through_decay = to_direction if self._decoupled else to_decayed
                to_parameters[name] = to_parameter + self.weight_decay * through_decay
                if isinstance(self.weight_decay, Tensor):
                    to_decay.append(through_decay * parameter)
            if isinstance(learning_rate, Tensor):
                moved = moments.direction
                if self._decoupled:
                    moved = moved + self.weight_decay * parameter
                to_rate.append(-(to_parameter * moved))

        settings = [(learning_rate, to_rate), (self.weight_decay, to_decay)]
        to_slots = {"exp_avg": to_means, "exp_avg_sq": to_squares}
        return UpdateAdjoint(to_parameters, to_gradients, to_slots, pair_settings(settings))

    def reads_values(self, step: int) -> bool:
        """Always: the update is not linear in the gradient."""
        return True

    def _advance(self, parameter: Tensor, gradient: Tensor, old: dict[str, Tensor | None]) -> "_Moments":
        """Advance one parameter's moments."""
        beta1, beta2 = self.betas
        l2 = is_active(self.weight_decay) and not self._decoupled
        decayed = gradient + self.weight_decay * parameter if l2 else gradient
        steps = torch.ones((), dtype=torch.float32, device="cpu") if old["step"] is None else old["step"] + 1
        mean, square = (1 - beta1) * decayed, (1 - beta2) * decayed * decayed
        if old["exp_avg"] is not None and old["exp_avg_sq"] is not None:
            mean, square = beta1 * old["exp_avg"] + mean, beta2 * old["exp_avg_sq"] + square
        correction1, correction2 = 1 - beta1 ** steps.item(), 1 - beta2 ** steps.item()
        positive = square > 0
        # Both branches of `where` are differentiated: the root must not see a zero.
        root = torch.where(positive, torch.where(positive, square / correction2, 1.0).sqrt(), 0.0)
        denominator = root + self.eps
        direction = mean / correction1 / denominator
        return _Moments(decayed, steps, mean, square, correction1, correction2, root, denominator, direction)


@dataclass(frozen=True)
class AdamW(Adam):
    """AdamW, equal to `torch.optim.AdamW`: the weight decay shrinks the parameters and does not enter the moments."""

    weight_decay: Setting = 0.01

    _decoupled = True


class _Moments(NamedTuple):
    """One parameter's moments after a step, and the direction that they give."""

    decayed: Tensor
    steps: Tensor
    mean: Tensor
    square: Tensor
    correction1: float
    correction2: float
    root: Tensor
    denominator: Tensor
    direction: Tensor
