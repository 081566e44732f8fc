"""Threads that decode images, and do not keep the process from ending when one of them hangs."""

import atexit
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import cache
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

AT_EXIT = 2.0  # seconds that threads have to finish what they are at when the process ends

T = TypeVar("T")
Task = tuple["Future[Any]", Callable[..., Any], tuple[Any, ...]]


class Decoders:
    """Daemon threads that take tasks in order.

    `ThreadPoolExecutor` waits for its threads when the process ends; a read that never returns would keep it for ever.

    Args:
        count: Threads.
    """

    def __init__(self, count: int) -> None:
        self.tasks: SimpleQueue[Task | None] = SimpleQueue()
        self.threads = [
            threading.Thread(target=self.work, name=f"lkd-decoder_{number}", daemon=True) for number in range(count)
        ]
        for thread in self.threads:
            thread.start()
        atexit.register(self.stop)

    def submit(self, function: Callable[..., T], *arguments: Any) -> "Future[T]":
        """Have a thread call a function."""
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


def start_threads(count: int) -> Decoders:
    """The threads of this process that decode, started once; torch's own threads stay out of them."""
    return start_threads_of(os.getpid(), count)


@cache
def start_threads_of(process: int, count: int) -> Decoders:
    """The threads of a process: those of its parent are none of a fork's."""
    torch.get_num_threads()  # else this thread would take over the decoders' number
    return Decoders(count)
