"""Every test runs on one thread, in a folder of its own."""

import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from xdist.scheduler import LoadScopeScheduling

from tests.gallery import make_gallery

# Kills, deadlines and several processes at once: one after the other, on one of the suite's workers.
SERIAL = ("test_cli", "test_faults", "test_join", "test_meta_processes", "test_processes")
TOGETHER = ("test_dashboard", "test_quickstart")  # read runs of their own, which two workers would make twice


class Scheduling(LoadScopeScheduling):
    """Tests one by one, but for the groups.

    pytest-xdist has `--dist loadgroup` for this; with pytest 9.2, version 3.8 reads no groups, and says nothing.
    """

    def _split_scope(self, nodeid: str) -> str:
        """What a test shares with those of its group."""
        stem = Path(nodeid.split("::")[0]).stem
        if stem in SERIAL or "::test_a_killed_run" in nodeid:
            return "serial"
        return stem if stem in TOGETHER else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    return Scheduling(config, log)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))  # of runs that several tests read


@pytest.fixture(autouse=True, scope="session")
def _plain_pictures() -> Iterator[None]:
    """Pictures are small and nothing in them makes room for anything else: most of the second that one takes."""
    plain = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda *arguments, **options: plain(*arguments, **options | {"dpi": 50}))
        patch.setattr(ConstrainedLayoutEngine, "execute", lambda *_: None)
        yield


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)  # else a worker for each core
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # else a test reads what another has kept


@pytest.fixture
def universal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file of a loss that sees all there is to see, as one that the package carries: `universal`."""
    from lkd.core import files
    from lkd.losses.learned.file import PRETRAINED, save_loss
    from lkd.losses.learned.loss import build_learned_loss
    from lkd.losses.learned.networks import KNOWN_CONDITIONING

    loss = build_learned_loss("logits", {"conditioning": list(KNOWN_CONDITIONING)})
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    path = tmp_path / "package" / "losses" / "pretrained" / "universal.lkd.safetensors"
    save_loss(path, loss, {})
    monkeypatch.setattr(files, "PACKAGE", tmp_path / "package")
    monkeypatch.setitem(PRETRAINED, "universal", files.hash_file(path))
    return path


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread in the place of worker processes: starting them takes longer than their work."""
    for module in ("comparison.compare", "fidelity"):
        monkeypatch.setattr(f"lkd.evaluation.{module}.start_workers", lambda *_, **__: ThreadPoolExecutor(1))


@pytest.fixture
def unused_tcp_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small runs to look at: `tests.gallery.RUNS`."""
    base = tmp_path_factory.getbasetemp()
    return make_gallery((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "gallery")
