"""Killed by SIGKILL at random moments and gone on with: the same bits as a run that nobody disturbed."""

import random
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.processes import RUNS, Command, read_results

MOMENTS = {  # what has to be there before a run is killed, for each time that it is
    "distill": ["checkpoints/00000000*", "checkpoints/00000001*"],
    "pool": ["pool/checkpoints-000/*", "pool/checkpoints-001/00000001*"],
    "meta-train": ["pool/checkpoints-001/*", "look/step-000002/*/*", "checkpoints/000000003*"],
}


def run(words: list[str]) -> None:
    command = Command(words)
    assert command.wait() == 0, command.text


def kill_when_there(words: list[str], pattern: str, delay: float) -> None:
    command = Command(words)
    folder = Path(words[words.index("--run_dir") + 1])
    command.wait_for(lambda: list(folder.glob(f"{pattern}.safetensors")))
    time.sleep(delay)
    command.send_signal(signal.SIGKILL)
    assert command.wait() == -signal.SIGKILL, command.text


@pytest.mark.parametrize("command", MOMENTS)
def test_a_killed_run_goes_on_to_the_same_bits(command: str) -> None:
    words = [command, *RUNS[command]]
    run([*words, "--run_dir", "whole"])
    chance = random.Random(command)
    for pattern in MOMENTS[command]:
        kill_when_there([*words, "--run_dir", "killed", "--resume", "auto"], pattern, chance.uniform(0, 0.05))
        assert not list(Path("killed").glob("*.safetensors")), "killed too late to show anything"
    run([*words, "--run_dir", "killed", "--resume", "auto"])
    whole, killed = read_results(Path("whole")), read_results(Path("killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(tensor, killed[name]) for name, tensor in whole.items())
