"""The processes of one torchrun job: who they are, and what they tell each other. Alone, all of it does nothing."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lkd.core.errors import UserError, first_line

try:
    from torch.distributed import set_timeout
except ImportError:  # its name in earlier versions of torch
    from torch.distributed.distributed_c10d import _set_pg_timeout as set_timeout

MEETING = timedelta(minutes=5)  # within which all processes of a job are there
TIMEOUT = timedelta(minutes=30)  # afterwards: the main process writes while others wait
PATIENCE = timedelta(days=7)  # where each has work of its own; torchrun ends a job whose processes end
patient: Any = None  # the group that waits so long, from the meeting until it is taken down
LOST = ("gloo", "NCCL", "closed by peer", "reset by peer")  # in what torch says; gloo's errors are plain RuntimeErrors


class Job(NamedTuple):
    """What torchrun says of this process."""

    rank: int  # over all hosts; 0 is the main process, which alone writes
    size: int
    local_rank: int  # on this host: the GPU that it takes


def read_job() -> Job:
    """Read the environment that torchrun sets; without it this process is alone."""
    return Job(
        *(int(os.environ.get(name, alone)) for name, alone in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    )


@contextmanager
def join_processes(device: torch.device) -> Iterator[None]:
    """Meet the other processes of the job, if there are any: by NCCL on GPUs, else by gloo.

    After an error NCCL's communicators are left standing: to take them down is to wait for the others, which may wait
    for this process. Whoever reports the error then ends the process at once (`lkd.cli.main`).
    """
    global patient
    if read_job().size == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    own_gpu = device if device.type == "cuda" else None  # told of it, NCCL says here what is wrong with it
    try:
        dist.init_process_group("nccl" if own_gpu else "gloo", timeout=MEETING, device_id=own_gpu)
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:  # the latter: torchrun's other variables are not there
        raise UserError(
            f"torchrun: process {read_job().rank} has lost another process of the job, or not met it within "
            f"{MEETING.total_seconds() / 60:g} minutes ({first_line(error)[:200]}); start again, with --resume auto"
        ) from error
    set_timeout(TIMEOUT)
    rank = own_rank()
    try:
        yield
    except BaseException as error:
        if not own_gpu:
            take_down()
        is_lost = isinstance(error, dist.DistError) or any(word in str(error) for word in LOST)
        if isinstance(error, RuntimeError) and is_lost:
            raise UserError(
                f"torchrun: process {rank} has lost another process of the job ({first_line(error)[:200]}); go on with "
                "--resume auto"
            ) from error
        raise
    take_down()


def take_down() -> None:
    """Take leave of the others."""
    global patient
    patient = None
    dist.destroy_process_group()


def place_of(device: torch.device) -> torch.device:
    """This process's own GPU where the device is `cuda` without a number."""
    job = read_job()
    if device.type != "cuda" or device.index is not None or job.size == 1:
        return device
    if job.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"torchrun: process {job.local_rank} of this host has no GPU, there are {torch.cuda.device_count()}; "
            "lower --nproc_per_node"
        )
    return torch.device("cuda", job.local_rank)


def count_processes() -> int:
    """Processes that have met."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_rank() -> int:
    """The number of this process among those that have met."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return own_rank() == 0


def any_process(flag: bool | Tensor, device: torch.device) -> bool:
    """Whether any process says yes; all must ask. A tensor is asked on its device, where nobody waits for it before."""
    if count_processes() == 1:
        return bool(flag)
    flags = torch.as_tensor(flag, device=device).int().reshape(1)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags.item())


def wait_for_all() -> None:
    """Go on when every process has come here: what the main process wrote before is there for all."""
    if count_processes() > 1:
        dist.barrier()


def wait_for_slowest() -> None:
    """Go on when every process has come here, however long its own work takes."""
    if count_processes() > 1:
        dist.barrier(patient)


def share_out(count: int, name: str) -> range:
    """This process's share of so many numbered things: as many as every other process has."""
    processes = count_processes()
    if count % processes:
        raise UserError(f"{name}: {count} do not divide among {processes} processes; take a multiple of {processes}")
    return range(own_rank() * count // processes, (own_rank() + 1) * count // processes)


def gather_rows(rows: Tensor) -> Tensor:
    """All processes' rows, one process's after another's; they may bring different numbers of them."""
    if count_processes() == 1:
        return rows
    own = torch.tensor([len(rows)], device=rows.device)
    sizes = [torch.empty_like(own) for _ in range(count_processes())]
    dist.all_gather(sizes, own)
    longest = max(int(size) for size in sizes)
    padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])


def gather_objects(item: Any) -> list[Any]:
    """Every process's item, by rank."""
    items = [item] * count_processes()
    if len(items) > 1:
        dist.all_gather_object(items, item)
    return items


def share_from_main(item: Any) -> Any:
    """The main process's item, whatever the others give."""
    items = [item]
    if count_processes() > 1:
        dist.broadcast_object_list(items, src=0)
    return items[0]


def copy_buffers_from_main(module: torch.nn.Module) -> None:
    """Give a module the main process's buffers: the running statistics of BatchNorm differ from process to process."""
    if count_processes() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)
