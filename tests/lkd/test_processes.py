"""Several processes under torchrun (gloo): the same training as one process, the same numbers, stopped and resumed."""

import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lkd.cli import main
from lkd.config import CompareRecipe, DataRecipe
from lkd.core import distributed
from lkd.core.distributed import read_job
from lkd.core.errors import UserError
from lkd.data import Batches
from lkd.models.build import build
from lkd.models.files import load_network
from lkd.tracking.run import open_run
from lkd.training.build import prepare_images
from lkd.training.training import convert_sync_batchnorm
from tests.processes import VIT, Command, start_job

TINY = ["--data.train_size", "200", "--data.meta_validation_size", "101", "--train.batch_size", "40", "--device", "cpu"]
DISTILL = ["distill", *TINY, "--student", VIT, "--loss", "{name: kd, weight: 0.9}"]


def test_two_processes_train_as_one_with_the_same_whole_batch() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "lkd.cli"]
    job = subprocess.run(
        [*command, *DISTILL, "--train.epochs", "1", "--run_dir", "two"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert job.returncode == 0, job.stderr
    assert job.stdout.count("two/student.safetensors") == 1, "the main process alone speaks"
    assert main([*DISTILL, "--train.epochs", "1", "--run_dir", "one"]) == 0
    one, two = load_file("one/student.safetensors"), load_file("two/student.safetensors")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)
    figures = [
        load_network(Path(run, "student.safetensors"))[1]["provenance"]["meta_validation"] for run in ("one", "two")
    ]
    for name in ("top1", "top5", "cross_entropy"):
        one, two = (each["last"][name] for each in figures)
        assert two == pytest.approx(one, rel=1e-4), f"{name}, of 101 images by two processes"


def test_a_stopped_job_goes_on_with_as_many_processes_or_one(unused_tcp_port: int) -> None:
    words = [*DISTILL, "--train.epochs", "5"]
    job = start_job([*words, "--run_dir", "stopped"], unused_tcp_port)
    job[0].wait_for(lambda: Path("stopped/checkpoints").exists())
    for process in job:
        process.send_signal(signal.SIGTERM)
    assert [process.wait() for process in job] == [128 + signal.SIGTERM] * 2, job[0].text
    assert not Path("stopped/student.safetensors").exists()
    again = start_job([*words, "--run_dir", "stopped", "--resume", "auto"], unused_tcp_port)
    assert [process.wait() for process in again] == [0, 0], again[0].text
    assert main([*words, "--run_dir", "one"]) == 0
    one, two = load_file("one/student.safetensors"), load_file("stopped/student.safetensors")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-2, atol=1e-4)


def meet_for_seconds_only() -> None:
    distributed.MEETING = timedelta(seconds=3)


def test_a_process_that_the_others_never_meet_ends_with_one_line(unused_tcp_port: int) -> None:
    jobs = []
    for rank, port in (("0", unused_tcp_port), ("1", "1")):  # nobody listens where the second one calls
        place = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        jobs.append(Command(DISTILL, f"{rank}.txt", environment=place, prepare=meet_for_seconds_only))
    for rank, alone in enumerate(jobs):
        assert alone.wait(100) == 2, alone.text
        (line,) = (line for line in alone.text.splitlines() if line.startswith("lkd: error"))
        assert f"process {rank} has lost another process of the job, or not met it within 0.05 minutes" in line
        assert "Traceback" not in alone.text


def test_after_an_error_nobody_waits_for_nccl(monkeypatch, capsys) -> None:
    """Its communicators are not taken down, and the process ends once it has said what is wrong."""
    codes: list[int] = []
    monkeypatch.setattr("os._exit", codes.append)
    monkeypatch.setattr(distributed, "patient", object())
    assert main(["distil"]) == 2
    assert codes == [2]
    assert "unknown command" in capsys.readouterr().err


def test_a_job_that_does_not_say_where_it_meets_is_refused(monkeypatch, capsys) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert main(DISTILL) == 2
    assert "environment variable MASTER_ADDR expected" in capsys.readouterr().err


def test_parts_of_a_batch_are_the_batch() -> None:
    images = prepare_images(DataRecipe(train_size=200, meta_validation_size=100)).train
    whole = Batches(images, 40, seed=3)
    parts = [Batches(images, 40, 3, part=(number, 4)) for number in range(4)]
    for step in (0, 7):
        together = torch.cat([part.at(step).index for part in parts])
        assert sorted(together.tolist()) == sorted(whole.at(step).index.tolist())
        assert all(len(part.at(step).index) == 10 for part in parts)
    with pytest.raises(UserError, match="batch_size: 40 is the batch of all 3 processes together and does not divide"):
        Batches(images, 40, 3, part=(0, 3))


def test_what_several_processes_cannot_do_is_refused(monkeypatch) -> None:
    assert read_job() == (0, 1, 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with (
        pytest.raises(
            UserError,
            match="torchrun: `lkd compare` runs in one process; in several run distill, teacher, pool, meta-train",
        ),
        open_run(CompareRecipe(run_dir="c"), "compare"),
    ):
        pass


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "resnet18"])
def test_synchronised_batch_norm_keeps_activations(name: str) -> None:
    network, images = build(name, 10, 3).eval(), torch.randn(4, 3, 32, 32)
    before = network(images).logits
    torch.testing.assert_close(convert_sync_batchnorm(network)(images).logits, before, rtol=1e-4, atol=1e-6)
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in network.modules())


def test_synchronised_batch_norm_needs_gpus(capsys) -> None:
    assert main([*DISTILL, "--train.sync_batchnorm", "true", "--run_dir", "r"]) == 2
    assert "train.sync_batchnorm: works on GPUs only" in capsys.readouterr().err
