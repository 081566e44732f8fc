"""Run directories: one process at a time, provenance without local paths, W&B offline."""

import json
import signal
from pathlib import Path

import pytest

from lkd.cli import main
from lkd.config import DistillRecipe
from lkd.core.errors import UserError
from lkd.tracking.run import open_run
from lkd.tracking.tracker import read_log
from lkd.training.training import Training
from tests.lkd.test_cli import TINY


def test_a_run_directory_serves_one_process() -> None:
    recipe = DistillRecipe(run_dir="r")
    with open_run(recipe, "distill", quiet=True):
        with pytest.raises(UserError, match="is in use by another process"):
            with open_run(DistillRecipe(run_dir="r", resume="auto"), "distill", quiet=True):
                pass
    with open_run(DistillRecipe(run_dir="r", resume="auto"), "distill", quiet=True) as run:
        assert run.provenance()["recipe"]["train"]["epochs"] == 13


def test_provenance_tells_no_folders(tmp_path) -> None:
    recipe = DistillRecipe(run_dir=str(tmp_path / "r"))
    recipe.data.root = str(tmp_path)
    with open_run(recipe, "distill", quiet=True) as run:
        assert str(tmp_path.parent) not in json.dumps(run.provenance())
        assert run.provenance()["recipe"]["run_dir"] == "r"


def test_a_log_that_a_crash_cut_off_is_still_read(tmp_path) -> None:
    (tmp_path / "log.jsonl").write_text(
        '{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 2, "a": 3}\n{"step": 3, "a"'
    )
    assert [row["a"] for row in read_log(tmp_path / "log.jsonl")] == [1, 3]


def test_wandb_works_offline_and_a_resumed_run_keeps_its_id(monkeypatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    words = ["distill", "--run_dir", "r", *TINY, "--wandb.mode", "offline"]
    run_step = Training.run_step

    def stop_after_step(training: Training, *watch):
        signal.raise_signal(signal.SIGTERM)
        return run_step(training, *watch)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "run_step", stop_after_step)
        assert main(words) == 143
    assert main([*words, "--resume", "auto"]) == 0
    runs = list(Path("r").glob("wandb/offline-run-*"))
    assert len(runs) == 2
    assert {run.name.rsplit("-", 1)[1] for run in runs} == {Path("r/wandb_run_id").read_text()}
    assert all(list(run.glob("*.wandb")) for run in runs)
