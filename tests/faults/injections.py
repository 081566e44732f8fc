"""Faults, put into a process before it runs a command.

A fault that has a moment comes at the n-th call of some function, counted in one process; `Moment` says which.
"""

import errno
import functools
import math
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import lkd.core.distributed
import lkd.export.cache
import lkd.meta_training.meta_train
import lkd.meta_training.outer_loop
import lkd.meta_training.rollouts
import lkd.tracking.tracker
import lkd.training.training
from lkd.data import Batches
from lkd.data.image_files import FileSource
from lkd.models.teacher import TabulatedTeacher, Teacher
from lkd.models.teacher_cache import CachedTeacher
from tests.faults.wandb_server import StandIn
from tests.processes import FORK

Injection = Callable[[], None]
"""What is done to a process before it runs the command."""


@dataclass(frozen=True)
class Moment:
    """When a fault comes.

    Attributes:
        record: A file that gets a byte at every call, from all processes of a run.
        call: The call, counted from 1 in each process; 0 for never: then calls are only counted.
        fired: A file that is made when the fault comes, so that it comes in one process only.
        seed: Of what the fault draws.
    """

    record: Path
    call: int
    fired: Path
    seed: int = 0

    def counter(self) -> Callable[[], bool]:
        """A function that counts a call, and says whether the fault is to come now."""
        calls, lock = 0, threading.Lock()

        def count() -> bool:
            nonlocal calls
            add_byte(self.record)
            with lock:
                calls += 1
                return calls == self.call and claim(self.fired)

        return count


def add_byte(path: Path) -> None:
    handle = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY)
    os.write(handle, b".")
    os.close(handle)


def claim(path: Path) -> bool:
    """Make a file; whether it was not there."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Have a function go through another, which gets it and its arguments."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        return around(original, *arguments, **options)

    setattr(owner, name, wrapped)


def count_steps(student: Path, outer: Path) -> None:
    """Have every step of a training add a byte to one file, every outer step one to another, as they begin."""

    def counting(path: Path, original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        add_byte(path)
        return original(*arguments, **options)

    wrap(lkd.training.training.Training, "run_step", functools.partial(counting, student))
    wrap(lkd.meta_training.outer_loop.OuterLoop, "run_step", functools.partial(counting, outer))
    wrap(lkd.export.cache.OrderedBatches, "at", functools.partial(counting, student))
    lkd.meta_training.meta_train.measure_training_seconds = lambda *_: 1.0  # its steps are none of the training's


def meet_soon() -> None:
    """The processes of a job wait half a minute for each other, not five."""
    lkd.core.distributed.MEETING = timedelta(seconds=30)


def fill_disk(moment: Moment) -> None:
    """From the moment on no write of `lkd.core.files` succeeds: half of the content arrives, then the disk is full."""
    count, full = moment.counter(), threading.Event()

    def write(original: Callable[..., Any], path: Path, content: Any, **options: Any) -> Any:
        if count():
            full.set()
        if full.is_set():
            original(path, content[: len(content) // 2], **options)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return original(path, content, **options)

    wrap(Path, "write_bytes", write)
    wrap(Path, "write_text", write)


def damage_file(moment: Moment, flip: bool) -> None:
    """A file of tensors or a result arrives truncated, or with flipped bits, and the machine dies."""
    count = moment.counter()

    def replace(original: Callable[..., Any], path: Path, target: Path) -> Any:
        checked = str(target).endswith((".safetensors", ".json")) and "config" not in str(target)
        if not (checked and count()):
            return original(path, target)
        damage(path, flip, random.Random(moment.seed))
        original(path, target)
        moment.record.with_name("damaged").write_text(str(target))
        return os.kill(os.getpid(), signal.SIGKILL)

    wrap(Path, "replace", replace)


def damage(path: Path, flip: bool, chance: random.Random) -> None:
    """Truncate a file, or flip one to eight of its bits."""
    content = bytearray(path.read_bytes())
    if flip:
        for _ in range(chance.randint(1, 8)):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    else:
        content = content[: chance.randrange(len(content))]
    path.write_bytes(content)


def fail_decoder(moment: Moment) -> None:
    """A thread that decodes images runs out of memory."""

    def fail() -> None:
        raise MemoryError

    fail_read(moment, fail)


def hang_decoder(moment: Moment) -> None:
    """A read never returns, as on a network file system that is gone."""
    fail_read(moment, threading.Event().wait)


def fail_read(moment: Moment, act: Callable[[], Any]) -> None:
    count = moment.counter()

    def load(original: Callable[..., Any], source: FileSource, position: int) -> Any:
        if count():
            act()
        return original(source, position)

    wrap(FileSource, "load", load)


def lose_wandb(moment: Moment) -> None:
    """The server that a run sends its metrics to is killed; the run waits three seconds for it at its end."""
    receiving, sending = multiprocessing.Pipe(duplex=False)
    server = FORK.Process(target=serve, args=(sending,), daemon=True)  # it ends with the run
    server.start()
    os.environ |= {"WANDB_BASE_URL": receiving.recv(), "WANDB_API_KEY": "a" * 40, "WANDB_SILENT": "true"}
    lkd.tracking.tracker.FINISH_TIMEOUT = 3
    count = moment.counter()

    def attempt(original: Callable[..., Any], *arguments: Any) -> None:
        if count():
            server.kill()
            server.join()
        original(*arguments)

    wrap(lkd.tracking.tracker.Service, "attempt", attempt)


def serve(sending: Connection) -> None:
    """Be W&B's server, and say where."""
    sending.send(StandIn().address)
    threading.Event().wait()


