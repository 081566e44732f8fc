"""One student's training, a step at a time: what distillation, the pool and every comparison share."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_swa_avg_fn

from lkd.balance.balancing import Balancing
from lkd.config.parts import TrainRecipe
from lkd.core.distributed import any_process, copy_buffers_from_main, gather_objects
from lkd.core.errors import UserError, explaining_exhaustion
from lkd.core.outputs import Outputs
from lkd.core.random import seeded_generator
from lkd.core.tensor_files import random_state, set_random_state
from lkd.data.batches import Batches
from lkd.data.images import Batch
from lkd.losses.functions import widen
from lkd.losses.loss import DistillationLoss
from lkd.models.build import build_forward
from lkd.models.dry_run import NO_GRADIENT, check_trainable
from lkd.models.teacher import TeacherFunction
from lkd.tracking.run import emulates_bfloat16
from lkd.training.optimizer import (
    build_optimizer,
    build_scheduler,
    check_optimization,
    read_learning_rate,
    read_state,
    restore_optimizer,
)
from lkd.training.throughput import StepClock

Watch = Callable[[tuple[Batch, Any, float]], None]  # batch, the teacher's outputs or None, progress
LESS_MEMORY = "a smaller train.batch_size or more train.accumulation"
NAMED = 5  # images in a message
LOOKS = 20  # at the student's own accuracy, for a loss that reads it


class DivergedError(UserError):
    """The loss of a training is not finite."""


class BrokenInputError(UserError):
    """An image or a teacher's answer that is not finite: no fault of the training."""


