"""`lkd` commands in processes of their own, forked from one that has imported the package: they start at once."""

import multiprocessing
import os
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(["lkd.commands"])


def start_command(words: list[str], output: Path, rank: int = 0, size: int = 1, port: int = 0) -> BaseProcess:
    """Start a command, alone or as a process of a job, as torchrun would.

    Args:
        words: The command line.
        output: Gets what it prints.
        rank: Its number.
        size: Processes of the job.
        port: Where they meet.
    """
    environment = {"OMP_NUM_THREADS": "1"}
    if size > 1:
        job = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        environment |= {name: str(value) for name, value in job.items()}
    process = FORK_SERVER.Process(target=run_command, args=(words, output, environment))
    process.start()
    return process


def run_command(words: list[str], output: Path, environment: dict[str, str]) -> None:
    """Run a command in this process, and leave with its exit code."""
    import torch

    from lkd.cli import main

    os.environ.update(environment)
    torch.set_num_threads(1)
    with output.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.exit(main(words))
