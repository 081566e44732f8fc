"""Several processes share one comparison: real processes, one killed; the leases by which one gets a piece of work."""

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml

from lkd.cli import main
from lkd.config import CompareRecipe
from lkd.core.errors import UserError
from lkd.core.files import read_json
from lkd.core.workers import LeaseWatch, hold_lease, host_name, lease_path, own_device, process_exists
from lkd.tracking.run import open_run
from tests.processes import Command, fork_workers

ROOT = Path(__file__).parents[2]
RECIPE = {
    "data": {"train_size": 400, "meta_validation_size": 100},
    "train": {"epochs": 4, "batch_size": 50},
    "students": [{"name": "tiny_cnn"}],
    "methods": {
        "CE": "cross_entropy",
        "KD": {"name": "kd", "grid": {"weight": [0.2, 0.5, 1.0], "train.learning_rate": [0.05, 0.1]}},
    },
    "tuning_trainings": 2,
    "seeds": 1,
    "workers": 1,
}


def start(output: str, *options: str) -> Command:
    return Command(["compare", "recipe.yaml", "--run_dir", "shared", *options], output, prepare=fork_workers)


def trained(output: str) -> list[str]:
    return re.findall(r"^  (.*): [\d.]+ % on (.*) \(", output, re.MULTILINE)


def stop_a_worker() -> int:
    """Stop a process while it holds a lease."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        for lease in Path("shared/cells").glob("[!.]*.lease.*"):
            with suppress(UserError):  # just released, or just made
                owner = read_json(lease)["pid"]
                os.kill(owner, signal.SIGSTOP)
                if lease.exists():
                    return owner
                os.kill(owner, signal.SIGCONT)
        time.sleep(0.01)
    raise AssertionError("no lease was seen")


def test_a_killed_worker_loses_nothing_and_no_cell_is_trained_twice(capsys) -> None:
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    first = start("first.txt")
    victim = stop_a_worker()
    assert main(["compare", "recipe.yaml", "--run_dir", "shared", "--resume", "auto"]) == 2
    assert "shared is in use by another process; to share its work use --join" in capsys.readouterr().err
    second = start("second.txt", "--join")
    second.wait_for(lambda: "waiting for 1 trainings" in second.text)
    os.kill(victim, signal.SIGKILL)
    assert first.wait() == 2
    assert "a worker process was killed" in first.text
    assert second.wait() == 0, second.text
    finished = trained(first.text) + trained(second.text)
    cells = list(Path("shared/cells").glob("*.json"))
    assert len(cells) == 2 + 2, cells
    assert len(finished) == len(set(finished)) == len(cells)
    assert "last − KD" in second.text


def test_workers_and_their_server_go_with_a_killed_parent() -> None:
    script = """
