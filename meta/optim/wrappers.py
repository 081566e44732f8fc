"""Optimisers made of optimisers: parameter groups, gradient clipping, averaged iterates, one of each step's own."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from meta.optim.base import Optimizer, UpdateAdjoint, check_optimizer
from meta.tensors import State, Tensors


@dataclass(frozen=True)
class Grouped:
    """Parameter groups: every parameter is stepped by the optimiser that its name selects.

    `Grouped(lambda name: plain if name.endswith("bias") else decayed)` leaves the biases without weight decay.

    Attributes:
        select: Parameter name → optimiser. Parameters of one group must be given one and the same optimiser object.
    """

    select: Callable[[str], Optimizer]

    def update(self, before: State, gradients: Tensors, step: int) -> State:
        new_parameters: Tensors = {}
        new_state: dict[str, Tensors] = {}
        for optimizer, names in self._groups(before.parameters):
            updated = optimizer.update(_subset(before, names), _pick(gradients, names), step)
            new_parameters |= updated.parameters
            _merge(new_state, updated.optimizer)
        return State({name: new_parameters[name] for name in before.parameters}, before.buffers, new_state)

    def adjoint(self, before: State, gradients: Tensors, step: int, cotangents: State) -> UpdateAdjoint:
        whole = UpdateAdjoint({}, {}, {}, [])
        for optimizer, names in self._groups(before.parameters):
            part = optimizer.adjoint(_subset(before, names), _pick(gradients, names), step, _subset(cotangents, names))
            whole.parameters.update(part.parameters)
            whole.gradients.update(part.gradients)
            _merge(whole.optimizer, part.optimizer)
            whole.settings.extend(part.settings)
        return whole

    def reads_values(self, step: int) -> bool:
        """Taken as given, since the groups are not known here."""
        return True

    def _groups(self, parameters: Tensors) -> list[tuple[Optimizer, set[str]]]:
        groups: dict[int, tuple[Optimizer, set[str]]] = {}
        for name in parameters:
            optimizer = check_optimizer(self.select(name))
            groups.setdefault(id(optimizer), (optimizer, set()))[1].add(name)
        return list(groups.values())


@dataclass(frozen=True)
class Clipped:
    """An optimiser behind gradient clipping by the global norm, equal to `torch.nn.utils.clip_grad_norm_`.

    Attributes:
        optimizer: The optimiser that is given the clipped gradients.
        max_norm: The largest norm that passes unchanged.
        stacked: Whether the first dimension is that of several students, each of which has a norm of its own.
    """

    optimizer: Optimizer
    max_norm: float
    stacked: bool = False

    def __post_init__(self) -> None:
        check_optimizer(self.optimizer)

    def update(self, before: State, gradients: Tensors, step: int) -> State:
        factor, _ = self._factor(gradients)
        clipped = {name: _spread(factor, gradient) * gradient for name, gradient in gradients.items()}
        return self.optimizer.update(before, clipped, step)

    def adjoint(self, before: State, gradients: Tensors, step: int, cotangents: State) -> UpdateAdjoint:
        factor, norm = self._factor(gradients)
        clipped = {name: _spread(factor, gradient) * gradient for name, gradient in gradients.items()}
        inner = self.optimizer.adjoint(before, clipped, step, cotangents)
        products = [inner.gradients[name] * gradient for name, gradient in gradients.items()]
        along = torch.stack([self._flatten(x).sum(-1) for x in products]).sum(0)
        # The factor max_norm / (norm + 1e-6) shrinks along the gradient; below the bound it is a constant 1.
        shrink = torch.where(factor < 1, factor * along / ((norm + 1e-6) * norm.clamp(min=1e-30)), 0.0)
        to_gradients = {
            name: _spread(factor, gradient) * inner.gradients[name] - _spread(shrink, gradient) * gradient
            for name, gradient in gradients.items()
        }
        return inner._replace(gradients=to_gradients)

    def reads_values(self, step: int) -> bool:
        """Always: the factor depends on the gradients."""
        return True

    def _factor(self, gradients: Tensors) -> tuple[Tensor, Tensor]:
        each = [torch.linalg.vector_norm(self._flatten(gradient), dim=-1) for gradient in gradients.values()]
        norm = torch.linalg.vector_norm(torch.stack(each), dim=0)
        return (self.max_norm / (norm + 1e-6)).clamp(max=1.0), norm

    def _flatten(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(len(tensor), -1) if self.stacked else tensor.flatten()


@dataclass(frozen=True)
class Averaged:
    """An optimiser that also averages its iterates: slot `average`; the outer loss is then taken at the average.

    The exponential moving average starts from the parameters before the first step and follows
    average ← decay · average + (1 − decay) · parameters after each step.

    Attributes:
        optimizer: The optimiser that moves the parameters.
        decay: How much of the average is kept at each step.
    """

    optimizer: Optimizer
    decay: float

    def __post_init__(self) -> None:
        check_optimizer(self.optimizer)
        if isinstance(self.optimizer, Averaged):
            raise ValueError("Averaged: its optimiser averages already, and there is one slot for an average")

    def update(self, before: State, gradients: Tensors, step: int) -> State:
        old = evaluation_parameters(before)
        after = self.optimizer.update(before, gradients, step)
        average = {
            name: self.decay * old[name] + (1 - self.decay) * tensor for name, tensor in after.parameters.items()
        }
        return after._replace(optimizer={**after.optimizer, "average": average})

    def adjoint(self, before: State, gradients: Tensors, step: int, cotangents: State) -> UpdateAdjoint:
        to_average = cotangents.optimizer.get("average", {})
        to_parameters = dict(cotangents.parameters)
        for name, cotangent in to_average.items():
            to_parameters[name] = to_parameters[name] + (1 - self.decay) * cotangent
        inner = self.optimizer.adjoint(before, gradients, step, cotangents._replace(parameters=to_parameters))
        kept = {name: self.decay * cotangent for name, cotangent in to_average.items()}
        if "average" in before.optimizer:
            return inner._replace(optimizer={**inner.optimizer, "average": kept})
        started = {name: tensor + kept[name] if name in kept else tensor for name, tensor in inner.parameters.items()}
        return inner._replace(parameters=started)

    def reads_values(self, step: int) -> bool:
        """As the optimiser does: the average is linear."""
        return self.optimizer.reads_values(step)


@dataclass(frozen=True)
class PerStep:
    """Another optimiser at every step.

    Attributes:
        choose: Step within the rollout → the optimiser that takes it, and which step it takes that for.
    """

    choose: Callable[[int], tuple[Optimizer, int]]

    def update(self, before: State, gradients: Tensors, step: int) -> State:
        optimizer, number = self.choose(step)
        return optimizer.update(before, gradients, number)

    def adjoint(self, before: State, gradients: Tensors, step: int, cotangents: State) -> UpdateAdjoint:
        optimizer, number = self.choose(step)
        return optimizer.adjoint(before, gradients, number, cotangents)

    def reads_values(self, step: int) -> bool:
        """As the step's optimiser does."""
        optimizer, number = self.choose(step)
        return optimizer.reads_values(number)


