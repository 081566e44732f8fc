"""Meta-training by several processes (gloo): the loss that one process learns, stopped and gone on with by one."""

import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.forked_commands import start_command
from lkd import meta_training
from lkd.artifact import read_provenance
from lkd.checkpoint import load_checkpoint
from lkd.errors import UserError
from lkd.meta_training import check_identical
from tests.lkd.test_processes import STUDENT
from tests.lkd.test_resume import META, POOL, TINY, run

WORDS = ["meta-train", *TINY, *POOL, *META, "--student", STUDENT, "--pool.students", "1", "--meta.reuse_every", "4"]
BOTH = ["--meta.interleaving", "both", "--meta.reuse_every", "0"]


def start_job(words: list[str], port: int) -> list:
    return [start_command(words, Path(f"output-{rank}.txt"), rank, size=2, port=port) for rank in range(2)]


def finish(job: list) -> list[int]:
    for process in job:
        process.join(timeout=300)
    return [process.exitcode for process in job]


def assert_same_loss(one: str, two: str) -> None:
    """The loss after the last outer step, which need not be the best one by reuse."""
    expected, found = (load_checkpoint(Path(run, "checkpoints/000000004.safetensors"))["loop"] for run in (one, two))
    assert expected["loss"].keys() == found["loss"].keys()
    for name, tensor in expected["loss"].items():
        torch.testing.assert_close(found["loss"][name], tensor, rtol=1e-3, atol=1e-4)
    assert expected["history"][0]["loss/weight"] != expected["history"][-1]["loss/weight"], "nothing was learned"


def test_two_processes_learn_the_loss_of_one(unused_tcp_port: int) -> None:
    """Each with one of the two students that the single process has."""
    job = start_job([*WORDS, "--run_dir", "two"], unused_tcp_port)
    run([*WORDS, "--run_dir", "one"])
    assert finish(job) == [0, 0], Path("output-0.txt").read_text()
    assert "learned loss: " in Path("output-0.txt").read_text()
    assert "learned loss: " not in Path("output-1.txt").read_text(), "the main process alone speaks"
    assert_same_loss("one", "two")
    one, two = (read_provenance(Path(folder, "loss.lkd.safetensors")) for folder in ("one", "two"))
    for before, after in zip(one["curve"] + one["reuse"], two["curve"] + two["reuse"], strict=True):
        assert after == pytest.approx(before, rel=1e-2, abs=1e-3, nan_ok=True)  # attention has no audit


def test_a_stopped_job_goes_on_with_another_number_of_processes(unused_tcp_port: int) -> None:
    words = [*WORDS, *BOTH]
    job = start_job([*words, "--run_dir", "stopped"], unused_tcp_port)
    while job[0].is_alive() and not list(Path("stopped").glob("checkpoints/000000003*")):
        time.sleep(0.002)
    for process in job:
        process.terminate()
    assert finish(job) == [128 + signal.SIGTERM] * 2, Path("output-0.txt").read_text()
    assert "go on with: lkd meta-train" in Path("output-0.txt").read_text()
    run([*words, "--run_dir", "stopped", "--resume", "auto"])
    run([*words, "--run_dir", "one"])
    assert_same_loss("one", "stopped")


def test_students_that_do_not_divide_are_refused(unused_tcp_port: int) -> None:
    job = start_job([*WORDS, "--meta.students_per_step", "3", "--run_dir", "r"], unused_tcp_port)
    assert finish(job) == [2, 2]
    message = "meta.students_per_step: 3 do not divide among 2 processes; take a multiple of 2"
    assert message in Path("output-0.txt").read_text()


def test_a_loss_that_differs_between_processes_is_an_error(monkeypatch) -> None:
    linear = torch.nn.Linear(2, 2)
    loop = SimpleNamespace(loss=linear, optimizer=torch.optim.Adam(linear.parameters()), step=7)
    others: list[str] = []
    monkeypatch.setattr(meta_training, "gather_objects", lambda own: [own, *others, own])
    check_identical(loop)
    others.append(meta_training.digest([linear.state_dict(), loop.optimizer.state_dict()]))
    check_identical(loop)
    with torch.no_grad():
        linear.weight[0, 0].nextafter_(torch.tensor(9.0))
    with pytest.raises(UserError, match="outer step 7: the loss of process 1 is not that of process 0"):
        check_identical(loop)
