"""Meta-training by several processes (gloo): the loss that one process learns, stopped and gone on with by one."""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lkd.core import distributed
from lkd.core.errors import UserError
from lkd.core.tensor_files import digest, load_checkpoint
from lkd.losses.learned.file import read_provenance
from lkd.meta_training import meta_train as meta_training
from lkd.meta_training.meta_train import check_identical
from lkd.pool import pool
from tests.lkd.test_resume import run
from tests.processes import RUNS, VIT, Command, read_results, start_job

WORDS = ["meta-train", *RUNS["meta-train"], "--pool.students", "1"]


def finish(job: list[Command]) -> list[int]:
    return [process.wait() for process in job]


def read_loop(run_dir: str) -> dict:
    """The outer loop after its last step; the loss that was saved may be an earlier one."""
    return load_checkpoint(Path(run_dir, "checkpoints/000000004.safetensors"))["loop"]


def test_a_stopped_job_goes_on_with_another_number_of_processes_and_learns_the_loss_of_one(unused_tcp_port) -> None:
    """To the bit: each rolls out one of the two students of a step, and a sum of two does not depend on the order."""
    run(["pool", *RUNS["pool"], "--run_dir", "p"])
    words = [*WORDS, "--meta.reuse_every", "0", "--pool_dir", "p/pool", "--meta.interleaving", "both"]
    job = start_job([*words, "--run_dir", "two"], unused_tcp_port)
    job[0].wait_for(lambda: list(Path("two").glob("checkpoints/000000002*")))
    for process in job:
        process.send_signal(signal.SIGTERM)
    run([*words, "--run_dir", "one"])
    assert finish(job) == [128 + signal.SIGTERM] * 2, Path("output-0.txt").read_text()
    assert "go on with: lkd meta-train" in Path("output-0.txt").read_text()
    assert not Path("output-1.txt").read_text().strip(), "the main process alone speaks"
    run([*words, "--run_dir", "two", "--resume", "auto"])
    one, two = read_results(Path("one")), read_results(Path("two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    one, two = read_loop("one"), read_loop("two")
    assert digest([one["optimizer"], one["estimator"]]) == digest([two["optimizer"], two["estimator"]])
    for before, after in zip(one["history"], two["history"], strict=True):
        assert {key: after[key] for key in before if "audit" not in key} == pytest.approx(
            {key: value for key, value in before.items() if "audit" not in key}, rel=1e-6
        )
    assert one["history"][0]["outer/audit_cosine"] > 0.9, "the audit must have been exact"
    assert one["history"][0]["loss/weight"] != one["history"][-1]["loss/weight"], "nothing was learned"


def test_students_of_the_pool_and_of_looks_are_those_of_one_process(unused_tcp_port: int) -> None:
    """All processes train each of them together."""
    words = [*WORDS, "--student", VIT, "--meta.outer_steps", "1", "--train.epochs", "1"]
    job = start_job([*words, "--run_dir", "two"], unused_tcp_port)
    run([*words, "--run_dir", "one"])
    assert finish(job) == [0, 0], Path("output-0.txt").read_text()
    one, two = (read_results(Path(folder, "pool")) for folder in ("one", "two"))
    assert len(one) > 100
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)
    one, two = (read_provenance(Path(folder, "loss.lkd.safetensors"))["reuse"] for folder in ("one", "two"))
    assert two[0] == pytest.approx(one[0], rel=1e-4)


def wait_for_seconds_only() -> None:
    """Collectives time out soon, and the second process is slow with its pools."""
    distributed.TIMEOUT = timedelta(seconds=2)
    build = pool.build_pool

    def build_slowly(*arguments: Any) -> pool.Pool:
        time.sleep(5 * int(os.environ["RANK"]))
        return build(*arguments)

    pool.build_pool = build_slowly


def test_who_is_done_with_its_worlds_waits_for_who_is_not(unused_tcp_port: int) -> None:
    worlds = ["--worlds", "{one: {}, other: {data: {label_noise: 0.2}}}", "--meta.reuse_every", "0"]
    words = [*WORDS, *worlds, "--meta.outer_steps", "1", "--pool.snapshots", "1", "--pool.max_age", "0"]
    places = [
        {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(unused_tcp_port)}
        for rank in ("0", "1")
    ]
    job = [
        Command([*words, "--run_dir", "r"], f"{place['RANK']}.txt", environment=place, prepare=wait_for_seconds_only)
        for place in places
    ]
    assert finish(job) == [0, 0], job[0].text + job[1].text


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
    others.append(digest([linear.state_dict(), loop.optimizer.state_dict()]))
    check_identical(loop)
    with torch.no_grad():
        linear.weight[0, 0].nextafter_(torch.tensor(9.0))
    with pytest.raises(UserError, match="outer step 7: the loss of process 1 is not that of process 0"):
        check_identical(loop)


def test_a_job_that_is_stopped_in_a_look_is_stopped_in_all_processes(unused_tcp_port: int) -> None:
    """One whose worlds are done waits for the others, and learns from them that the look goes on later."""
    worlds = "{short: {train: {epochs: 1}}, long: {train: {epochs: 100}}}"
    words = [*WORDS, "--pool.snapshots", "1", "--pool.max_age", "0", "--meta.reuse_epochs", "0", "--worlds", worlds]
    job = start_job([*words, "--run_dir", "r"], unused_tcp_port)
    job[0].wait_for(lambda: list(Path("r").glob("look/*/student-000/000000010*")))
    job[1].wait_for(lambda: list(Path("r").glob("look/*/student-001/*")))
    for process in job:
        process.send_signal(signal.SIGTERM)
    assert finish(job) == [128 + signal.SIGTERM] * 2, Path("output-1.txt").read_text()
    assert "stopped in step-000000" in Path("output-0.txt").read_text()
