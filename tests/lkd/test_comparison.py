"""The comparison: its statistics, its tuning, and that finished cells are kept."""

import csv
import math
import statistics

import pytest
import torch

from lkd.config import CompareRecipe, DataRecipe, ModelRecipe, TrainRecipe
from lkd.core.errors import UserError
from lkd.core.files import read_json, write_json
from lkd.core.statistics import mean_and_error
from lkd.evaluation.comparison.compare import check_methods, compare, pick_options, plan_report, plan_tuning
from lkd.evaluation.comparison.tables import format_table, summarize, tabulate
from lkd.evaluation.comparison.trials import Cell, cell_path, expand_grid, run_cell
from lkd.losses import LearnedLoss, LogitLoss
from lkd.losses.learned.file import save_loss
from lkd.tracking.run import open_run
from lkd.training.build import prepare_images


def tiny_recipe() -> CompareRecipe:
    return CompareRecipe(
        run_dir="compare",
        data=DataRecipe(train_size=200, meta_validation_size=100),
        train=TrainRecipe(epochs=2, batch_size=50),
        methods={
            "CE": "cross_entropy",
            "KD": {"name": "kd", "grid": {"weight": [0.0, 1.0], "temperature": [2.0]}},
        },
        seeds=2,
        workers=1,
    )


def test_mean_and_error_equal_the_standard_library() -> None:
    values = [3.0, 4.5, 4.0, 7.0]
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(statistics.mean(values))
    assert error == pytest.approx(statistics.stdev(values) / 2)
    assert math.isnan(mean_and_error([1.0])[1])


def test_differences_are_paired_over_seeds() -> None:
    rows = [
        {
            "student": "s",
            "method": m,
            "loss": m,
            "seed": seed,
            "seconds": 1.0,
            "steps_per_second": 100.0,
            "loss_parameters": 0,
            "peak_mib": None,
            "last": {"top1": top1},
            "best": {"top1": top1 + 1},
        }
        for m, tops in {"KD": [80.0, 90.0], "learned": [81.0, 91.0]}.items()
        for seed, top1 in enumerate(tops)
    ]
    kd, learned = summarize(rows, "KD")
    assert kd["last"] == pytest.approx((85.0, 5.0))
    assert learned["difference"] == pytest.approx((1.0, 0.0))
    assert learned["best"][0] == pytest.approx(87.0)
    table = format_table(tabulate([row | {"tuned_over": 0, "published": None} for row in (kd, learned)], "KD"))
    assert "+1.00 ± 0.00" in table
    assert "85.00 ± 5.00" in table


def test_a_grid_expands_to_all_its_points() -> None:
    grid = {"name": "kd", "grid": {"weight": [0.1, 0.9], "temperature": [1.0, 4.0, 8.0]}}
    points = expand_grid(grid)
    assert len(points) == 6
    assert {"name": "kd", "weight": 0.9, "temperature": 8.0} in points
    assert expand_grid("kd") == ["kd"]


def test_the_pick_is_the_best_on_meta_validation(tmp_path) -> None:
    recipe = tiny_recipe()
    for cell, top1 in zip(plan_tuning(recipe), (70.0, 80.0), strict=True):
        figures = {"top1": top1, "calibrated_cross_entropy": 1.0}
        write_json(cell_path(recipe, cell, tmp_path), {"meta_validation": figures})
    assert pick_options(recipe, tmp_path) == {
        "CE": "cross_entropy",
        "KD": {"name": "kd", "weight": 1.0, "temperature": 2.0},
    }


def test_any_change_of_the_recipe_is_another_cell(tmp_path) -> None:
    recipe, changed = tiny_recipe(), tiny_recipe()
    cell = Cell("CE", "cross_entropy", ModelRecipe(), 0, reported=True)
    path = cell_path(recipe, cell, tmp_path)
    assert cell_path(changed, cell, tmp_path) == path
    changed.data.label_noise = 0.1
    assert cell_path(changed, cell, tmp_path) != path
    moved = tiny_recipe()
    moved.data.root = "/elsewhere"
    assert cell_path(moved, cell, tmp_path) == path
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(seed)
        save_loss(f"{name}.lkd.safetensors", LearnedLoss({"logits": LogitLoss()}), {})
    learned = [
        cell_path(recipe, Cell("L", f"{n}.lkd.safetensors", ModelRecipe(), 0, reported=True), tmp_path) for n in "abc"
    ]
    assert learned[0] == learned[1] != learned[2], "a learned loss is its content, not its path"
    tuned = Cell("CE", "cross_entropy", ModelRecipe(), 0, reported=False)
    assert cell_path(recipe, tuned, tmp_path) != path