class Training:
    """A student, its loss, and everything that goes on from step to step.

    Args:
        student: The network, returning `Outputs`; put into train mode.
        loss: `loss(student, teacher, target, progress) -> terms`; its trainable parameters, if any, are trained along.
        teacher: From a batch to the teacher's outputs; None where the loss needs no teacher.
        batches: The batch of every step. Several processes that each have a part of it average their gradients.
        recipe: Epochs, learning rate, schedule.
        balance: What weighs the loss's terms; None where the loss is their sum.

    Attributes:
        clock: What the parts of the steps took.
    """

    def __init__(
        self,
        student: nn.Module,
        loss: DistillationLoss,
        teacher: TeacherFunction | None,
        batches: Batches,
        recipe: TrainRecipe,
        balance: Balancing | None = None,
    ) -> None:
        check_settings(recipe, batches, loss, balance)
        check_optimization(student, recipe, batches.device)
        self.student, self.batches, self.recipe, self.balance = student.train(), batches, recipe, balance
        if loss.needs_index:
            loss.enroll(batches.images.index, batches.images.labels)
        self.loss = loss.to(batches.device)
        self.teacher = loss.own_teacher or teacher
        self.step, self.total_steps = 0, recipe.epochs * batches.steps_per_epoch
        self.looks = {look * self.total_steps // LOOKS for look in range(LOOKS)}
        self.optimizer = build_optimizer(student, recipe, loss)
        self.scheduler = build_scheduler(self.optimizer, recipe, batches.steps_per_epoch)
        self.scheduler.step_update(0)
        self.autocast = build_autocast(recipe, batches.device)
        self.scaler = torch.amp.GradScaler(batches.device.type, enabled=recipe.precision == "float16")
        self.is_clipped, self.norm_before_clipping = False, torch.tensor(torch.nan)
        self.clock = StepClock(batches.device)
        self.computation: Any = StudentLoss(student, self.loss, self.autocast, recipe, self.clock)
        # Copies of the student, whose layout in memory is settled now.
        self.average = ModelEmaV3(student, recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None
        by_tensor = get_swa_avg_fn()  # torch's fused averaging, on GPUs, takes no integers, such as BatchNorm's counts
        averaged = AveragedModel(student, avg_fn=by_tensor, use_buffers=True) if recipe.swa_epochs else None
        self.epoch_average = averaged
        self.shared = batches.part[1] > 1
        if self.shared:
            if recipe.sync_batchnorm:
                self.computation.student = convert_sync_batchnorm(student)
            own_gpu = [batches.device] if batches.device.type == "cuda" else None
            lines = check_trainable(student, "student", batches.images.image_shape, 2)
            unused = any(line.startswith(NO_GRADIENT) for line in lines)
            unused |= own_gpu is None  # else buckets are laid out anew after a step: digits of three processes and more
            self.computation = DistributedDataParallel(self.computation, own_gpu, find_unused_parameters=unused)

    @property
    def progress(self) -> float:
        """How far the training is, in [0, 1]."""
        return self.step / self.total_steps

    @property
    def result(self) -> nn.Module:
        """The network to evaluate and save: the student, or an average of its weights, once there is one."""
        averaged = self.epoch_average and int(self.epoch_average.n_averaged) > 0
        average = self.epoch_average if averaged else self.average
        return average.module if average else self.student

    @property
    def learning_rate(self) -> float:
        return read_learning_rate(self.optimizer)

    def run_step(self, watch: Watch | None = None) -> dict[str, Tensor]:
        """Do one step of the optimiser.

        Args:
            watch: Told the batch, the teacher's outputs and the progress before the student sees the batch.

        Returns:
            The loss's terms, detached.

        Raises:
            DivergedError: If a term is not finite.
        """
        epoch, place = divmod(self.step, self.batches.steps_per_epoch)
        if not place:
            self.loss.begin_epoch(epoch, self.student, self.batches.images, self.teacher, self.progress)
        if self.loss.reads_trust and self.step in self.looks:
            if self.shared:  # else the running statistics of BatchNorm, and so what is seen, would differ
                copy_buffers_from_main(self.student)
            self.loss.update_trust(self.student)
        self.clock.start()
        batch = self.batches.at(self.step)
        if self.recipe.channels_last:
            batch = batch._replace(images=batch.images.contiguous(memory_format=torch.channels_last))
        self.clock.lap("data")
        with explaining_exhaustion(f"step {self.step}: teacher", LESS_MEMORY), self.autocast():
            teacher = self.teacher(batch) if self.teacher else None
        teacher = widen_outputs(keep_stages(teacher, self.loss.teacher_stages)) if teacher else None
        self.clock.lap("teacher")
        if watch:
            watch((batch, teacher, self.progress))
        self.optimizer.zero_grad()
        parts = self.recipe.accumulation
        size = len(batch.target) // parts
        rows = []
        with explaining_exhaustion(f"step {self.step}", LESS_MEMORY):
            for number in range(parts):
                part = slice(number * size, (number + 1) * size)
                own, answers = Batch(*(column[part] for column in batch)), cut(teacher, part)
                with self.computation.no_sync() if self.shared and number < parts - 1 else nullcontext():
                    rows.append(self.compute_gradients(own, answers, first=number == 0))
        if self.recipe.clip_norm and not self.is_clipped:  # only now, so that a tape sees the gradient before it
            self.optimizer.register_step_pre_hook(lambda *_: self.clip_gradient())
            self.is_clipped = True
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self.scheduler.step_update(self.step)
        if self.average:
            self.average.update(self.student, self.step)
        left, into = divmod(self.total_steps - self.step, self.batches.steps_per_epoch)
        if self.epoch_average and not into and left < self.recipe.swa_epochs:
            self.epoch_average.update_parameters(self.student)
        self.clock.lap("student")
        return {name: torch.stack([row[name] for row in rows]).mean(0) for name in rows[0]}

    def compute_gradients(self, batch: Batch, teacher: Outputs | None, first: bool = True) -> dict[str, Tensor]:
        """Add the gradients of a part of a batch, as its share of the whole batch's mean.

        The first part is that from whose terms a balance sets the step's weight.

        Returns:
            The loss's terms, detached.

        Raises:
            DivergedError: If a term is not finite.
            BrokenInputError: If what the student is given is not finite.
        """
        identity = {"index": batch.index} if self.loss.needs_index else {}
        terms = self.computation(batch.images, teacher, batch.target, self.progress, identity)
        if self.balance is None:
            total = torch.stack(list(terms.values())).sum()
        else:
            if first:
                self.balance.set_weight(terms, self.student.parameters(), self.step, self.progress)
            total = self.balance.weigh(terms)
        broken = not torch.isfinite(total + sum_inputs(batch, teacher))
        if any_process(broken, self.batches.device) if self.shared else broken:  # all, else the others hang
            check_inputs(f"step {self.step}", batch, teacher, self.shared)
            values = ", ".join(f"{name} = {value.item():g}" for name, value in terms.items())
            raise DivergedError(
                f"step {self.step}: the loss is not finite ({values}) at learning rate {self.learning_rate:g}; "
                "lower train.learning_rate"
            )
        again = self.recipe.accumulation > 1 and self.loss.own_teacher is not None  # it has answered the whole batch
        self.scaler.scale(total / self.recipe.accumulation).backward(retain_graph=again)
        self.clock.lap("student")
        return {name: value.detach() for name, value in terms.items()}

    def clip_gradient(self) -> None:
        """Scale the gradient of all that the optimiser steps down to the recipe's norm."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.norm_before_clipping = clip_grad_norm_(parameters, self.recipe.clip_norm)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit-exactly; batches are a function of the step. All that share it must ask."""
        state = random_state(self.batches.device)
        return {
            "step": self.step,
            "student": self.student.state_dict(),
            "average": self.average.module.state_dict() if self.average else {},
            "epoch_average": self.epoch_average.state_dict() if self.epoch_average else {},
            "scaler": self.scaler.state_dict(),
            "loss": self.loss.state_dict() | dict(self.loss.named_buffers()),  # those too that no file keeps
            "balance": self.balance.state_dict() if self.balance else {},
            "optimizer": read_state(self.optimizer),
            "random": gather_objects(state) if self.shared else [state],  # of every process that has a part
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.student.load_state_dict(state["student"])
        if self.average:
            self.average.module.load_state_dict(state["average"])
        if self.epoch_average:
            self.epoch_average.load_state_dict(state["epoch_average"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.loss.load_state_dict({name: state["loss"][name] for name in self.loss.state_dict()})
        for name, buffer in self.loss.named_buffers():
            buffer.copy_(state["loss"][name])
        if self.balance:
            self.balance.load_state_dict(state["balance"])
        restore_optimizer(self.optimizer, state["optimizer"])
        number, processes = self.batches.part
        if len(state["random"]) == processes:
            set_random_state(state["random"][number], self.batches.device)
        else:  # another number of processes than before
            torch.manual_seed(seeded_generator(self.batches.seed, 10, number, self.step).initial_seed())
        self.scheduler.step_update(self.step)


class StudentLoss(nn.Module):
    """Student and loss as one module, from images to the loss's terms: what several processes share gradients of.

    The student runs within `autocast`, the loss in float32; the clock is told when each is done, forward and backward.
    """

    def __init__(
        self,
        student: nn.Module,
        loss: DistillationLoss,
        autocast: Callable[[], torch.autocast],
        recipe: TrainRecipe,
        clock: StepClock,
    ) -> None:
        super().__init__()
        self.student, self.loss, self.autocast, self.clock = student, loss, autocast, clock
        self.reads_features = bool(loss.teacher_stages)
        self.run_student = build_forward(student, recipe.compile, recipe.channels_last, self.reads_features)

    def forward(
        self, images: Tensor, teacher: Outputs | None, target: Tensor, progress: float, identity: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        with self.autocast():
            outputs = self.run_student(images)
        self.clock.lap("student")
        # Backward the loss is done when the gradient of the logits, which the student computed last, is there.
        outputs.logits.register_hook(lambda gradient: self.clock.lap("loss"))
        read = widen_outputs(outputs if self.reads_features else keep_stages(outputs, ()))
        terms: dict[str, Tensor] = self.loss(read, teacher, target, progress, **identity)
        self.clock.lap("loss")
        return terms


def check_settings(recipe: TrainRecipe, batches: Batches, loss: DistillationLoss, balance: Balancing | None) -> None:
    """Check that the settings of a training go together."""
    size, shared = batches.batch_size // batches.part[1], batches.part[1] > 1
    if size % recipe.accumulation:
        raise UserError(
            f"train.accumulation: {recipe.accumulation} does not divide the batch of one process, {size} images"
        )
    last = recipe.epochs - recipe.cooldown_epochs
    for name, steps in (("warmup_epochs", batches.steps_per_epoch), ("warmup_steps", 1)):
        if (given := getattr(recipe, name)) and given * steps >= last * batches.steps_per_epoch:
            raise UserError(
                f"train.{name}: {given} leave nothing of train.epochs, {recipe.epochs}, before the cooldown: "
                "train.learning_rate is never reached; take fewer"
            )
    if recipe.sync_batchnorm and batches.device.type != "cuda":
        raise UserError("train.sync_batchnorm: works on GPUs only; leave it out")
    if shared and loss.needs_index:
        raise UserError("loss: it remembers every image (needs_index), which several processes cannot share; take one")
    if balance and balance.rule.wants_gradients(0):
        if recipe.compile:
            raise UserError(
                "train.compile: a compiled student gives one gradient a step; this balance takes more, leave it"
            )
        if recipe.precision == "float16":
            raise UserError(
                "train.precision: float16 loses small gradients unless they are scaled, and those of single terms, "
                "which this balance takes, are not; take bfloat16 or float32"
            )
        if shared:
            raise UserError(
                "balance: this one takes gradients of each term, in one process; take dynamic or a schedule"
            )


def build_autocast(recipe: TrainRecipe, device: torch.device) -> Callable[[], torch.autocast]:
    """The context that student and teacher compute in."""
    on_gpu = device.type == "cuda" and not emulates_bfloat16(device)
    kind = torch.float16 if recipe.precision == "float16" else torch.bfloat16
    is_short = recipe.precision in ("bfloat16", "float16") or (recipe.precision == "auto" and on_gpu)
    return partial(torch.autocast, device.type, kind, enabled=is_short)


def keep_stages(outputs: Outputs, stages: tuple[str, ...]) -> Outputs:
    """The outputs with the features of these stages alone; the others' memory is free once nothing needs them."""
    return Outputs(outputs.logits, {stage: outputs.features[stage] for stage in stages})


def widen_outputs(outputs: Outputs) -> Outputs:
    """The outputs in at least float32; nothing is copied that is already."""
    return Outputs(widen(outputs.logits), {stage: widen(feature) for stage, feature in outputs.features.items()})


def cut(outputs: Outputs | None, part: slice) -> Outputs | None:
    """The rows of a part of the batch."""
    if outputs is None:
        return None
    return Outputs(outputs.logits[part], {stage: feature[part] for stage, feature in outputs.features.items()})


def name_inputs(batch: Batch, teacher: Outputs | None) -> dict[str, Tensor]:
    """What a student is given, by what it is called in messages."""
    inputs = {"pixels": batch.images}
    if teacher:
        inputs |= {"the teacher's logits": teacher.logits}
        inputs |= {f"the teacher's features {name}": tensor for name, tensor in teacher.features.items()}
    return inputs


def sum_inputs(batch: Batch, teacher: Outputs | None) -> Tensor:
    """A scalar that is finite if and only if the batch and the teacher's answers are; asks no device to wait."""
    return torch.stack([tensor.sum() for tensor in name_inputs(batch, teacher).values()]).sum()


def check_inputs(place: str, batch: Batch, teacher: Outputs | None, shared: bool = False) -> None:
    """Check that a batch and the teacher's answers to it are finite.

    `place`: where they are used, say `"step 12"`. `shared`: whether the processes that have met each have a part of the
    batch; all must ask then, and all raise.

    Raises:
        BrokenInputError: If not; names the images by their index in the data set.
    """
    rows = {
        what: (~tensor.flatten(1).isfinite().all(1)).nonzero().flatten()
        for what, tensor in name_inputs(batch, teacher).items()
    }
    broken = {what: found for what, found in rows.items() if len(found)}
    if not (any_process(bool(broken), batch.images.device) if shared else broken):
        return
    if not broken:
        raise BrokenInputError(f"{place}: what another process was given is not finite; its message says more")
    what, found = next(iter(broken.items()))
    named = ", ".join(str(index) for index in batch.index[found][:NAMED].tolist())
    more = ", ..." if len(found) > NAMED else ""
    raise BrokenInputError(
        f"{place}: {what} of {len(found)} of {len(batch.index)} images are not finite (images {named}{more}); "
        "check the data and the teacher, and go on with --resume auto"
    )
