"""Stochastic gradient descent."""

from dataclasses import dataclass

from torch import Tensor

from meta.optim.base import Schedule, Setting, UpdateAdjoint, is_active, pair_settings, setting_at
from meta.tensors import State, Tensors


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent, equal to `torch.optim.SGD`.

    Its one slot, where there is momentum, is `momentum_buffer`.

    Attributes:
        learning_rate: A number, a zero-dimensional tensor, or a function of the step within the rollout.
        momentum: Factor of the momentum buffer.
        dampening: Fraction of the gradient kept out of the momentum buffer.
        nesterov: Whether to look ahead along the momentum.
        weight_decay: L2 penalty, added to the gradient.
    """

    learning_rate: Schedule
    momentum: Setting = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: Setting = 0.0

    def __post_init__(self) -> None:
        if self.nesterov and (not is_active(self.momentum) or self.dampening != 0):
            raise ValueError("Nesterov momentum needs a momentum and no dampening")

    def update(self, before: State, gradients: Tensors, step: int) -> State:
        learning_rate = setting_at(self.learning_rate, step)
        old_buffers = before.optimizer.get("momentum_buffer", {})
        new_parameters, new_buffers = dict(before.parameters), dict(old_buffers)
        for name, gradient in gradients.items():
            direction, buffer = self._direction(before.parameters[name], gradient, old_buffers.get(name))
            new_parameters[name] = before.parameters[name] - learning_rate * direction
            if buffer is not None:
                new_buffers[name] = buffer
        slots = {"momentum_buffer": new_buffers} if is_active(self.momentum) else {}
        return State(new_parameters, before.buffers, slots)

    def adjoint(self, before: State, gradients: Tensors, step: int, cotangents: State) -> UpdateAdjoint:
        learning_rate = setting_at(self.learning_rate, step)
        old_buffers = before.optimizer.get("momentum_buffer", {})
        buffer_cotangents = cotangents.optimizer.get("momentum_buffer", {})
        to_parameters, to_buffers = dict(cotangents.parameters), dict(buffer_cotangents)
        to_gradients: Tensors = {}
        to_rate: list[Tensor] = []
        to_momentum: list[Tensor] = []
        to_decay: list[Tensor] = []

        for name, gradient in gradients.items():
            parameter, old_buffer = before.parameters[name], old_buffers.get(name)
            to_parameter = to_parameters[name]
            to_direction = -learning_rate * to_parameter
            to_decayed = to_direction
            if is_active(self.momentum):
                lookahead = self.momentum * to_direction if self.nesterov else to_direction
                to_buffer = lookahead + to_buffers.pop(name) if name in to_buffers else lookahead
                carried = to_buffer if old_buffer is None else (1 - self.dampening) * to_buffer
                to_decayed = to_direction + carried if self.nesterov else carried
                if old_buffer is not None:
                    to_buffers[name] = self.momentum * to_buffer
            to_gradients[name] = to_decayed
            if is_active(self.weight_decay):
                to_parameters[name] = to_parameter + self.weight_decay * to_decayed

            if isinstance(learning_rate, Tensor):
                direction, _ = self._direction(parameter, gradient, old_buffer)
                to_rate.append(-(to_parameter * direction))
            if isinstance(self.momentum, Tensor):
                if old_buffer is not None:
                    to_momentum.append(to_buffer * old_buffer)
                _, buffer = self._direction(parameter, gradient, old_buffer)
                if self.nesterov and buffer is not None:
                    to_momentum.append(to_direction * buffer)
            if isinstance(self.weight_decay, Tensor):
                to_decay.append(to_decayed * parameter)

        settings = [(learning_rate, to_rate), (self.momentum, to_momentum), (self.weight_decay, to_decay)]
        to_slots = {"momentum_buffer": to_buffers} if to_buffers else {}
        return UpdateAdjoint(to_parameters, to_gradients, to_slots, pair_settings(settings))

    def reads_values(self, step: int) -> bool:
        """Only to learn a setting: the update is linear."""
        settings = (setting_at(self.learning_rate, step), self.momentum, self.weight_decay)
        return any(isinstance(setting, Tensor) for setting in settings)

    def _direction(
        self, parameter: Tensor, gradient: Tensor, old_buffer: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the learning rate multiplies, and the new momentum buffer, if any."""
        decayed = gradient + self.weight_decay * parameter if is_active(self.weight_decay) else gradient
        if not is_active(self.momentum):
            return decayed, None
        buffer = decayed if old_buffer is None else self.momentum * old_buffer + (1 - self.dampening) * decayed
        return (decayed + self.momentum * buffer if self.nesterov else buffer), buffer