def test_a_comparison_runs_once_and_reports_every_seed() -> None:
    recipe = tiny_recipe()
    with open_run(recipe, "compare", quiet=True) as run:
        table = compare(recipe, run)
    assert [row["method"] for row in table] == ["CE", "KD"]
    rows = list(csv.DictReader((run.path / "cells.csv").open()))
    assert sorted((row["method"], row["seed"]) for row in rows) == [("CE", "0"), ("CE", "1"), ("KD", "0"), ("KD", "1")]
    assert (run.path / "comparison.png").stat().st_size > 1000
    for cell in plan_tuning(recipe):
        assert "last" not in read_json(cell_path(recipe, cell, run.path)), "tuning must not read the test split"
    picks = read_json(run.path / "picks.json")
    assert len(plan_report(recipe, picks)) == 4
    if picks["KD"]["weight"] == 0.0:  # KD without a teacher is cross-entropy: paired seeds give the same student
        assert table[1]["difference"] == (0.0, 0.0)
    before = {path: path.stat().st_mtime_ns for path in (run.path / "cells").iterdir()}
    recipe.resume = "auto"
    with open_run(recipe, "compare", quiet=True) as run:
        again = compare(recipe, run)
    assert again == table
    assert {path: path.stat().st_mtime_ns for path in (run.path / "cells").iterdir()} == before


def test_mistakes_show_before_any_training() -> None:
    recipe = tiny_recipe()
    images = prepare_images(recipe.data)
    recipe.methods["KD"]["grid"]["weight"] = [0.5, 2.0]
    with pytest.raises(UserError, match=r"weight: 2\.0 is not in \[0, 1\]"):
        check_methods(recipe, images)
    recipe = tiny_recipe()
    recipe.baseline = "DKD"
    with pytest.raises(UserError, match="baseline: 'DKD' is not one of the methods CE, KD"):
        check_methods(recipe, images)
    recipe = tiny_recipe()
    recipe.methods["learned"] = "missing.lkd.safetensors"
    with pytest.raises(UserError, match=r"missing\.lkd\.safetensors: no such file"):
        check_methods(recipe, images)


def test_weight_zero_kd_is_paired_with_cross_entropy(tmp_path) -> None:
    recipe = tiny_recipe()
    losses = ["cross_entropy", {"name": "kd", "weight": 0.0, "temperature": 2.0}]
    cells = [Cell("x", loss, ModelRecipe(), 5, reported=True) for loss in losses]
    first, second = (run_cell(recipe, cell, tmp_path / f"{n}.json") for n, cell in enumerate(cells))
    assert first["last"] == second["last"]
    assert first["meta_validation"] == second["meta_validation"]


def test_a_training_that_diverges_is_a_result() -> None:
    recipe = tiny_recipe()
    recipe.seeds, recipe.students = 1, [ModelRecipe("small_cnn")]
    recipe.methods = {
        "CE": {"name": "cross_entropy", "grid": {"train.learning_rate": [1e30, 0.1]}},
        "wild": {"name": "cross_entropy", "train": {"learning_rate": 1e30}},
    }
    recipe.baseline = "CE"
    with open_run(recipe, "compare", quiet=True) as run:
        table = compare(recipe, run)
        picks = read_json(run.path / "picks.json")
        text, cells = ((run.path / name).read_text() for name in ("table.txt", "cells.csv"))
    assert picks["CE"]["train"]["learning_rate"] == 0.1
    assert table[0]["last"][0] != 10.0
    assert table[1]["last"][0] == table[1]["best"][0] == 10.0
    assert "Diverged, and counted as guessing: wild on small_cnn, seed 0." in text
    diverged = [row["diverged_at"] for row in csv.DictReader(cells.splitlines())]
    assert diverged[0] == ""
    assert 0 < int(diverged[1]) < 8