import os, signal
from multiprocessing import forkserver
from lkd.core.workers import preload_workers, start_workers
if __name__ == "__main__":
    preload_workers("lkd.core.workers")
    with start_workers(1) as workers:
        print(workers.submit(os.getpid).result(), forkserver._forkserver._forkserver_pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""
    Path("parent.py").write_text(script)
    result = subprocess.run(
        [sys.executable, "parent.py"], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False
    )
    assert result.returncode == -signal.SIGKILL
    children, end = [int(word) for word in result.stdout.split()], time.monotonic() + 20
    while any(process_exists(child) for child in children) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(process_exists(child) for child in children)


def test_another_comparison_is_not_joined() -> None:
    recipe = CompareRecipe(run_dir="shared", join=True)
    with open_run(recipe, "compare") as first, open_run(recipe, "compare") as second:
        assert first.path == second.path
        recipe.methods["KD"] = "kd"
        with (
            pytest.raises(UserError, match=r"methods\.KD: is .kd., but the run in shared has None"),
            open_run(recipe, "compare"),
        ):
            pass


@pytest.mark.parametrize(
    ("device", "worker", "gpus", "expected"),
    [("cpu", 3, 2, "cpu"), ("cuda", 5, 4, "cuda:1"), ("cuda:1", 2, 4, "cuda:1")],
)
def test_workers_take_turns_on_the_gpus(device: str, worker: int, gpus: int, expected: str, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("lkd.core.workers.worker_number", worker)
    assert own_device(device) == expected


# ----------------------------------------------------------------------------------------------------------------------
# Leases.

DEAD = 2**22 + 1  # beyond any process number


def write_lease(result: Path, number: int, **owner) -> Path:
    path = lease_path(result, number)
    path.write_text(json.dumps({"host": host_name(), "pid": os.getpid(), "time": 0} | owner))
    return path


def test_work_is_leased_once_and_released_whatever_happens(tmp_path: Path) -> None:
    result, watch = tmp_path / "trial.json", LeaseWatch()
    lease = watch.find_free(result)
    assert lease == lease_path(result, 0)
    with suppress(RuntimeError), hold_lease(result, lease) as ours:
        assert ours
        assert watch.find_free(result) is None
        with hold_lease(result, lease) as others:
            assert not others
        assert lease.exists(), "who did not get it leaves it alone"
        raise RuntimeError
    assert watch.find_free(result) == lease
    result.write_text("{}")
    with hold_lease(result, lease) as ours:
        assert not ours, "finished meanwhile"
    assert [path.name for path in tmp_path.iterdir()] == ["trial.json"]


def test_a_lease_is_there_only_with_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is stopped as it writes its lease leaves none: an empty one would be waited for."""
    result = tmp_path / "trial.json"
    monkeypatch.setattr(json, "dump", stop := Mock(side_effect=KeyboardInterrupt))
    monkeypatch.setattr(json, "dumps", stop)
    with pytest.raises(KeyboardInterrupt), hold_lease(result, lease_path(result, 0)):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_dead_process_of_this_host_loses_its_lease_at_once_to_one_heir(tmp_path: Path) -> None:
    result = tmp_path / "trial.json"
    write_lease(result, 0, pid=DEAD)
    heirs = [LeaseWatch().find_free(result), LeaseWatch().find_free(result)]
    assert heirs == [lease_path(result, 1)] * 2
    with hold_lease(result, heirs[0]) as first, hold_lease(result, heirs[1]) as second:
        assert (first, second) == (True, False)
        assert LeaseWatch().find_free(result) is None
        result.write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["trial.json"], "finished: the dead one's lease goes too"


def test_a_disk_that_fails_once_loses_no_lease(tmp_path: Path, monkeypatch) -> None:
    result, stale = tmp_path / "a.json", OSError(errno.ESTALE, "Stale file handle")
    watch, lease = LeaseWatch(), LeaseWatch().find_free(result)
    with hold_lease(result, lease, renew_every=0.01) as ours, monkeypatch.context() as patch:
        assert ours
        before, once = lease.stat().st_mtime_ns, [stale]
        touch = os.utime
        patch.setattr("os.utime", lambda path: touch(path) if not once else raise_error(once.pop()))
        end = time.monotonic() + 30
        while once or lease.stat().st_mtime_ns == before:
            assert time.monotonic() < end, "it is renewed no more"
            time.sleep(0.01)
        patch.setattr(Path, "read_text", Mock(side_effect=stale))
        assert watch.find_free(result) is None


def raise_error(error: OSError) -> None:
    raise error


@pytest.mark.parametrize("joined", [False, True])
def test_locks_are_taken_as_a_disk_of_the_network_asks(joined: bool, monkeypatch) -> None:
    """As Linux does on NFS: shared by who reads, alone by who writes."""
    monkeypatch.setattr("fcntl.flock", fcntl.lockf)
    with open_run(CompareRecipe(run_dir="s", join=joined), "compare") as run:
        assert (run.path / "environment.json").exists()


def test_another_hosts_lease_is_stale_only_if_its_time_stands_still(tmp_path: Path) -> None:
    result, watch = tmp_path / "trial.json", LeaseWatch(stale_after=0.3)
    lease = write_lease(result, 0, host="elsewhere", pid=DEAD)
    os.utime(lease, (0, 0))  # the other host's clock may be wrong
    for _ in range(3):
        assert watch.find_free(result) is None
        time.sleep(0.15)
        os.utime(lease)
    assert watch.find_free(result) is None
    time.sleep(0.4)
    assert watch.find_free(result) == lease_path(result, 1)


def test_an_owner_renews_its_lease(tmp_path: Path) -> None:
    result = tmp_path / "trial.json"
    lease = lease_path(result, 0)
    with hold_lease(result, lease, renew_every=0.05):
        before = lease.stat().st_mtime_ns
        time.sleep(0.2)
        assert lease.stat().st_mtime_ns > before
