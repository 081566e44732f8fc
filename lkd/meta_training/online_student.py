"""The dynamic strategy: the loss is updated while a student is trained with it.

*Our reconstruction* of LKD's "dynamic optimisation strategy". The student's real steps before each update are recorded
(`meta.Tape`) and walked back, so that an update costs the walk alone. The losses that were in charge are kept, to be
replayed by progress.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lkd.config.meta_training import MetaSettings, MetaTrainRecipe
from lkd.core.errors import UserError
from lkd.core.random import seeded_generator
from lkd.losses.learned.loss import LearnedLoss, ReplayedLoss
from lkd.meta_training.rollouts import InnerBatch
from lkd.models.teacher import TeacherFunction
from lkd.training.build import Images, StudentBuilder
from lkd.training.distill import start_training
from meta import Tape

Point = tuple[float, dict[str, Tensor]]
"""From which progress on which weights of the loss networks are in charge."""


class OnlineStudent:
    """A student in training with the loss as it changes.

    Args:
        recipe: The recipe.
        student: What builds it.
        images: The images.
        teacher: From a batch to the teacher's outputs.
        loss: The loss, which the outer loop changes.
        number: Of the student: equal numbers give equal initial weights and batches.
        device: Where tensors go.
    """

    def __init__(
        self,
        recipe: MetaTrainRecipe,
        student: StudentBuilder,
        images: Images,
        teacher: TeacherFunction,
        loss: LearnedLoss,
        number: int,
        device: torch.device,
    ) -> None:
        self.seed = draw_seed(recipe.seed, 6, number)
        self.rollout_steps = recipe.meta.rollout_steps
        loss.requires_grad_(False)  # so that the student's optimiser leaves the loss alone
        self.training = start_training(student, images, loss, teacher, recipe.train, self.seed, device)
        loss.requires_grad_(True)
        hyper = dict(loss.named_parameters())
        self.tape = Tape(self.training.student, self.training.optimizer, hyper, self.rollout_steps)

    def advance(self, step: int) -> list[InnerBatch]:
        """Train up to this step; the last `rollout_steps` steps are on the tape, and their batches are returned."""
        torch.manual_seed(draw_seed(self.seed, self.training.step))
        recorded: list[InnerBatch] = []

        def watch(batch: InnerBatch) -> None:
            self.tape.watch(batch)
            recorded.append(batch)

        while self.training.step < step:
            self.training.run_step(watch if step - self.training.step <= self.rollout_steps else None)
        return recorded


def draw_seed(*words: int) -> int:
    """A seed that is a function of several integers."""
    return int(torch.randint(2**62, (), generator=seeded_generator(*words)))


def window_end(settings: MetaSettings, outer_step: int, total_steps: int) -> int:
    """The step of the own students' training at which an outer step that alternates takes place."""
    start = settings.alternation_start
    return total_steps * (outer_step + 1 - start) // (settings.outer_steps - start)


def check_interleaving(settings: MetaSettings, total_steps: int) -> None:
    """Check that the outer steps fit into the training that they alternate with.

    Args:
        settings: The outer loop.
        total_steps: Of one student's training.

    Raises:
        UserError: If they do not, or a setting has no meaning there.
    """
    if settings.interleaving == "before":
        return
    kind = f"meta.interleaving {settings.interleaving}"
    if settings.interleaving == "both" and settings.outer_steps < 2:
        raise UserError(f"meta.outer_steps: {settings.outer_steps} cannot be halved; {kind} needs at least 2")
    updates = settings.outer_steps - settings.alternation_start
    if settings.rollout_steps > total_steps // updates:
        raise UserError(
            f"meta.rollout_steps: {settings.rollout_steps} steps do not fit between two of the {updates} updates of a "
            f"training of {total_steps} steps ({total_steps // updates} apart); lower it, or meta.outer_steps"
        )
    if settings.estimator not in ("audited", "first_order"):
        raise UserError(f"meta.estimator: {settings.estimator} cannot walk a tape back; {kind} takes first_order")
    if settings.reuse_patience:
        raise UserError(f"meta.reuse_patience: {settings.reuse_patience} would leave {kind}'s student half trained")
    if settings.interleaving == "alternate":
        for name in ("average", "initial_rollout_steps"):
            if getattr(settings, name):
                raise UserError(f"meta.{name}: {getattr(settings, name)} is of rollouts from the pool; {kind} has none")


def assemble_loss(networks: LearnedLoss, points: Sequence[Point]) -> LearnedLoss | ReplayedLoss:
    """A frozen loss with the weights of these points: plain if there is one, else replayed by progress."""
    losses = []
    for _, state in points:
        loss = copy.deepcopy(networks)
        loss.load_state_dict(state)
        losses.append(loss.requires_grad_(False))
    return losses[0] if len(losses) == 1 else ReplayedLoss(losses, [start for start, _ in points])


def copy_state(module: nn.Module) -> dict[str, Any]:
    """A module's state, sharing no memory with it."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