def evaluation_parameters(state: State) -> Tensors:
    """Return the parameters that the outer loss sees: the averaged ones where there is an average."""
    return state.parameters | state.optimizer.get("average", {})  # of a group's parameters alone, perhaps


def clip_each_student(optimizer: Optimizer) -> Optimizer:
    """The optimiser of several stacked students, whose gradients are clipped by each student's own norm."""
    if isinstance(optimizer, Clipped):
        return replace(optimizer, optimizer=clip_each_student(optimizer.optimizer), stacked=True)
    if isinstance(optimizer, Averaged):
        return replace(optimizer, optimizer=clip_each_student(optimizer.optimizer))
    if isinstance(optimizer, Grouped):
        groups: dict[int, tuple[Optimizer, Optimizer]] = {}  # parameters of one group share one object

        def select(name: str) -> Optimizer:
            own = optimizer.select(name)
            return groups.setdefault(id(own), (own, clip_each_student(own)))[1]

        return Grouped(select)
    if isinstance(optimizer, PerStep):

        def choose(step: int) -> tuple[Optimizer, int]:
            chosen, number = optimizer.choose(step)
            return clip_each_student(chosen), number

        return PerStep(choose)
    return optimizer


def _spread(factor: Tensor, gradient: Tensor) -> Tensor:
    """A factor, or one for each student, in a shape that multiplies a gradient."""
    return factor.reshape(-1, *[1] * (gradient.dim() - 1)) if factor.dim() else factor


def _pick(tensors: Tensors, names: set[str]) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name in names}


def _subset(state: State, names: set[str]) -> State:
    slots = {slot: _pick(tensors, names) for slot, tensors in state.optimizer.items()}
    return State(_pick(state.parameters, names), {}, slots)


def _merge(slots: dict[str, Tensors], more: dict[str, Tensors]) -> None:
    for slot, tensors in more.items():
        slots.setdefault(slot, {}).update(tensors)
