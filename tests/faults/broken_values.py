"""Values that are not finite, and memory that is short, put into a process at a moment."""

import random
import threading
from collections.abc import Callable
from typing import Any

import torch

import lkd.meta_training.outer_loop
import lkd.meta_training.rollouts
import lkd.training.training
from lkd.data import Batches
from lkd.models.teacher import TabulatedTeacher, Teacher
from lkd.models.teacher_cache import CachedTeacher
from tests.faults.injections import Moment, add_byte, wrap


def spoil(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """A tensor with one entry that is not a number, or infinite."""
    spoiled = tensor.clone()
    chance = random.Random(seed)
    spoiled.view(-1)[chance.randrange(spoiled.numel())] = chance.choice([float("nan"), float("inf"), -float("inf")])
    return spoiled


def spoil_batch(moment: Moment, in_rollouts: bool) -> None:
    """One pixel of a batch is not finite."""
    count, active = moment.counter(), watch_rollouts(moment, in_rollouts)

    def build(original: Callable[..., Any]) -> Callable[..., Any]:
        def at(batches: Batches, step: int) -> Any:
            batch = original(batches, step)
            return batch._replace(images=spoil(batch.images, moment.seed)) if active() and count() else batch

        return at

    wrap(Batches, "at", build)


def spoil_teacher(moment: Moment, in_rollouts: bool) -> None:
    """One of the teacher's logits is not finite."""
    count, active = moment.counter(), watch_rollouts(moment, in_rollouts)

    def build(original: Callable[..., Any]) -> Callable[..., Any]:
        def answer(teacher: Any, batch: Any) -> Any:
            outputs = original(teacher, batch)
            return outputs._replace(logits=spoil(outputs.logits, moment.seed)) if active() and count() else outputs

        return answer

    for kind in (Teacher, TabulatedTeacher, CachedTeacher):
        wrap(kind, "__call__", build)


def spoil_hypergradient(moment: Moment, factor: float) -> None:
    """A hypergradient is multiplied by a number, say NaN."""
    count = moment.counter()

    def build(original: Callable[..., Any]) -> Callable[..., Any]:
        def differentiate(*arguments: Any) -> Any:
            found = original(*arguments)
            if not count():
                return found
            grads = {name: factor * gradient for name, gradient in found.grads.items()}
            return found._replace(grads=grads, norm=factor * found.norm)

        return differentiate

    wrap(lkd.meta_training.outer_loop.OuterLoop, "differentiate_pool_student", build)


def exhaust_memory(moment: Moment, in_rollouts: bool) -> None:
    """A step of a student finds no memory left."""
    count, active = moment.counter(), watch_rollouts(moment, in_rollouts)

    def build(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if active() and count():
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return original(*arguments, **options)

        return call

    if in_rollouts:
        wrap(lkd.meta_training.rollouts, "call_module", build)
    else:
        wrap(lkd.training.training.Training, "compute_gradients", build)


def watch_rollouts(moment: Moment, wanted: bool) -> Callable[[], bool]:
    """A function that says whether a rollout is under way; always yes if that is not wanted.

    The file `hypergradients` beside the record gets a byte for every rollout up to that of the fault.
    """
    if not wanted:
        return lambda: True
    inside = threading.Event()

    def build(original: Callable[..., Any]) -> Callable[..., Any]:
        def differentiate(*arguments: Any) -> Any:
            inside.set()
            if not moment.fired.exists():
                add_byte(moment.record.with_name("hypergradients"))
            try:
                return original(*arguments)
            finally:
                inside.clear()

        return differentiate

    wrap(lkd.meta_training.outer_loop.OuterLoop, "differentiate_pool_student", build)
    return inside.is_set
