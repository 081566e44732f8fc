"""Processes that train side by side, and who does which piece of work."""

import json
import math
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lkd.core.errors import UserError
from lkd.core.files import create_json
from lkd.core.interrupt import Interrupted, deferred_interrupts
from lkd.core.plugins import import_plugins

# ----------------------------------------------------------------------------------------------------------------------
# Leases: who does which piece of work, among processes and hosts that share a folder. The lease of a result is a file
# beside it, `RESULT.lease.N`, which only comes to be where there is none, so that one process only gets it; it names
# host, process and time. Its owner renews the file's time while it works. A lease is stale if its owner was a process
# of this host that is no longer there, or if its time has not changed while an observer watched for `STALE_AFTER`
# seconds (on the observer's own clock: clocks of hosts need not agree). A stale lease N is taken over by making lease
# N + 1, never by removing N: of two that try, one gets it. An owner that was suspended for longer than that and comes
# back does its work a second time; results are written atomically and are a function of the work, so that nothing else
# is harmed.

RENEW_EVERY = 10.0
STALE_AFTER = 60.0


class LeaseWatch:
    """An observer of leases; it remembers when it saw a lease's time change.

    Args:
        stale_after: Seconds without renewal after which a lease is stale.
    """

    def __init__(self, stale_after: float = STALE_AFTER) -> None:
        self.stale_after = stale_after
        self.seen: dict[Path, tuple[int, float]] = {}

    def find_free(self, result: Path) -> Path | None:
        """The lease file that would win this result's work; None while someone else is at it."""
        number = max((int(path.suffix[1:]) for path in result.parent.glob(f"{result.name}.lease.*")), default=-1)
        free = number < 0 or self.is_stale(lease_path(result, number))
        return lease_path(result, number + 1) if free else None

    def is_stale(self, lease: Path) -> bool:
        """Whether the owner is gone."""
        try:
            changed = lease.stat().st_mtime_ns
            owner = json.loads(lease.read_text())
        except (OSError, ValueError):  # released just now; or empty yet, on a disk without links
            changed, owner = 0, {}
        if owner.get("host") == host_name() and not process_exists(owner["pid"]):
            return True
        now = time.monotonic()
        if self.seen.get(lease, (None, now))[0] != changed:
            self.seen[lease] = (changed, now)
        return now - self.seen[lease][1] > self.stale_after


def lease_path(result: Path, number: int) -> Path:
    """A lease's file."""
    return result.with_name(f"{result.name}.lease.{number}")


def host_name() -> str:
    """This host, and on Linux its start and process namespace: hosts and containers may share a name, not processes."""
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {start} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def process_exists(pid: int) -> bool:
    """Whether a process of this host is there."""
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True


@contextmanager
def hold_lease(result: Path, lease: Path, renew_every: float = RENEW_EVERY) -> Iterator[bool]:
    """Hold a lease within the block; True if the work is ours to do.

    Args:
        result: The file that the work will write.
        lease: What `LeaseWatch.find_free` gave.
        renew_every: Seconds between renewals.
    """
    if not create_json(lease, {"host": host_name(), "pid": os.getpid(), "time": time.time()}):
        yield False
        return
    over = threading.Event()

    def renew() -> None:
        while not over.wait(renew_every):
            with suppress(OSError):  # a disk of a network may fail once
                os.utime(lease)

    renewal = threading.Thread(target=renew, daemon=True)
    renewal.start()
    try:
        yield not result.exists()  # someone may have finished since we looked
    finally:
        over.set()
        renewal.join()
        if result.exists():
            for path in result.parent.glob(f"{result.name}.lease.*"):
                path.unlink(missing_ok=True)
        lease.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------------------
# Processes that train side by side. They are forks of one server process that has imported what a training needs, so
# that the imports happen once, and beside those of the main process. The server computes nothing: it has no threads
# and no CUDA that a fork would break.

END = 10.0  # seconds that terminated workers have to end
CONTEXT: Any = multiprocessing.get_context(
    "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
)
worker_number = 0  # of this process, set where a worker starts


def preload_workers(module: str) -> None:
    """Start the server that workers will be forks of, if there can be one, and let it import a module meanwhile."""
    if CONTEXT.get_start_method() == "forkserver":
        CONTEXT.set_forkserver_preload([module])
        multiprocessing.resource_tracker.ensure_running()  # first: it unblocks signals
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the server, and its forks, leave Ctrl-C to us
        try:
            multiprocessing.forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextmanager
