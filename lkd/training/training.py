"""One student's training, a step at a time: what distillation, the pool and every comparison share."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from lkd.balance.balancing import Balancing
from lkd.config.parts import TrainRecipe
from lkd.core.distributed import any_process, gather_objects
from lkd.core.errors import FOR_TRAININGS, UserError, explain_exhaustion
from lkd.core.outputs import Outputs
from lkd.core.random import seeded_generator
from lkd.core.tensor_files import random_state, set_random_state
from lkd.data.batches import Batches
from lkd.data.images import Batch
from lkd.losses.functions import widen
from lkd.losses.loss import DistillationLoss
from lkd.models.build import build_forward
from lkd.models.teacher import TeacherFunction
from lkd.training.optimizer import build_optimizer, build_scheduler, restore_optimizer
from lkd.training.throughput import StepClock

# ----------------------------------------------------------------------------------------------------------------------
# What a student is given that is not finite: a damaged image, a broken teacher.

NAMED = 5  # images in a message


class BrokenInputError(UserError):
    """An image or a teacher's answer that is not finite: no fault of the training."""


def sum_inputs(batch: Batch, teacher: Outputs | None) -> Tensor:
    """A scalar that is finite if and only if the batch and the teacher's answers are; asks no device to wait."""
    return torch.stack([tensor.sum() for tensor in name_inputs(batch, teacher).values()]).sum()


def name_inputs(batch: Batch, teacher: Outputs | None) -> dict[str, Tensor]:
    """What a student is given, by what it is called in messages."""
    inputs = {"pixels": batch.images}
    if teacher:
        inputs |= {"the teacher's logits": teacher.logits}
        inputs |= {f"the teacher's features {name}": tensor for name, tensor in teacher.features.items()}
    return inputs


def check_inputs(place: str, batch: Batch, teacher: Outputs | None, shared: bool = False) -> None:
    """Check that a batch and the teacher's answers to it are finite.

    Args:
        place: Where they are used, say `"step 12"`.
        batch: The batch.
        teacher: The answers, if the loss needs any.
        shared: Whether the processes that have met each have a part of the batch; all must ask then, and all raise.

    Raises:
        BrokenInputError: If not; names the images by their index in the data set.
    """
    inputs = name_inputs(batch, teacher)
    anywhere = any(len(find_broken(tensor)) for tensor in inputs.values())
    if not (any_process(anywhere, batch.images.device) if shared else anywhere):
        return
    for what, tensor in inputs.items():
        broken = find_broken(tensor)
        if len(broken):
            named = ", ".join(str(index) for index in batch.index[broken][:NAMED].tolist())
            more = ", ..." if len(broken) > NAMED else ""
            raise BrokenInputError(
                f"{place}: {what} of {len(broken)} of {len(tensor)} images are not finite (images {named}{more}); "
                "check the data and the teacher, and go on with --resume auto"
            )
    raise BrokenInputError(f"{place}: what another process was given is not finite; its message says more")


def find_broken(tensor: Tensor) -> Tensor:
    """Positions of the rows that are not finite, [B, ...] → [N]."""
    return (~torch.isfinite(tensor).flatten(1).all(1)).nonzero().flatten()


# ----------------------------------------------------------------------------------------------------------------------
# A student and its loss as one computation: its precision, its parts, and the processes that share it.


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
        loss: DistillationLoss,
        autocast: Callable[[], torch.autocast],
        recipe: TrainRecipe,
        clock: StepClock,
    ) -> None:
        super().__init__()
        self.student = student
        self.loss = loss
        self.autocast = autocast
        self.clock = clock
        self.run_student = build_forward(student, recipe.compile, recipe.channels_last)
        self.reads_features = bool(loss.teacher_stages)

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
    if size % recipe.accumulation:
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
    """The moving average of the student's weights, if one is asked for."""
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
    if computation.loss.needs_index:
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


# ----------------------------------------------------------------------------------------------------------------------
# One student's training, a step at a time: what distillation, the pool and every comparison share.

Watch = Callable[[tuple[Batch, Any, float]], None]  # batch, the teacher's outputs or None, progress


class DivergedError(UserError):
    """The loss of a training is not finite."""


