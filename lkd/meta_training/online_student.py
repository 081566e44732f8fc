"""The dynamic strategy: the loss is updated while a student is trained with it.

*Our reconstruction* of LKD's "dynamic optimisation strategy". The student's real steps before each update are recorded
(`meta.Tape`) and walked back, so that an update costs the walk alone. The losses that were in charge are kept, to be
replayed by progress.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lkd.core.random import draw_seed
from lkd.losses.learned.loss import LearnedLoss, ReplayedLoss
from lkd.meta_training.rollouts import InnerBatch
from lkd.pool.pool import World
from meta import Tape

Point = tuple[float, dict[str, Tensor]]
"""From which progress on which weights of the loss networks are in charge."""


class OnlineStudent:
    """A student in training with the loss as it changes.

    Args:
        world: What it is trained in.
        loss: The loss, which the outer loop changes.
        number: Of the student: equal numbers give equal initial weights and batches.
        rollout_steps: How many of its steps before an update are walked back.
    """

    def __init__(self, world: World, loss: LearnedLoss, number: int, rollout_steps: int) -> None:
        self.seed, self.rollout_steps = draw_seed(world.seed, 6, number), rollout_steps
        loss.requires_grad_(False)  # so that the student's optimiser leaves the loss alone
        self.loss = share_parameters(loss)  # told this student's own accuracy
        # The walk back takes differences from the recorded gradients: they must be those that it would compute itself.
        train = replace(world.train, precision="float32", accumulation=1, compile=False)
        self.training = replace(world, train=train).start(self.loss, self.seed)
        loss.requires_grad_(True)
        hyper = dict(loss.named_parameters())
        student, optimizer, clip_norm = self.training.student, self.training.optimizer, world.train.clip_norm
        self.tape = Tape(student, optimizer, hyper, rollout_steps, clip_norm=clip_norm)

    def advance(self, step: int) -> list[InnerBatch]:
        """Train up to this step; the last `rollout_steps` steps are on the tape, and their batches are returned."""
        torch.manual_seed(draw_seed(self.seed, self.training.step))
        recorded: list[InnerBatch] = []

        def watch(batch: InnerBatch) -> None:
            self.tape.watch(batch)
            recorded.append(batch)

        first, looks = max(step - self.rollout_steps, self.training.step), self.training.looks
        if within := looks & {*range(first + 1, step)}:  # the walk back is to meet the loss that these steps met
            self.training.looks = looks - within | {first}
        while self.training.step < step:
            self.training.run_step(watch if step - self.training.step <= self.rollout_steps else None)
        return recorded


def share_parameters(loss: LearnedLoss) -> LearnedLoss:
    """A copy that has the same parameters, but buffers of its own."""
    return copy.deepcopy(loss, {id(parameter): parameter for parameter in loss.parameters()})


def assemble_loss(networks: LearnedLoss, points: Sequence[Point]) -> LearnedLoss | ReplayedLoss:
    """A frozen loss with the weights of these points: plain if there is one, else replayed by progress."""
    losses = []
    for _, state in points:
        loss = copy.deepcopy(networks)
        loss.load_state_dict(state)
        losses.append(loss.requires_grad_(False))
    return losses[0] if len(losses) == 1 else ReplayedLoss(losses, [start for start, _ in points])


def check_points(points: Any, networks: LearnedLoss) -> list[Point]:
    """Check points that a checkpoint holds: it may be a stranger's.

    Raises:
        ValueError: If the weights are not those of the networks, or their starts do not ascend in [0, 1].
    """
    shapes = {name: tensor.shape for name, tensor in networks.state_dict().items()}
    checked = [(float(start), dict(state)) for start, state in points]
    starts = [start for start, _ in checked]
    if starts != sorted(starts) or not all(0 <= start <= 1 for start in starts):
        raise ValueError(f"points of progress {starts} do not ascend in [0, 1]")
    if any({name: tensor.shape for name, tensor in state.items()} != shapes for _, state in checked):
        raise ValueError("weights of a point of progress are not those of the loss")
    return checked


def copy_state(module: nn.Module) -> dict[str, Any]:
    """A module's state, sharing no memory with it."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
