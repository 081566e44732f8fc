"""Runs as forks of this process, which has imported the package: they start at once."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from PIL import Image

import lkd.commands
import lkd.core.workers
import lkd.data.readers
import lkd.evaluation.comparison.compare
from lkd.cli import main
from lkd.config.parse import parse_recipe

FORK = multiprocessing.get_context("fork")
LONGEST = 900.0  # seconds after which a run is taken to hang

Injection = Callable[[], None]
"""What is done to a process before it runs the command."""


def start(words: list[str], output: Path, *injections: Injection, rank: int = 0, port: int = 0) -> BaseProcess:
    """Start a command.

    Args:
        words: The command line.
        output: Gets what it prints.
        injections: Called in the new process first.
        rank: Its number in a job of two processes.
        port: Where the two meet; 0 for a process on its own.
    """
    process = FORK.Process(target=run, args=(words, output, injections, rank, port))
    process.start()
    return process


def run(words: list[str], output: Path, injections: tuple[Injection, ...], rank: int, port: int) -> None:
    """Run a command in this process, and leave with its exit code."""
    os.setpgid(0, 0)
    if port:
        job = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in job.items()})
    with output.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    lkd.core.workers.CONTEXT = FORK  # forks need not import everything anew
    for injection in injections:
        injection()
    code = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def finish(process: BaseProcess, seconds: float = LONGEST) -> int | None:
    """Wait for a run's end; its exit code, None if it hangs, in which case it and its workers are killed."""
    process.join(seconds)
    if process.exitcode is None:
        kill_group(process)
        process.join()
        return None
    return process.exitcode


def kill_group(process: BaseProcess) -> None:
    """Kill a run and its workers."""
    os.killpg(int(process.pid or 0), signal.SIGKILL)


def list_workers(process: BaseProcess) -> list[int]:
    """The processes that a run has started."""
    try:
        return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    except OSError:
        return []


def wait_for_group(process: BaseProcess, seconds: float = 20.0) -> bool:
    """Wait until nothing of a run is left; whether that came about."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(int(process.pid or 0), 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


def prepare() -> None:
    """What every run would otherwise do anew."""
    torch.set_num_threads(1)
    for command in ("pool", "meta-train", "distill", "compare", "cache"):
        parse_recipe(command, [])
    lkd.data.readers.read_embedded_archive = cache(lkd.data.readers.read_embedded_archive)
    lkd.evaluation.comparison.compare.plot_table = draw_nothing


def draw_nothing(_: object, baseline: str, path: Path) -> None:
    """A comparison's plot would take a second, and is no part of what faults may harm."""
    Image.new("RGB", (1, 1)).save(path)
