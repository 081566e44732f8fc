"""One student's training, a step at a time: what distillation, the pool and every comparison share."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lkd.acceleration import lay_out
from lkd.assembly import read_teacher_stages
from lkd.balance.balancing import Balancing
from lkd.broken_inputs import check_inputs, sum_inputs
from lkd.computation import (
    StudentLoss,
    build_average,
    check_accumulation,
    check_balance,
    collect_random_states,
    cut,
    hold_gradients,
    is_bfloat16,
    keep_stages,
    restore_random_state,
    share_gradients,
    widen_outputs,
)
from lkd.config import TrainRecipe
from lkd.data import Batch, Batches
from lkd.errors import UserError
from lkd.memory import FOR_TRAININGS, explain_exhaustion
from lkd.optimization import build_optimizer, build_scheduler, restore_optimizer
from lkd.outputs import Outputs
from lkd.processes import any_process
from lkd.teacher import TeacherFunction
from lkd.throughput import StepClock

Watch = Callable[[tuple[Batch, Any, float]], None]  # batch, the teacher's outputs or None, progress


class DivergedError(UserError):
    """The loss of a training is not finite."""


class Training:
    """A student, its loss, and everything that goes on from step to step.

    Args:
        student: The network, returning `Outputs`; put into train mode.
        loss: `loss(student, teacher, target, progress) -> terms`; its trainable parameters, if any, are trained along.
            One that must know which image is which sets `needs_index`: then `loss.enroll(index, labels)` is told all
            training images once, and each call is given the batch's `index`. One that has `begin_epoch(epoch, student,
            images, teacher, progress)` is called with the student as it is before the first step of every epoch. One
            that has an `own_teacher` has it asked in the place of `teacher`.
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
        loss: nn.Module,
        teacher: TeacherFunction | None,
        batches: Batches,
        recipe: TrainRecipe,
        balance: Balancing | None = None,
    ) -> None:
        self.student = student.train()
        self.needs_index = bool(getattr(loss, "needs_index", False))
        if self.needs_index:
            enroll: Any = loss.enroll
            enroll(batches.images.index, batches.images.labels)
        self.begin_epoch: Callable[..., None] | None = getattr(loss, "begin_epoch", None)
        self.recipe = recipe
        self.loss = loss.to(batches.device)
        self.balance = balance
        check_balance(balance, recipe, batches)
        self.teacher = getattr(loss, "own_teacher", None) or teacher
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
        if self.begin_epoch and not place:
            self.begin_epoch(epoch, self.student, self.batches.images, self.teacher, self.progress)
        self.clock.start()
        batch = self.batches.at(self.step)
        batch = batch._replace(images=lay_out(batch.images, self.recipe))
        self.clock.lap("data")
        with self.autocast():
            teacher = self.teacher(batch) if self.teacher else None
        teacher = widen_outputs(keep_stages(teacher, read_teacher_stages(self.loss))) if teacher else None
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
        identity = {"index": batch.index} if self.needs_index else {}
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