class Training:
    """A student, its loss, and everything that goes on from step to step.

    Args:
        student: The network, returning `Outputs`; put into train mode.
        loss: `loss(student, teacher, target, progress) -> terms`; its trainable parameters, if any, are trained along.
        teacher: From a batch to the teacher's outputs; None where the loss needs no teacher.
        batches: The batch of every step.
        recipe: Epochs, learning rate, schedule.
        balance: What weighs the loss's terms; None where the loss is their sum.

    Attributes:
        clock: What the parts of the steps took.

    Raises:
        UserError: If a setting is impossible or the schedule is unknown.
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
        self.student = student.train()
        if loss.needs_index:
            loss.enroll(batches.images.index, batches.images.labels)
        self.recipe = recipe
        self.loss = loss.to(batches.device)
        self.balance = balance
        check_balance(balance, recipe, batches)
        self.teacher = loss.own_teacher or teacher
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
        self.accumulation = check_accumulation(recipe, batches)
        self.average = build_average(student, recipe)
        self.clock = StepClock(batches.device)
        computation = StudentLoss(student, self.loss, self.autocast, recipe, self.clock)
        self.computation = share_gradients(computation, recipe, batches)

    @property
    def progress(self) -> float:
        """How far the training is, in [0, 1]."""
        return self.step / self.total_steps

    @property
    def result(self) -> nn.Module:
        """The network to evaluate and save: the student, or the moving average of its weights."""
        return self.average.module if self.average else self.student

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return self.optimizer.param_groups[0]["lr"]

    def run_step(self, watch: Watch | None = None) -> dict[str, Tensor]:
        """Do one step of SGD.

        Args:
            watch: Told the batch, the teacher's outputs and the progress before the student sees the batch.

        Returns:
            The loss's terms, detached.

        Raises:
            DivergedError: If a term is not finite.
            UserError: If what the student is given is not finite, or there is no memory left.
        """
        epoch, place = divmod(self.step, self.batches.steps_per_epoch)
        if not place:
            self.loss.begin_epoch(epoch, self.student, self.batches.images, self.teacher, self.progress)
        self.clock.start()
        batch = self.batches.at(self.step)
        if self.recipe.channels_last:
            batch = batch._replace(images=batch.images.contiguous(memory_format=torch.channels_last))
        self.clock.lap("data")
        with self.autocast():
            teacher = self.teacher(batch) if self.teacher else None
        teacher = widen_outputs(keep_stages(teacher, self.loss.teacher_stages)) if teacher else None
        self.clock.lap("teacher")
        if watch:
            watch((batch, teacher, self.progress))
        self.optimizer.zero_grad()
        rows = []
        for number in range(self.accumulation):
            size = len(batch.target) // self.accumulation
            part = slice(number * size, (number + 1) * size)
            last = number == self.accumulation - 1
            with nullcontext() if last else hold_gradients(self.computation):
                own = Batch(*(column[part] for column in batch))
                with explain_exhaustion(f"step {self.step}", FOR_TRAININGS):
                    rows.append(self.compute_gradients(own, cut(teacher, part), first=number == 0))
        self.optimizer.step()
        self.step += 1
        self.scheduler.step_update(self.step)
        if self.average:
            self.average.update(self.student)
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
        if any_process(broken, self.batches.device) if self.batches.part[1] > 1 else broken:  # else the others hang
            check_inputs(f"step {self.step}", batch, teacher, shared=self.batches.part[1] > 1)
            values = ", ".join(f"{name} = {value.item():g}" for name, value in terms.items())
            raise DivergedError(
                f"step {self.step}: the loss is not finite ({values}) at learning rate {self.learning_rate:g}; "
                "lower train.learning_rate"
            )
        (total / self.accumulation).backward()
        self.clock.lap("student")
        return {name: value.detach() for name, value in terms.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit-exactly; batches are a function of the step. All that share it must ask."""
        return {
            "step": self.step,
            "student": self.student.state_dict(),
            "average": self.average.module.state_dict() if self.average else {},
            "loss": self.loss.state_dict(),
            "balance": self.balance.state_dict() if self.balance else {},
            "optimizer": self.optimizer.state_dict(),
            "random": collect_random_states(self.batches),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.step = state["step"]
        self.student.load_state_dict(state["student"])
        if self.average:
            self.average.module.load_state_dict(state["average"])
        self.loss.load_state_dict(state["loss"])
        if self.balance:
            self.balance.load_state_dict(state["balance"])
        restore_optimizer(self.optimizer, state["optimizer"])
        restore_random_state(state["random"], self.step, self.batches)
        self.scheduler.step_update(self.step)
