"""Processes that train side by side."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm

from lkd.errors import UserError
from lkd.interrupt import Interrupted, deferred_interrupts

END = 10.0  # seconds that terminated workers have to end
worker_number = 0  # of this process, set where a worker starts


@contextmanager
def start_workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """Start worker processes; 0 means one for every CPU core. Unfinished work is dropped on leaving by an exception."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = count or cores
    spawn = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(
        count, spawn, initializer=prepare_worker, initargs=(max(1, cores // count), spawn.Value("i", 0))
    )
    try:
        yield executor
    except BaseException:
        processes = list((executor._processes or {}).values())
        manager: Any = executor._executor_manager_thread
        with suppress(OSError):  # a pool whose worker was killed is closing its pipes at this moment
            executor.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        if manager:
            manager.join(END)  # else it races with the end of this process for the same pipes
        raise
    executor.shutdown()


def prepare_worker(threads: int, counter: Any) -> None:
    """Leave Ctrl-C to the parent, go when it goes, share the cores, take a number."""
    global worker_number
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=leave_with_parent, daemon=True).start()
    with counter.get_lock():
        worker_number = counter.value
        counter.value += 1
    import torch

    torch.set_num_threads(threads)


def leave_with_parent() -> None:
    """End this process when its parent is gone: a killed parent cannot tell its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def assign_device(device: str, worker: int, gpus: int) -> str:
    """The device of a worker: `cuda` without a number means that workers take turns on the machine's GPUs."""
    return f"cuda:{worker % gpus}" if device == "cuda" and gpus else device


def own_device(device: str) -> str:
    """The device of this process."""
    import torch

    return assign_device(device, worker_number, torch.cuda.device_count() if device == "cuda" else 0)


def finish_all(futures: "dict[Future[Any], str]", describe: Callable[[str, Any], str | None], title: str) -> None:
    """Wait for work, with a progress bar; say a line about a result where `describe` gives one.

    Raises:
        Interrupted: On Ctrl-C or SIGTERM.
        UserError: If a worker died.
    """
    with deferred_interrupts() as stop, tqdm(total=len(futures), desc=title, unit="job", disable=None) as bar:
        pending, done = set(futures), 0
        while pending:
            finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in finished:
                try:
                    line = describe(futures[future], future.result())
                except BrokenProcessPool as error:
                    if stop:  # the signal went to the workers too, as a batch system's does
                        raise interrupted(done, len(futures)) from error
                    raise UserError(
                        "workers: a worker process was killed (out of memory?); finished work is kept: go on with "
                        "--resume auto, with fewer --workers if memory was short"
                    ) from error
                done += 1
                bar.update()
                if line:
                    tqdm.write(line)
            if stop and pending:
                raise interrupted(done, len(futures))


def interrupted(done: int, jobs: int) -> Interrupted:
    """What to raise where work was stopped."""
    return Interrupted(f"{done} of {jobs} jobs are finished and kept")