def start_workers(
    count: int, device: Any = None, threads: int = 0, plugins: str | None = None
) -> Iterator[ProcessPoolExecutor]:
    """Start worker processes; unfinished work is dropped on leaving by an exception.

    Args:
        count: How many; 0 means one for every CPU core, or for every GPU; one for a GPU that is named.
        device: Where they will work: `cuda` without a number for all GPUs.
        threads: CPU threads of each; see `count_threads`.
        plugins: File of Python that each runs first.
    """
    count = count or count_gpus(str(device)) or (count_cores() if str(device) in ("cpu", "None") else 1)
    own = (count_threads(threads), CONTEXT.Value("i", 0), plugins)
    executor = ProcessPoolExecutor(count, CONTEXT, initializer=prepare_worker, initargs=own)
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


CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def count_cores() -> int:
    """CPU cores that this process may use: of the machine's, those it is bound to, and no more than it is granted."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([cores, *(max(1, math.ceil(quota)) for quota in read_quotas())])


def read_quotas() -> list[float]:
    """The CPU quotas of this process's control group and those above it, in cores: a container's, a batch job's."""
    with suppress(OSError, ValueError):
        groups = dict(line.split(":", 2)[1:] for line in OWN_CGROUP.read_text().splitlines())
        quotas = []
        for controllers, name in groups.items():
            second = not controllers  # version 2 of control groups has one hierarchy, without a name
            if second or "cpu" in controllers.split(","):
                root = CGROUPS if second else CGROUPS / "cpu"
                own = root / name.lstrip("/")
                for folder in (own, *own.parents):
                    quotas += [quota] if (quota := read_quota(folder, second)) else []
                    if folder == root:
                        break
        return quotas
    return []


def read_quota(folder: Path, second: bool) -> float | None:
    """The CPU quota of a control group, in cores; None if it has none."""
    with suppress(OSError, ValueError):
        if second:
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else None  # "max" is no number
    return None


def count_threads(threads: int) -> int:
    """CPU threads of a worker, by a recipe's `threads`: 0 is one.

    It decides digits, as sums are taken in another order. So it must not depend on how many workers there are.
    """
    return threads or 1


def prepare_worker(threads: int, counter: Any, plugins: str | None) -> None:
    """Leave Ctrl-C to the parent, go when it goes, take threads and a number, run the user's file."""
    global worker_number
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=leave_with_parent, daemon=True).start()
    with counter.get_lock():
        worker_number = counter.value
        counter.value += 1
    import torch

    torch.set_num_threads(threads)
    import_plugins(plugins)


def leave_with_parent() -> None:
    """End this process when its parent is gone: a killed parent cannot tell its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def count_gpus(device: str) -> int:
    """The GPUs that workers share on a device."""
    import torch

    return torch.cuda.device_count() if device == "cuda" else 0


def own_device(device: str) -> str:
    """The device of this process: `cuda` without a number means that workers take turns on the machine's GPUs."""
    gpus = count_gpus(device)
    return f"cuda:{worker_number % gpus}" if gpus else device


QUIET = 8.0  # seconds without a line


def finish_all(futures: "dict[Future[Any], str]", describe: Callable[[str, Any], str | None], title: str) -> None:
    """Wait for work, with a progress bar; say a line about a result where `describe` gives one.

    `describe` may put further work into `futures`. Where no terminal shows the bar, a line says every eight seconds how
    far it is.

    Raises:
        Interrupted: On Ctrl-C or SIGTERM.
        UserError: If a worker died.
    """
    with deferred_interrupts() as stop, tqdm(total=len(futures), desc=title, unit="job", disable=None) as bar:
        known, done, said = set(futures), 0, time.monotonic()
        pending = set(known)
        while pending:
            finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in finished:
                try:
                    line = describe(futures[future], future.result())
                except BrokenProcessPool as error:
                    if stop:  # the signal went to the workers too, as a batch system's does
                        raise Interrupted(f"{done} of {len(futures)} jobs are finished and kept") from error
                    raise UserError(
                        "workers: a worker process was killed (out of memory?); finished work is kept: go on with "
                        "--resume auto, with fewer --workers if memory was short"
                    ) from error
                done += 1
                bar.update()
                if line:
                    tqdm.write(line)
                    said = time.monotonic()
            pending |= futures.keys() - known
            known, bar.total = set(futures), len(futures)
            if bar.disable and time.monotonic() - said > QUIET:
                tqdm.write(f"{title}: {done} of {len(futures)} done")
                said = time.monotonic()
            if stop and pending:
                raise Interrupted(f"{done} of {len(futures)} jobs are finished and kept")
