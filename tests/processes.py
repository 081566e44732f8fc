"""Tiny runs of `lkd` commands in processes of their own, to be killed and gone on with.

The processes are forked from one that has imported the package and done nothing else: they start at once.
"""

import multiprocessing
import os
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

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


def read_results(folder: Path) -> dict[str, Tensor]:
    """Every tensor of what a run leaves: its student, its loss, its pool."""
    files = [*folder.glob("*.safetensors"), *folder.glob("pool/*.safetensors")]
    return {f"{file.name} {key}": tensor for file in files for key, tensor in load_file(file).items()}
