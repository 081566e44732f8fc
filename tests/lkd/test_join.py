"""Several processes share one comparison: real processes, one killed."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lkd.cli import main
from lkd.files import read_json
from lkd.workers import assign_device

ROOT = Path(__file__).parents[2]
RECIPE = {
    "data": {"train_size": 400, "meta_validation_size": 200},
    "train": {"epochs": 4, "batch_size": 50},
    "methods": {
        "CE": "cross_entropy",
        "KD": {"name": "kd", "grid": {"weight": [0.2, 0.5, 1.0], "train.learning_rate": [0.05, 0.1]}},
    },
    "tuning_trainings": 4,
    "seeds": 2,
    "workers": 1,
}


def start(*options: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "lkd.cli", "compare", "recipe.yaml", "--run_dir", "shared", *options]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def trained(output: str) -> list[str]:
    return re.findall(r"^  (.*): [\d.]+ % on", output, re.MULTILINE)


def wait_for_claim(finished: int) -> int:
    """The process that holds a claim, once so many cells are finished."""
    cells, end = Path("shared/cells"), time.monotonic() + 120
    while time.monotonic() < end:
        for claim in cells.glob("*.claim.*"):
            try:
                owner = read_json(claim)["pid"]
            except Exception:
                continue  # just released, or just made
            if len(list(cells.glob("*.json"))) >= finished:
                return owner
        time.sleep(0.01)
    raise AssertionError("no claim was seen")


def test_killed_processes_lose_nothing_and_no_cell_is_trained_twice() -> None:
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    first = start()
    worker = wait_for_claim(finished=1)
    refused = start()
    second = start("--join")
    assert "use --join" in refused.communicate(timeout=120)[1]
    assert refused.returncode == 2
    os.kill(worker, signal.SIGKILL)
    first_output, first_error = first.communicate(timeout=120)
    output, error = second.communicate(timeout=240)
    assert second.returncode == 0, error
    assert first.returncode == 2
    assert "a worker process was killed" in first_error
    finished = trained(first_output) + trained(output)
    cells = list(Path("shared/cells").iterdir())
    assert len(cells) == 4 + 2 * 2, cells
    assert len(finished) == len(set(finished)) == len(cells)
    assert trained(output)
    assert "last − KD" in output


def test_a_killed_invocation_takes_its_workers_along() -> None:
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    first = start("--join")
    worker = wait_for_claim(finished=0)
    first.kill()
    first.communicate(timeout=60)
    end = time.monotonic() + 20
    while Path(f"/proc/{worker}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()


def test_another_comparison_is_not_joined(capsys) -> None:
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"methods": {"KD": {"name": "kd"}}, "seeds": 1}))
    assert main(["compare", "recipe.yaml", "--run_dir", "shared", "--join", "--workers", "1"]) == 0
    capsys.readouterr()
    assert main(["compare", "recipe.yaml", "--run_dir", "shared", "--join", "--methods.KD", "{name: kd, weight: 0.1}"])
    error = capsys.readouterr().err
    assert re.search(r"methods\.KD\.weight: is 0\.1, but the run in shared has None", error)
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("device", "worker", "gpus", "expected"),
    [
        ("cpu", 3, 0, "cpu"),
        ("cpu", 3, 2, "cpu"),
        ("cuda", 0, 1, "cuda:0"),
        ("cuda", 5, 4, "cuda:1"),
        ("cuda:1", 2, 4, "cuda:1"),
    ],
)
def test_workers_take_turns_on_the_gpus(device: str, worker: int, gpus: int, expected: str) -> None:
    assert assign_device(device, worker, gpus) == expected
