"""Leases: one process gets a piece of work; a dead one's is taken over."""

import json
import os
import time
from contextlib import suppress
from pathlib import Path

from lkd.core.workers import LeaseWatch, hold_lease, host_name, lease_path

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


def test_another_hosts_lease_is_stale_only_if_its_time_stands_still(tmp_path: Path) -> None:
    result, watch = tmp_path / "trial.json", LeaseWatch(stale_after=0.2)
    lease = write_lease(result, 0, host="elsewhere", pid=DEAD)
    os.utime(lease, (0, 0))  # the other host's clock may be wrong
    for _ in range(3):
        assert watch.find_free(result) is None
        time.sleep(0.1)
        os.utime(lease)
    assert watch.find_free(result) is None
    time.sleep(0.25)
    assert watch.find_free(result) == lease_path(result, 1)


def test_an_owner_renews_its_lease(tmp_path: Path) -> None:
    result = tmp_path / "trial.json"
    lease = lease_path(result, 0)
    with hold_lease(result, lease, renew_every=0.05):
        before = lease.stat().st_mtime_ns
        time.sleep(0.2)
        assert lease.stat().st_mtime_ns > before
