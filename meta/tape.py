"""The hypergradient of a student's real training steps, for the price of the walk back."""

from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from meta.checks import check_differences, check_inputs
from meta.estimators.first_order import walk_trajectory
from meta.optim import Clipped, Optimizer, PerStep, from_torch, read_slots
from meta.problem import Hypergradient, InnerLoss, OuterLoss, Problem
from meta.randomness import GeneratorStates, read_generators
from meta.tensors import State, Tensors, as_leaves, copy
from meta.trajectory import Step, StoredSteps, Trajectory


class Tape:
    """Records the last steps of an ordinary training loop, so that `first_order` need not take them again.

    In the loop, `tape.watch(batch)` comes before the forward pass; the optimiser's `step` is noticed by itself:

        tape = Tape(student, optimizer, dict(loss_network.named_parameters()), steps=20)
        for batch in loader:
            tape.watch(batch)
            optimizer.zero_grad()
            loss_network(student(batch.images), batch.targets).backward()
            optimizer.step()
        hypergradient = tape.hypergradient(inner_loss, outer_loss, outer_batch)

    Each step's backward pass must leave the gradients of `inner_loss` on that batch, and nothing else, in the `.grad`
    of the student's parameters and in those of the outer parameters, which `watch` clears. Holds one copy of the
    student's parameters, gradients and optimiser state for each step.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        hyper: Mapping[str, Tensor],
        steps: int,
        clip_norm: float = 0.0,
    ) -> None:
        """Start to record.

        Args:
            module: The student. Only parameters that require gradients and that the optimiser steps are recorded.
            optimizer: Its optimiser: SGD, Adam or AdamW of torch.
            hyper: The outer parameters.
            steps: How many steps to keep.
            clip_norm: The norm that each step's gradient is clipped to by a later step hook of the optimiser
                (`register_step_pre_hook`, after this tape was made); 0 for none.

        Raises:
            ValueError: The optimiser has no functional equal in `meta.optim`.
        """
        self.module, self.optimizer, self.hyper = module, optimizer, dict(hyper)
        from_torch(optimizer, module)
        self._clip_norm = clip_norm
        self._steps = StoredSteps("memory", steps)
        self._optimizers: deque[Optimizer] = deque(maxlen=steps)
        self._watched: tuple[Any, GeneratorStates, Tensors] | None = None
        self._hook = optimizer.register_step_pre_hook(lambda *_: self._capture())

    def watch(self, batch: Any) -> None:
        """Announce the batch of the step that begins now, before its forward pass."""
        for parameter in self.hyper.values():
            parameter.grad = None
        self._watched = (batch, read_generators(self._parameters()), copy(dict(self.module.named_buffers())))

    def hypergradient(
        self, inner_loss: InnerLoss, outer_loss: OuterLoss, outer_batch: Any, *, radius: float = 3e-3
    ) -> Hypergradient:
        """Walk back over the recorded steps, from the student as it is now; see `meta.estimators.first_order`.

        Raises:
            ValueError: Nothing is recorded, or the losses make no bi-level problem.
        """
        if not self._steps:
            raise ValueError("the tape is empty: call watch(batch) before each forward pass")
        steps = [replace(step, index=index) for index, step in enumerate(self._steps)]
        optimizers = list(self._optimizers)
        recorded = PerStep(lambda step: (optimizers[step], step))
        end = self._read_state(dict(self.module.named_buffers()))
        batches = [step.batch for step in steps]
        problem = Problem(
            inner_loss, outer_loss, steps[0].before, as_leaves(self.hyper), batches, outer_batch, recorded
        )
        check_inputs(problem)
        check_differences(problem, radius)
        return walk_trajectory(Trajectory(steps, end), problem, recorded, radius=radius, central=False)

    def close(self) -> None:
        self._hook.remove()

    def _capture(self) -> None:
        """Record the step that the optimiser is about to take."""
        if self._watched is None:
            return
        batch, generators, buffers = self._watched
        self._watched = None
        gradients = {name: tensor.grad for name, tensor in self._parameters().items() if tensor.grad is not None}
        hyper_gradients = {name: tensor.grad for name, tensor in self.hyper.items() if tensor.grad is not None}
        self._steps.append(Step(0, self._read_state(buffers), batch, generators, gradients, hyper_gradients))
        optimizer = from_torch(self.optimizer, self.module)
        self._optimizers.append(Clipped(optimizer, self._clip_norm) if self._clip_norm else optimizer)

    def _parameters(self) -> Tensors:
        stepped = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        named = self.module.named_parameters()
        return {name: tensor for name, tensor in named if tensor.requires_grad and id(tensor) in stepped}

    def _read_state(self, buffers: Tensors) -> State:
        return State(copy(self._parameters()), copy(buffers), read_slots(self.optimizer, self.module))
