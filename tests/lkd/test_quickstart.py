"""The quickstart in its short form: everything runs and is reported, nothing is claimed."""

import csv
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lkd
from lkd.cli import main
from lkd.config import MetaTrainRecipe, QuickstartRecipe
from lkd.core.files import read_json
from lkd.core.interrupt import Interrupted
from lkd.evaluation.comparison.trials import run_trial
from lkd.evaluation.quickstart import SETTINGS, adapt_recipe, keep_times, regrets, share_fields

submit = ProcessPoolExecutor.submit
submitted: Counter[Path] = Counter()  # trainings, by run


@pytest.fixture(scope="module", autouse=True)
def _smaller() -> Iterator[None]:
    """On fewer images than even the short form."""

    def share_few(recipe: QuickstartRecipe, setting: str) -> dict[str, Any]:
        fields = share_fields(recipe, setting)
        return fields | {"data": replace(fields["data"], train_size=256, meta_validation_size=200)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lkd.evaluation.quickstart.share_fields", share_few)
        yield


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("quickstart") / "run"

    def count(own: ProcessPoolExecutor, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        submitted[path] += work is run_trial
        return submit(own, work, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProcessPoolExecutor, "submit", count)
        assert main(["quickstart", "--short", "--run_dir", str(path), "--seeds", "2"]) == 0
    return path


def test_the_figures_file_is_complete(quickstart: Path) -> None:
    result = read_json(quickstart / "result.json")
    assert {"command", "commit", "date", "versions", "machine", "figures"} == set(result)
    names = ["ce_clean", "universal_clean", "ce_bad_teacher", "universal_bad_teacher"]
    names += [f"{loss}_noisy{end}" for loss in ("ce", "universal", "adapted") for end in ("", "_unseen")]
    others = {"adapted_gain", "seeds", "threads", "seconds_total"}
    assert set(result["figures"]) == {*names, *(f"{name}_se" for name in names), *others}
    with (quickstart / "clean" / "table.csv").open() as table:
        differences = [float(row["difference"]) for row in csv.DictReader(table)]
    assert any(found == pytest.approx(result["figures"]["universal_clean"], abs=1e-3) for found in differences)


def test_the_page_stands_alone(quickstart: Path) -> None:
    page = (quickstart / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1 + len(SETTINGS)
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page)
    assert "claims nothing" in page
    assert "lkd.load_loss(" in page
    assert "/adapted/loss.lkd.safetensors" in page
    loss = lkd.load_loss(quickstart / "adapted" / "loss.lkd.safetensors")
    assert sum(p.numel() for p in loss.parameters()) < 50_000


def test_where_the_start_was_kept_nothing_is_trained_with_it(quickstart: Path, tmp_path: Path, monkeypatch) -> None:
    def stand_still(*arguments: Any) -> MetaTrainRecipe:
        recipe = adapt_recipe(*arguments)
        recipe.meta.learning_rate, recipe.meta.reuse_every = 0.0, recipe.meta.outer_steps
        return recipe

    monkeypatch.setattr("lkd.evaluation.quickstart.adapt_recipe", stand_still)
    run = tmp_path / "run"
    shutil.copytree(quickstart, run)
    shutil.rmtree(run / "adapted")
    for cell in run.glob("noisy/cells/report-adapted*"):
        cell.unlink()
    assert main(["quickstart", "--short", "--run_dir", str(run), "--seeds", "2", "--resume", "auto"]) == 0
    assert (run / "adapted" / "loss.lkd.safetensors").exists()
    assert not list(run.glob("noisy/cells/report-adapted*"))
    figures = read_json(run / "result.json")["figures"]
    assert figures["adapted_gain"] == 0.0
    assert "adapted_noisy" not in figures
    page = (run / "report.html").read_text()
    assert "so it was kept as it is" in page
    assert "/adapted/loss.lkd.safetensors" not in page


def test_no_training_is_done_twice(quickstart: Path) -> None:
    assert submitted[quickstart] == len(list(quickstart.glob("*/cells/*.json")))


def test_going_on_with_a_finished_quickstart_trains_nothing(quickstart: Path) -> None:
    cells = {path: path.stat().st_mtime_ns for path in quickstart.glob("*/cells/*.json")}
    assert cells
    assert main(["quickstart", "--short", "--run_dir", str(quickstart), "--seeds", "2", "--resume", "auto"]) == 0
    assert {path: path.stat().st_mtime_ns for path in quickstart.glob("*/cells/*.json")} == cells


def test_the_time_of_an_interrupted_run_counts(tmp_path: Path, monkeypatch) -> None:
    now = iter([100.0, 107.0, 200.0, 203.0, 213.0, 214.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    with suppress(Interrupted), keep_times(tmp_path / "phases.json") as begin:
        begin("tune")
        raise Interrupted
    with keep_times(tmp_path / "phases.json") as begin:
        begin("tune")
        begin("train")
        assert begin("") == read_json(tmp_path / "phases.json") == {"tune": 10.0, "train": 10.0}


def test_regret_is_the_worst_gap_to_the_best_fixed_choice() -> None:
    grid = {"KD(a)": {"x": 80.0, "y": 60.0}, "KD(b)": {"x": 70.0, "y": 65.0}}
    assert regrets(grid, {"universal": {"x": 79.0, "y": 66.0}}) == {"KD(a)": 5.0, "KD(b)": 10.0, "universal": 1.0}
