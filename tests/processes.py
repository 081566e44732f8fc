"""Commands in processes of their own, forked from one that has imported the package and done nothing else.

They start at once, where a fresh interpreter imports for six seconds.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

TINY = ["--data.train_size", "200", "--data.meta_validation_size", "100", "--device", "cpu", "--threads", "1"]
TINY += ["--train.epochs", "3", "--train.batch_size", "20", "--train.checkpoint_every", "3"]  # of 10 steps an epoch
CRD = ["--train.ema_decay", "0.9", "--loss.name", "torchdistill/CRDLoss", "--loss.num_negative_samples", "64"]
POOL = ["--pool.students", "2", "--pool.snapshots", "3", "--pool.max_age", "1.0"]
META = ["--meta.outer_steps", "4", "--meta.rollout_steps", "3", "--meta.rollout_epochs", "1", "--meta.reuse_every", "2"]
META += ["--meta.reuse_students", "1", "--meta.outer_batch_size", "50", "--meta.checkpoint_every", "1"]
RUNS = {  # command, and its options
    "distill": [*TINY, *CRD, "--data.augmentation", "flip_and_crop"],
    "pool": [*TINY, *POOL],
    "meta-train": [*TINY, *POOL, *META],
}
# LayerNorm, no BatchNorm: its statistics would be those of half a batch.
VIT = "{name: vit_tiny_patch16_224, options: {img_size: 28, patch_size: 7, embed_dim: 16, depth: 2, num_heads: 2}}"

FORK = multiprocessing.get_context("fork")
FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(["lkd.commands"])


class Command:
    """A command in a process of its own, as `subprocess.Popen` has it.

    Args:
        words: The command line, after `lkd`.
        output: What it prints, both streams, is appended to this file.
        environment: Variables to set.
        prepare: Called in the process before the command: a function at the top of a module.
        group: Whether it leads a process group of its own.
        context: Whether it is a fork of the server or of this process.
    """

    def __init__(
        self,
        words: list[str],
        output: str | Path = "output.txt",
        environment: dict[str, str] | None = None,
        prepare: Callable[[], None] | None = None,
        group: bool = False,
        context: Any = FORK_SERVER,
    ) -> None:
        self.group = group
        self.output = Path(output).absolute()
        self.printed_before = self.output.stat().st_size if self.output.exists() else 0
        place = (os.getcwd(), str(self.output), environment or {}, prepare, group)
        self.process = context.Process(target=run_command, args=(words, *place))
        self.process.start()
        assert self.process.pid
        self.pid = self.process.pid

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self.output.read_bytes()[self.printed_before :].decode() if self.output.exists() else ""

    def poll(self) -> int | None:
        """Its exit code, negative for a signal that killed it; None while it runs."""
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self, timeout: float = 300) -> int:
        """Wait until it ends, and give its exit code."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            os.killpg(self.pid, signal.SIGKILL) if self.group else self.process.kill()
            self.process.join()
            raise subprocess.TimeoutExpired("lkd", timeout, self.text)
        return self.process.exitcode

    def wait_for(self, condition: Callable[[], object], timeout: float = 120) -> None:
        """Wait until something has come about while it runs."""
        end = time.monotonic() + timeout
        while not condition():
            assert self.poll() is None, self.text
            assert time.monotonic() < end, self.text
            time.sleep(0.002)


def fork_workers() -> None:
    """Have the workers of a comparison be forks of its own process: they need not import anything anew."""
    from lkd.core import workers

    workers.CONTEXT = FORK


def start_job(words: list[str], port: int, size: int = 2, output: str = "output-{rank}.txt") -> list[Command]:
    """Start a command in several processes that meet at a port, as torchrun would."""
    job = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [
        Command(words, output.format(rank=rank), job | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(size)
    ]


def run_command(
    words: list[str],
    folder: str,
    output: str,
    environment: dict[str, str],
    prepare: Callable[[], None] | None,
    group: bool,
) -> None:
    """Run a command in this process, and leave with its exit code."""
    import torch

    from lkd.cli import main

    if group:
        os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # a comparison may have started the server first
    os.chdir(folder)
    os.environ.update(environment)
    torch.set_num_threads(1)
    with open(output, "a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    if prepare:
        prepare()
    sys.exit(main(words))


def read_results(folder: Path) -> dict[str, Tensor]:
    """Every tensor of what a run leaves: its student, its loss, its pool."""
    files = [*folder.glob("*.safetensors"), *folder.glob("pool/*.safetensors")]
    return {f"{file.name} {key}": tensor for file in files for key, tensor in load_file(file).items()}
