"""Faults, put into a process before it runs a command.

A fault that has a moment comes at the n-th call of some function, counted in one process; `Moment` says which.
"""

import errno
import functools
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

import lkd.core.distributed
import lkd.export.cache
import lkd.meta_training.outer_loop
import lkd.meta_training.rollouts
import lkd.tracking.tracker
import lkd.training.training
from lkd.data.image_files import FileSource
from tests.faults.processes import FORK
from tests.faults.wandb_server import StandIn


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


def wrap(owner: Any, name: str, build: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put a function in another's place."""
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(build(original)))


def count_steps(student: Path, outer: Path) -> None:
    """Have every step of a training add a byte to one file, every outer step one to another, as they begin."""

    def counting(path: Path, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            add_byte(path)
            return original(*arguments, **options)

        return call

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

    def build(original: Callable[..., Any]) -> Callable[..., Any]:
        def write(path: Path, content: Any, **options: Any) -> Any:
            if count():
                full.set()
            if full.is_set():
                original(path, content[: len(content) // 2], **options)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return original(path, content, **options)

        return write

    wrap(Path, "write_bytes", build)
    wrap(Path, "write_text", build)


def damage_file(moment: Moment, flip: bool) -> None:
    """A file of tensors or a result arrives truncated, or with flipped bits, and the machine dies."""
    count = moment.counter()

    def build(original: Callable[..., Any]) -> Callable[..., Any]:
        def replace(path: Path, target: Path) -> Any:
            checked = str(target).endswith((".safetensors", ".json")) and "config" not in str(target)
            if not (checked and count()):
                return original(path, target)
            damage(path, flip, random.Random(moment.seed))
            original(path, target)
            moment.record.with_name("damaged").write_text(str(target))
            return os.kill(os.getpid(), signal.SIGKILL)

        return replace

    wrap(Path, "replace", build)


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
    fail_read(moment, lambda: fail(MemoryError()))


def hang_decoder(moment: Moment) -> None:
    """A read never returns, as on a network file system that is gone."""
    fail_read(moment, lambda: threading.Event().wait())


def fail(error: BaseException) -> None:
    raise error


def fail_read(moment: Moment, act: Callable[[], Any]) -> None:
    count = moment.counter()

    def build(original: Callable[..., Any]) -> Callable[..., Any]:
        def load(source: FileSource, position: int) -> Any:
            if count():
                act()
            return original(source, position)

        return load

    wrap(FileSource, "load", build)


def lose_wandb(moment: Moment) -> None:
    """The server that a run sends its metrics to is killed; the run waits three seconds for it at its end."""
    receiving, sending = multiprocessing.Pipe(duplex=False)
    server = FORK.Process(target=serve, args=(sending,), daemon=True)  # it ends with the run
    server.start()
    os.environ |= {"WANDB_BASE_URL": receiving.recv(), "WANDB_API_KEY": "a" * 40, "WANDB_SILENT": "true"}
    lkd.tracking.tracker.FINISH_TIMEOUT = 3
    count = moment.counter()

    def build(original: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(*arguments: Any) -> None:
            if count():
                server.kill()
                server.join()
            original(*arguments)

        return attempt

    wrap(lkd.tracking.tracker.Service, "attempt", build)


def serve(sending: Connection) -> None:
    """Be W&B's server, and say where."""
    sending.send(StandIn().address)
    threading.Event().wait()
