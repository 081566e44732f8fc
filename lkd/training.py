"""One student's training, a step at a time: what distillation, the pool and every comparison share."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from lkd.checkpoint import random_state, set_random_state
from lkd.config import TrainRecipe
from lkd.data import Batch, Batches
from lkd.errors import UserError
from lkd.losses.functions import widen
from lkd.outputs import Outputs
from lkd.processes import count_processes, gather_objects, own_rank

TeacherFunction = Callable[[Batch], Outputs]


class DivergedError(UserError):
    """The loss of a training is not finite."""


class Scheduler(Protocol):
    """A timm scheduler: its learning rate is a function of the update count alone."""

    def step_update(self, num_updates: int) -> None:
        """Set the optimiser's learning rate for this update."""


class Training:
    """A student, its loss, and everything that goes on from step to step.

    Args:
        student: The network, returning `Outputs`; put into train mode.
        loss: `loss(student, teacher, target, progress) -> terms`; its trainable parameters, if any, are trained along.
            One that must know which image is which sets `needs_index`: then `loss.enroll(index, labels)` is told all
            training images once, and each call is given the batch's `index`.
        teacher: From a batch to the teacher's outputs; None where the loss needs no teacher.
        batches: The batch of every step.
        recipe: Epochs, learning rate, schedule.

    Raises:
        UserError: If a setting is impossible or the schedule is unknown.
    """

    def __init__(
        self,
        student: nn.Module,
        loss: nn.Module,
        teacher: TeacherFunction | None,
        batches: Batches,
        recipe: TrainRecipe,
    ) -> None:
        self.student = student.train()
        self.needs_index = bool(getattr(loss, "needs_index", False))
        if self.needs_index:
            enroll: Any = loss.enroll
            enroll(batches.images.index, batches.images.labels)
        self.loss = loss.to(batches.device)
        self.teacher = teacher
        self.batches = batches
        self.total_steps = recipe.epochs * batches.steps_per_epoch
        self.step = 0
        trained: list[Tensor] = [p for module in (student, loss) for p in module.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(trained, recipe)
        self.scheduler = build_scheduler(self.optimizer, recipe, batches.steps_per_epoch)
        self.scheduler.step_update(0)
        self.autocast = partial(
            torch.autocast, batches.device.type, torch.bfloat16, enabled=is_bfloat16(recipe, batches.device)
        )
        self.computation = share_gradients(StudentLoss(student, self.loss, self.autocast), recipe, batches.device)

    @property
    def progress(self) -> float:
        """How far the training is, in [0, 1]."""
        return self.step / self.total_steps

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return self.optimizer.param_groups[0]["lr"]

    def run_step(self, watch: Callable[[tuple[Batch, Any, float]], None] | None = None) -> dict[str, Tensor]:
        """Do one step of SGD.

        Args:
            watch: Told the batch, the teacher's outputs and the progress before the student sees the batch.

        Returns:
            The loss's terms, detached.

        Raises:
            DivergedError: If a term is not finite.
        """
        batch = self.batches.at(self.step)
        with self.autocast():
            teacher = self.teacher(batch) if self.teacher else None
        teacher = widen_outputs(teacher) if teacher else None
        if watch:
            watch((batch, teacher, self.progress))
        identity = {"index": batch.index} if self.needs_index else {}
        terms = self.computation(batch.images, teacher, batch.target, self.progress, identity)
        total = torch.stack(list(terms.values())).sum()
        if not torch.isfinite(total):
            values = ", ".join(f"{name} = {value.item():g}" for name, value in terms.items())
            raise DivergedError(
                f"step {self.step}: the loss is not finite ({values}) at learning rate {self.learning_rate:g}; "
                "lower train.learning_rate"
            )
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        self.step += 1
        self.scheduler.step_update(self.step)
        return {name: value.detach() for name, value in terms.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit-exactly; batches are a function of the step. All processes must ask."""
        return {
            "step": self.step,
            "student": self.student.state_dict(),
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": gather_objects(random_state(self.batches.device)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.step = state["step"]
        self.student.load_state_dict(state["student"])
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        restore_random_state(state["random"], self.step, self.batches)
        self.scheduler.step_update(self.step)


class StudentLoss(nn.Module):
    """Student and loss as one module, from images to the loss's terms: what several processes share gradients of.

    Args:
        student: The student.
        loss: The loss, computed in float32.
        autocast: The context of the student's forward pass.
    """

    def __init__(self, student: nn.Module, loss: nn.Module, autocast: Callable[[], torch.autocast]) -> None:
        super().__init__()
        self.student = student
        self.loss = loss
        self.autocast = autocast

    def forward(
        self, images: Tensor, teacher: Outputs | None, target: Tensor, progress: float, identity: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Compute the terms."""
        with self.autocast():
            outputs = self.student(images)
        terms: dict[str, Tensor] = self.loss(widen_outputs(outputs), teacher, target, progress, **identity)
        return terms


def widen_outputs(outputs: Outputs) -> Outputs:
    """The outputs in at least float32; nothing is copied that is already."""
    return Outputs(widen(outputs.logits), {stage: widen(feature) for stage, feature in outputs.features.items()})


def is_bfloat16(recipe: TrainRecipe, device: torch.device) -> bool:
    """Whether student and teacher compute in bfloat16."""
    return recipe.precision == "bfloat16" or (recipe.precision == "auto" and device.type == "cuda")


def share_gradients(computation: StudentLoss, recipe: TrainRecipe, device: torch.device) -> nn.Module:
    """Wrap it so that every process's gradient is the mean over all; alone, nothing is wrapped.

    Raises:
        UserError: If the loss keeps a memory of images, which several processes would not share, or BatchNorm cannot be
            synchronised here.
    """
    if recipe.sync_batchnorm and device.type != "cuda":
        raise UserError("train.sync_batchnorm: works on GPUs only; leave it out")
    if count_processes() == 1:
        return computation
    if getattr(computation.loss, "needs_index", False):
        raise UserError("loss: it remembers every image (needs_index), which several processes cannot share; take one")
    if recipe.sync_batchnorm:
        computation.student = nn.SyncBatchNorm.convert_sync_batchnorm(computation.student)
    return nn.parallel.DistributedDataParallel(computation, [device] if device.type == "cuda" else None)


def restore_random_state(states: list[dict[str, Tensor]], step: int, batches: Batches) -> None:
    """Restore this process's generators; with another number of processes than before, seed them anew by the step."""
    if len(states) == count_processes():
        set_random_state(states[own_rank()], batches.device)
    else:
        torch.manual_seed(batches.seed * 1_000_003 + step * 1009 + own_rank())


def build_optimizer(parameters: list[Tensor], recipe: TrainRecipe) -> torch.optim.Optimizer:
    """Build SGD.

    Raises:
        UserError: If a setting is impossible.
    """
    try:
        return torch.optim.SGD(
            parameters,
            recipe.learning_rate,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=recipe.weight_decay,
        )
    except ValueError as error:
        raise UserError(f"train: {error}") from error


def build_scheduler(optimizer: torch.optim.Optimizer, recipe: TrainRecipe, steps_per_epoch: int) -> Scheduler:
    """Build timm's scheduler, stepped every update.

    Raises:
        UserError: If timm knows no such schedule, it has no epochs, or the milestones do not fit it.
    """
    if recipe.epochs < 1:
        raise UserError(f"train.epochs: {recipe.epochs} is not at least 1")
    check_milestones(recipe)
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=recipe.schedule,
            num_epochs=recipe.epochs,
            # timm decays one update before a milestone; half an update more puts it where torch's MultiStepLR has it.
            decay_milestones=[milestone + 0.5 / steps_per_epoch for milestone in recipe.milestones],
            decay_rate=recipe.decay_rate,
            warmup_epochs=recipe.warmup_epochs,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
        )
    except (AssertionError, ValueError) as error:
        raise UserError(f"train.schedule: {recipe.schedule!r} is not one of timm's ({error})") from error
    if scheduler is None:
        raise UserError(f"train.schedule: {recipe.schedule!r} is not one of timm's; cosine, step, multistep, poly, ...")
    return scheduler


def check_milestones(recipe: TrainRecipe) -> None:
    """Check the milestones of a multistep schedule.

    Raises:
        UserError: If they are missing, unordered or of another schedule.
    """
    if recipe.schedule != "multistep":
        if recipe.milestones:
            raise UserError(
                f"train.milestones: {recipe.milestones} belong to schedule multistep, not {recipe.schedule}"
            )
    elif not recipe.milestones or recipe.milestones != sorted({m for m in recipe.milestones if m > 0}):
        raise UserError(
            f"train.milestones: {recipe.milestones} are not increasing epochs, as in [150, 180, 210]; "
            "schedule multistep needs them"
        )
