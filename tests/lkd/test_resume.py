"""Killed by SIGKILL at random moments and gone on with: the same bits as a run that nobody disturbed."""

import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.forked_commands import start_command

TINY = ["--data.train_size", "200", "--data.meta_validation_size", "100", "--device", "cpu", "--threads", "1"]
TINY += ["--train.epochs", "3", "--train.batch_size", "20", "--train.checkpoint_every", "3"]
POOL = ["--pool.students", "2", "--pool.snapshots", "3", "--pool.max_age", "1.0"]
META = ["--meta.outer_steps", "4", "--meta.rollout_steps", "3", "--meta.rollout_epochs", "1", "--meta.reuse_every", "2"]
META += ["--meta.reuse_students", "1", "--meta.outer_batch_size", "50", "--meta.checkpoint_every", "1"]
CRD = ["--train.ema_decay", "0.9", "--loss.name", "torchdistill/CRDLoss", "--loss.num_negative_samples", "64"]
RUNS = {  # command, then what has to be there, each time, before it is killed
    "distill": ([*CRD, "--data.augmentation", "flip_and_crop"], ["checkpoints/00000000*", "checkpoints/00000001*"]),
    "pool": (POOL, ["pool/checkpoints-000/*", "pool/checkpoints-001/00000001*"]),
    "meta-train": ([*POOL, *META], ["pool/checkpoints-001/*", "look/step-000002/*/*", "checkpoints/000000003*"]),
}


def run(words: list[str]) -> None:
    process = start_command(words, Path("output.txt"))
    process.join()
    assert process.exitcode == 0, Path("output.txt").read_text()


def kill_when_there(words: list[str], pattern: str, delay: float) -> None:
    process = start_command(words, Path("output.txt"))
    folder = Path(words[words.index("--run_dir") + 1])
    while process.is_alive() and not list(folder.glob(f"{pattern}.safetensors")):
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, Path("output.txt").read_text()


def read_results(folder: str) -> dict[str, torch.Tensor]:
    files = [*Path(folder).glob("*.safetensors"), *Path(folder).glob("pool/*.safetensors")]
    return {f"{file.name} {key}": tensor for file in files for key, tensor in load_file(file).items()}


@pytest.mark.parametrize("command", RUNS)
def test_a_killed_run_goes_on_to_the_same_bits(command: str) -> None:
    options, moments = RUNS[command]
    words = [command, *TINY, *options]
    run([*words, "--run_dir", "whole"])
    chance = random.Random(command)
    for pattern in moments:
        kill_when_there([*words, "--run_dir", "killed", "--resume", "auto"], pattern, chance.uniform(0, 0.05))
        assert not list(Path("killed").glob("*.safetensors")), "killed too late to show anything"
    run([*words, "--run_dir", "killed", "--resume", "auto"])
    whole, killed = read_results("whole"), read_results("killed")
    assert whole.keys() == killed.keys()
    assert all(torch.equal(tensor, killed[name]) for name, tensor in whole.items())
