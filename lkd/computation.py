"""A student and its loss as one computation: its precision, its parts, and the processes that share it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from lkd.acceleration import build_forward
from lkd.assembly import read_teacher_stages
from lkd.balance.balancing import Balancing
from lkd.checkpoint import random_state, set_random_state
from lkd.config import TrainRecipe
from lkd.data import Batches, seeded_generator
from lkd.errors import UserError
from lkd.losses.functions import widen
from lkd.outputs import Outputs
from lkd.processes import gather_objects
from lkd.throughput import StepClock


class StudentLoss(nn.Module):
    """Student and loss as one module, from images to the loss's terms: what several processes share gradients of.

    Args:
        student: The student.
        loss: The loss, computed in float32.
        autocast: The context of the student's forward pass.
        recipe: Whether the student is compiled, and its layout in memory.
        clock: Told when the student and when the loss is done, forward and backward.
    """

    def __init__(
        self,
        student: nn.Module,
        loss: nn.Module,
        autocast: Callable[[], torch.autocast],
        recipe: TrainRecipe,
        clock: StepClock,
    ) -> None:
        super().__init__()
        self.student = student
        self.loss = loss
        self.autocast = autocast
        self.clock = clock
        self.run_student = build_forward(student, recipe)
        self.reads_features = bool(read_teacher_stages(loss))

    def forward(
        self, images: Tensor, teacher: Outputs | None, target: Tensor, progress: float, identity: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Compute the terms."""
        with self.autocast():
            outputs = self.run_student(images)
        self.clock.lap("student")
        # Backward the loss is done when the gradient of the logits, which the student computed last, is there.
        outputs.logits.register_hook(lambda gradient: self.clock.lap("loss"))
        read = widen_outputs(outputs if self.reads_features else keep_stages(outputs, ()))
        terms: dict[str, Tensor] = self.loss(read, teacher, target, progress, **identity)
        self.clock.lap("loss")
        return terms


def check_accumulation(recipe: TrainRecipe, batches: Batches) -> int:
    """Into how many parts a batch is cut.

    Raises:
        UserError: If the batch of one process does not divide into them.
    """
    size = batches.batch_size // batches.part[1]
    if recipe.accumulation < 1 or size % recipe.accumulation:
        raise UserError(
            f"train.accumulation: {recipe.accumulation} does not divide the batch of one process, {size} images"
        )
    return recipe.accumulation


def check_balance(balance: Balancing | None, recipe: TrainRecipe, batches: Batches) -> None:
    """Check that a balance which takes gradients of its own can.

    Raises:
        UserError: If the student is compiled or several processes share the batch.
    """
    if balance is None or not balance.rule.wants_gradients(0):
        return
    if recipe.compile:
        raise UserError(
            "train.compile: a compiled student gives one gradient a step; this balance takes more, leave it"
        )
    if batches.part[1] > 1:
        raise UserError("balance: this one takes gradients of each term, in one process; take dynamic or a schedule")


def build_average(student: nn.Module, recipe: TrainRecipe) -> ModelEmaV3 | None:
    """The moving average of the student's weights, if one is asked for.

    Raises:
        UserError: If the decay is out of range.
    """
    if not 0 <= recipe.ema_decay < 1:
        raise UserError(f"train.ema_decay: {recipe.ema_decay} is not in [0, 1); 0 turns it off")
    return ModelEmaV3(student, recipe.ema_decay) if recipe.ema_decay else None


def hold_gradients(computation: nn.Module) -> AbstractContextManager[Any]:
    """Let several processes share gradients later, with the last part of the batch."""
    if isinstance(computation, nn.parallel.DistributedDataParallel):
        return computation.no_sync()
    return nullcontext()


def cut(outputs: Outputs | None, part: slice) -> Outputs | None:
    """The rows of a part of the batch."""
    if outputs is None:
        return None
    return Outputs(outputs.logits[part], {stage: feature[part] for stage, feature in outputs.features.items()})


def keep_stages(outputs: Outputs, stages: tuple[str, ...]) -> Outputs:
    """The outputs with the features of these stages alone; the others' memory is free once nothing needs them."""
    return Outputs(outputs.logits, {stage: outputs.features[stage] for stage in stages})


def widen_outputs(outputs: Outputs) -> Outputs:
    """The outputs in at least float32; nothing is copied that is already."""
    return Outputs(widen(outputs.logits), {stage: widen(feature) for stage, feature in outputs.features.items()})


def is_bfloat16(recipe: TrainRecipe, device: torch.device) -> bool:
    """Whether student and teacher compute in bfloat16."""
    return recipe.precision == "bfloat16" or (recipe.precision == "auto" and device.type == "cuda")


def share_gradients(computation: StudentLoss, recipe: TrainRecipe, batches: Batches) -> nn.Module:
    """Wrap it so that every gradient is the mean over the processes that share the batch; alone, nothing is wrapped.

    Raises:
        UserError: If the loss keeps a memory of images, which several processes would not share, or BatchNorm cannot be
            synchronised here.
    """
    device = batches.device
    if recipe.sync_batchnorm and device.type != "cuda":
        raise UserError("train.sync_batchnorm: works on GPUs only; leave it out")
    if batches.part[1] == 1:
        return computation
    if getattr(computation.loss, "needs_index", False):
        raise UserError("loss: it remembers every image (needs_index), which several processes cannot share; take one")
    if recipe.sync_batchnorm:
        computation.student = nn.SyncBatchNorm.convert_sync_batchnorm(computation.student)
    return nn.parallel.DistributedDataParallel(computation, [device] if device.type == "cuda" else None)


def collect_random_states(batches: Batches) -> list[dict[str, Tensor]]:
    """The generators of every process that has a part of the batch; all of them must ask."""
    state = random_state(batches.device)
    return gather_objects(state) if batches.part[1] > 1 else [state]


def restore_random_state(states: list[dict[str, Tensor]], step: int, batches: Batches) -> None:
    """Restore this process's generators; with another number of processes than before, seed them anew by the step."""
    number, processes = batches.part
    if len(states) == processes:
        set_random_state(states[number], batches.device)
    else:
        torch.manual_seed(seeded_generator(batches.seed, 10, number, step).initial_seed())