# Values that are not finite, and memory that is short.


def spoil(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """A tensor with one entry that is not a number, or infinite."""
    spoiled = tensor.clone()
    chance = random.Random(seed)
    spoiled.view(-1)[chance.randrange(spoiled.numel())] = chance.choice([float("nan"), float("inf"), -float("inf")])
    return spoiled


def spoil_batch(moment: Moment, in_rollouts: bool) -> None:
    """One pixel of a batch is not finite."""
    count, active = moment.counter(), watch_rollouts(moment, in_rollouts)

    def at(original: Callable[..., Any], batches: Batches, step: int) -> Any:
        batch = original(batches, step)
        return batch._replace(images=spoil(batch.images, moment.seed)) if active() and count() else batch

    wrap(Batches, "at", at)


def spoil_teacher(moment: Moment, in_rollouts: bool) -> None:
    """One of the teacher's logits is not finite."""
    count, active = moment.counter(), watch_rollouts(moment, in_rollouts)

    def answer(original: Callable[..., Any], teacher: Any, batch: Any) -> Any:
        outputs = original(teacher, batch)
        return outputs._replace(logits=spoil(outputs.logits, moment.seed)) if active() and count() else outputs

    for kind in (Teacher, TabulatedTeacher, CachedTeacher):
        wrap(kind, "__call__", answer)


def spoil_hypergradient(moment: Moment) -> None:
    """A hypergradient is NaN."""
    count = moment.counter()

    def differentiate(original: Callable[..., Any], *arguments: Any) -> Any:
        found = original(*arguments)
        if not count():
            return found
        grads = {name: math.nan * gradient for name, gradient in found.grads.items()}
        return found._replace(grads=grads, norm=math.nan)

    wrap(lkd.meta_training.outer_loop.OuterLoop, "differentiate_pool_student", differentiate)


def exhaust_memory(moment: Moment, in_rollouts: bool) -> None:
    """A step of a student finds no memory left."""
    count, active = moment.counter(), watch_rollouts(moment, in_rollouts)

    def call(original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if active() and count():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(*arguments, **options)

    if in_rollouts:
        wrap(lkd.meta_training.rollouts, "call_module", call)
    else:
        wrap(lkd.training.training.Training, "compute_gradients", call)


def watch_rollouts(moment: Moment, wanted: bool) -> Callable[[], bool]:
    """A function that says whether a rollout is under way; always yes if that is not wanted.

    The file `hypergradients` beside the record gets a byte for every rollout up to that of the fault.
    """
    if not wanted:
        return lambda: True
    inside = threading.Event()

    def differentiate(original: Callable[..., Any], *arguments: Any) -> Any:
        inside.set()
        if not moment.fired.exists():
            add_byte(moment.record.with_name("hypergradients"))
        try:
            return original(*arguments)
        finally:
            inside.clear()

    wrap(lkd.meta_training.outer_loop.OuterLoop, "differentiate_pool_student", differentiate)
    return inside.is_set
