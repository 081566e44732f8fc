"""Claims: one process gets a piece of work; a dead one's is taken over."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lkd.core.workers import Watch, claim_path, claimed, host_name


def write_claim(result: Path, number: int, **owner) -> Path:
    path = claim_path(result, number)
    path.write_text(json.dumps({"host": host_name(), "pid": os.getpid(), "time": 0} | owner))
    return path


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_work_is_claimed_once_and_released(tmp_path: Path) -> None:
    result, watch = tmp_path / "cell.json", Watch()
    claim = watch.free_claim(result)
    assert claim == claim_path(result, 0)
    with claimed(result, claim) as ours:
        assert ours
        assert watch.free_claim(result) is None
        with claimed(result, claim) as others:
            assert not others
        assert claim.exists(), "who did not get it leaves it alone"
    assert watch.free_claim(result) == claim


def test_a_failure_releases_the_claim(tmp_path: Path) -> None:
    result = tmp_path / "cell.json"
    with pytest.raises(RuntimeError), claimed(result, claim_path(result, 0)):
        raise RuntimeError
    assert Watch().free_claim(result) == claim_path(result, 0)


def test_what_was_finished_meanwhile_is_not_ours(tmp_path: Path) -> None:
    result = tmp_path / "cell.json"
    claim = Watch().free_claim(result)
    assert claim
    result.write_text("{}")
    with claimed(result, claim) as ours:
        assert not ours
    assert [path.name for path in tmp_path.iterdir()] == ["cell.json"]


def test_a_dead_process_of_this_host_loses_its_claim_at_once_to_one_heir(tmp_path: Path) -> None:
    result = tmp_path / "cell.json"
    write_claim(result, 0, pid=dead_process())
    heirs = [Watch().free_claim(result), Watch().free_claim(result)]
    assert heirs == [claim_path(result, 1)] * 2
    with claimed(result, heirs[0]) as first, claimed(result, heirs[1]) as second:
        assert (first, second) == (True, False)
        assert Watch().free_claim(result) is None
        result.write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["cell.json"], "finished: the dead one's claim goes too"


def test_another_hosts_claim_is_stale_only_if_its_time_stands_still(tmp_path: Path) -> None:
    result, watch = tmp_path / "cell.json", Watch(stale_after=0.3)
    claim = write_claim(result, 0, host="elsewhere", pid=dead_process())
    os.utime(claim, (0, 0))  # the other host's clock may be wrong
    for _ in range(4):
        assert watch.free_claim(result) is None
        time.sleep(0.15)
        os.utime(claim)
    assert watch.free_claim(result) is None
    time.sleep(0.4)
    assert watch.free_claim(result) == claim_path(result, 1)


def test_an_owner_renews_its_claim(tmp_path: Path) -> None:
    result = tmp_path / "cell.json"
    claim = claim_path(result, 0)
    with claimed(result, claim, renew_every=0.05):
        before = claim.stat().st_mtime_ns
        time.sleep(0.2)
        assert claim.stat().st_mtime_ns > before
