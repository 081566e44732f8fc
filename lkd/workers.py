"""Processes that train side by side."""

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

from tqdm import tqdm

from lkd.interrupt import Interrupted, deferred_interrupts


@contextmanager
def start_workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """Start worker processes; 0 means one for every CPU core. Unfinished work is dropped on leaving by an exception."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = count or cores
    executor = ProcessPoolExecutor(
        count, mp_context=get_context("spawn"), initializer=prepare_worker, initargs=(max(1, cores // count),)
    )
    try:
        yield executor
    except BaseException:
        processes = list((executor._processes or {}).values())
        executor.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        raise
    executor.shutdown()


def prepare_worker(threads: int) -> None:
    """Leave Ctrl-C to the parent, and share the cores."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    torch.set_num_threads(threads)


def finish_all(futures: "dict[Future[Any], str]", describe: Callable[[str, Any], str | None], title: str) -> None:
    """Wait for work, with a progress bar; say a line about a result where `describe` gives one.

    Raises:
        Interrupted: On Ctrl-C or SIGTERM.
    """
    with deferred_interrupts() as stop, tqdm(total=len(futures), desc=title, unit="job", disable=None) as bar:
        pending = set(futures)
        while pending:
            finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in finished:
                line = describe(futures[future], future.result())
                bar.update()
                if line:
                    tqdm.write(line)
            if stop and pending:
                done = len(futures) - len(pending)
                raise Interrupted(f"{done} of {len(futures)} jobs are finished and kept")
