"""Batches that threads decode ahead of their use.

Threads, not processes: decoding and scaling leave Python alone, and nothing has to be copied between processes.
"""

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from concurrent.futures import Future
from functools import cache
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor

from lkd.core.errors import UserError
from lkd.data.image_files import DamagedImageError, ImageFiles

AT_EXIT = 2.0  # seconds that threads have to finish what they are at when the process ends
CHUNK = 8  # images that a thread takes at a time; fewer where a batch would leave threads idle
AHEAD = 2  # batches that are decoded before they are asked for
GO_ON = "go on with --resume auto"

T = TypeVar("T")
Cut = Callable[[Tensor, int], Tensor]
"""From an image [3, H, W] and its place in the epoch's order to a crop [3, size, size]."""
Task = tuple["Future[Any]", Callable[..., Any], tuple[Any, ...]]


class Decoders:
    """Daemon threads that take tasks in order.

    `ThreadPoolExecutor` waits for its threads when the process ends; a read that never returns would keep it for ever.
    """

    def __init__(self, count: int) -> None:
        self.tasks: SimpleQueue[Task | None] = SimpleQueue()
        self.threads = [threading.Thread(target=self.work, name=f"lkd-decoder_{n}", daemon=True) for n in range(count)]
        for thread in self.threads:
            thread.start()
        atexit.register(self.stop)

    def submit(self, function: Callable[..., T], *arguments: Any) -> "Future[T]":
        future: Future[T] = Future()
        self.tasks.put((future, function, arguments))
        return future

    def map(self, function: Callable[..., T], items: Iterable[Any]) -> Iterator[T]:
        """The function's values, in the order of the items; all of them are begun at once."""
        futures = [self.submit(function, item) for item in items]
        return (future.result() for future in futures)

    def work(self) -> None:
        """Do tasks until there is none to come."""
        torch.set_num_threads(1)
        while (task := self.tasks.get()) is not None:
            future, function, arguments = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)
            del task, future, function, arguments  # else the last batch stays in memory

    def stop(self) -> None:
        """Let the threads end: one in the middle of torch's code must not when Python is gone."""
        for _ in self.threads:
            self.tasks.put(None)
        end = time.monotonic() + AT_EXIT
        for thread in self.threads:
            thread.join(max(0.0, end - time.monotonic()))


@cache
def start_threads(count: int, process: int) -> Decoders:
    """The threads of a process that decode, started once; those of its parent are none of a fork's."""
    torch.get_num_threads()  # else this thread would take over the decoders' number
    return Decoders(count)


class Loading:
    """A batch that threads are decoding.

    Args:
        files: The images, in the order of the epoch.
        slots: Which of them, by their place in that order, int64, [B].
        cut: What is cut out of each.
        replace: Put the next image of the order that can be decoded in a damaged one's place; else leave it out.
        pin: Put the batch where a GPU can fetch it on its own.
    """

    def __init__(self, files: ImageFiles, slots: Tensor, cut: Cut, replace: bool, pin: bool) -> None:
        self.files, self.cut, self.replace, self.slots = files, cut, replace, slots.tolist()
        self.pixels = torch.empty(len(slots), files.size, files.size, 3, dtype=torch.uint8, pin_memory=pin)
        self.reading: set[int] = set()
        rows = range(len(slots))
        pool = start_threads(files.loading.workers, os.getpid())
        chunk = max(1, min(CHUNK, len(slots) // files.loading.workers))
        self.tasks = [pool.submit(self.fill, rows[first : first + chunk]) for first in rows[::chunk]]

    def fill(self, rows: Iterable[int]) -> None:
        """Decode some rows; the slot of a row that is left out becomes -1."""
        failures: list[tuple[str, str]] = []
        seen = 0
        count = len(self.files.positions)
        for row in rows:
            first, self.slots[row] = self.slots[row], -1
            for more in range(count if self.replace else 1):
                slot, seen = (first + more) % count, seen + 1
                try:
                    self.pixels[row] = self.cut(self.read(slot), slot).permute(1, 2, 0)
                    self.slots[row] = slot
                    break
                except DamagedImageError as error:
                    failures.append((self.files.name(slot), str(error)))
            else:
                if self.replace:
                    raise UserError(f"data: no image can be decoded ({failures[0][1]}, ...)")
        self.files.damage.record(seen, failures)

    def read(self, slot: int) -> Tensor:
        """Decode an image; while it is read it is in `reading`."""
        self.reading.add(slot)
        try:
            return self.files.load(slot)
        except MemoryError as error:
            raise UserError(f"data: {self.files.name(slot)}: no memory left to decode it; {GO_ON}") from error
        finally:
            self.reading.discard(slot)

    def wait(self) -> tuple[Tensor, Tensor, float]:
        """Wait until it is there.

        Returns:
            Pixels, uint8, [B, 3, size, size], in memory as [B, size, size, 3]; the slots that they are of, [B], damaged
            ones replaced or left out; seconds waited.
        """
        started = time.perf_counter()
        try:
            for task in self.tasks:
                task.result(self.files.loading.read_timeout or None)
        except futures.TimeoutError as error:
            names = ", ".join(self.files.name(slot) for slot in sorted(self.reading)[:3])
            limit = f"data.read_timeout: no image was read for {self.files.loading.read_timeout:g} s"
            raise UserError(
                f"{limit} ({names or 'others before it'}); is the disk or the network file system there? {GO_ON}"
            ) from error
        waited = time.perf_counter() - started
        slots = torch.tensor(self.slots, dtype=torch.int64)
        pixels = self.pixels if bool((slots >= 0).all()) else self.pixels[slots >= 0]
        return pixels.permute(0, 3, 1, 2), slots[slots >= 0], waited

    def cancel(self) -> None:
        for task in self.tasks:
            task.cancel()


class Prefetcher:
    """Starts the batches of the next steps while one is used.

    Args:
        start: Starts a step's batch.
        steps: How many steps there are; None if they have no end.
    """

    def __init__(self, start: Callable[[int], Loading], steps: int | None = None) -> None:
        self.start, self.steps = start, sys.maxsize if steps is None else steps
        self.pending: dict[int, Loading] = {}

    def take(self, step: int) -> Loading:
        """The batch of a step, and the next ones started; steps in order cost no waiting."""
        wanted = range(step, max(step, min(step + AHEAD, self.steps - 1)) + 1)
        for dropped in self.pending.keys() - set(wanted):
            self.pending.pop(dropped).cancel()
        self.pending = {s: self.pending.get(s) or self.start(s) for s in wanted}
        return self.pending.pop(step)

    def __iter__(self) -> Iterator[Loading]:
        return map(self.take, range(self.steps))
