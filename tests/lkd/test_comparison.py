"""The comparison: options and their grids, the tuning budget, its statistics and tables, and that trials are kept."""

import csv
import io
import os
import re
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lkd.config import CompareRecipe, DataRecipe, ModelRecipe, TrainRecipe
from lkd.core.errors import UserError
from lkd.core.files import read_json, write_json
from lkd.core.workers import start_workers
from lkd.evaluation.comparison import tables, trials
from lkd.evaluation.comparison.compare import check_methods, compare
from lkd.evaluation.comparison.trials import Trial, trial_path
from lkd.losses import DecoupledLoss, LearnedLoss
from lkd.losses.learned.file import save_loss
from lkd.tracking.run import open_run
from lkd.training.training import DivergedError, Training

GRID = {"weight": [0.2, 0.5, 0.8, 1.0], "temperature": [1.0, 2.0, 4.0, 8.0]}
TOPS = {"KD": [80.0, 82.0, 81.0], "A&B_100%": [81.0, 83.5, 81.5], "CE": [79.0, 80.0, 78.0]}


def tiny_recipe(**changes) -> CompareRecipe:
    methods = {"CE": "cross_entropy", "KD": {"name": "kd", "grid": {"weight": [0.0, 1.0], "temperature": [2.0]}}}
    data, train = DataRecipe(train_size=200, meta_validation_size=100), TrainRecipe(epochs=2, batch_size=50)
    settings = {"run_dir": "compare", "data": data, "train": train, "methods": methods, "seeds": 2, "workers": 1}
    settings["students"] = [ModelRecipe("tiny_cnn")]
    return CompareRecipe(**(settings | changes))


def tuned_recipe(budget: int = 0, seeds: int = 1, **methods) -> CompareRecipe:
    return tiny_recipe(methods=methods, tuning_trainings=budget, tuning_seeds=seeds)


def write_score(recipe: CompareRecipe, trial: Trial, folder: Path, top1: float) -> None:
    figures = {"top1": top1, "calibrated_cross_entropy": 1.0}
    write_json(trial_path(recipe, trial, folder), {"meta_validation": figures})


# Options, grids, and the tuning budget.


def test_a_grid_expands_to_all_its_points_and_may_hold_the_learning_rate() -> None:
    method = {"name": "kd", "weight": 0.5, "grid": {"weight": [0.2, 1.0], "train.learning_rate": [0.03, 0.1]}}
    points = trials.expand_grid(method)
    assert len(points) == 4
    assert {"name": "kd", "weight": 1.0, "train": {"learning_rate": 0.03}} in points
    assert trials.expand_grid("kd") == ["kd"]
    loss, train = trials.split_method(points[0], TrainRecipe(epochs=3))
    assert loss == {"name": "kd", "weight": 0.2}
    assert (train.learning_rate, train.epochs) == (0.03, 3)


@pytest.mark.parametrize("budget", [4, 12])
def test_the_budget_is_the_same_for_all_and_spread_over_the_values(budget: int) -> None:
    recipe = tuned_recipe(
        budget,
        KD={"name": "kd", "weight": 0.8, "temperature": 4.0, "grid": GRID},
        CE={"name": "cross_entropy", "grid": {"train.learning_rate": [0.03, 0.1]}},
    )
    points = trials.choose_points(recipe, "KD")
    assert len(points) == budget == len({str(point) for point in points})
    assert {"name": "kd", "weight": 0.8, "temperature": 4.0} in points, "the method's own options are among them"
    for option in GRID:
        assert set(Counter(point[option] for point in points).values()) == {budget // 4}
    assert points == trials.choose_points(recipe, "KD")
    assert len(trials.choose_points(recipe, "CE")) == 2
    recipe.seed = 1
    assert points != trials.choose_points(recipe, "KD")


def test_the_first_point_holds_the_recipes_learning_rate() -> None:
    recipe = tuned_recipe(1, KD={"name": "kd", "grid": {"train.learning_rate": [0.03, 0.1], "weight": [0.2, 0.5]}})
    recipe.train.learning_rate = 0.1
    assert trials.choose_points(recipe, "KD") == [{"name": "kd", "weight": 0.2, "train": {"learning_rate": 0.1}}]


def test_a_grid_may_hold_null() -> None:
    recipe = tuned_recipe(
        1, hints={"name": "fitnet", "grid": {"distillation": [1.0, 2.0], "stages": [[["a", "b"]], None]}}
    )
    assert trials.choose_points(recipe, "hints") == [{"name": "fitnet", "distillation": 1.0, "stages": [["a", "b"]]}]


def test_the_first_point_holds_the_balances_own_options() -> None:
    own = {"name": "dynamic", "growth": 0.5}
    recipe = tuned_recipe(1, KD={"name": "kd", "balance": own, "grid": {"balance.growth": [0.1, 0.5]}})
    assert trials.choose_points(recipe, "KD") == [{"name": "kd", "balance": own}]
    named = {"name": "kd", "balance": "dynamic", "grid": {"balance.name": ["constant", "dynamic"]}}
    assert trials.choose_points(tuned_recipe(1, KD=named), "KD") == [{"name": "kd", "balance": {"name": "dynamic"}}]


def test_seeds_share_the_budget_and_the_pick_is_best_on_meta_validation_in_their_mean(tmp_path) -> None:
    recipe = tuned_recipe(8, 2, KD={"name": "kd", "grid": GRID}, CE="cross_entropy")
    planned = trials.plan_tuning(recipe)
    assert len(planned) == 8
    assert {trial.seed for trial in planned} == {0, 1}
    best, lucky = planned[1].loss, planned[2].loss
    for trial in planned:
        lucks = {0: 85.0, 1: 70.0}
        top1 = 80.0 if trial.loss == best else lucks[trial.seed] if trial.loss == lucky else 60.0
        write_score(recipe, trial, tmp_path, top1)
    assert trials.pick_options(recipe, tmp_path) == {"KD": best, "CE": "cross_entropy"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"methods": {"KD": {"name": "kd", "grid": {"wight": [0.1, 0.2]}}}}, r"methods\.KD: loss 'kd': .*wight"),
        ({"methods": {"KD": {"name": "kd", "grid": {"weight": 0.5}}}}, r"methods\.KD\.grid\.weight: 0\.5"),
        ({"methods": {"KD": {"name": "kd", "grid": {"weight": [0.5, 2.0]}}}}, r"methods\.KD: .*weight: 2\.0"),
        ({"methods": {"KD": {"name": "kd", "grid": [0.5]}}}, r"methods\.KD\.grid: \[0\.5\]"),
        ({"methods": {"KD": {"name": "kd", "grid": {"train.lr": [0.1]}}}}, r"methods\.KD\.grid\.train\.lr'; nearest"),
        ({"methods": {"KD": {"name": "kd", "train": {"learning_rate": "1e-1"}}}}, r"train\.learning_rate: '1e-1'"),
        ({"methods": {"KD": {"name": "kd", "grid": {"train.epochs": [1, 0]}}}}, r"methods\.KD\.grid\.train\.epochs: 0"),
        ({"methods": {"KD": {"name": "kd", "train": {"batch_size": 5000}}}}, r"methods\.KD: train\.batch_size"),
        ({"methods": {"KD": {"name": "kd", "train": {"accumulation": 7}}}}, r"methods\.KD: train\.accumulation: 7"),
        ({"methods": {"KD": {"name": "kd", "train": {"warmup_epochs": 50}}}}, r"methods\.KD: train\.warmup_epochs"),
        ({"methods": {"KD": "missing.lkd.safetensors"}}, r"methods\.KD: missing\.lkd\.safetensors"),
        ({"baseline": "DKD"}, "baseline: 'DKD' .* CE, KD"),
        ({"students": []}, "students: none"),
        ({"methods": {"KD": "kd", "kd +": "kd", "KD-": "dkd"}}, "methods: 'kd .' and 'KD-' are one name"),
        ({"tuning_trainings": 1, "tuning_seeds": 2}, "tuning_trainings: 1 .* tuning_seeds, 2"),
    ],
)
def test_a_mistake_is_one_line_before_any_training(changes: dict, named: str) -> None:
    recipe = tiny_recipe(**changes)
    with pytest.raises(UserError, match=named):
        check_methods(recipe, trials.open_inputs(recipe), torch.device("cpu"))


# Statistics and tables.


def table(seeds: int = 3) -> list[dict]:
    rows = [
        {
            "student": student,
            "method": method,
            "loss": method,
            "seed": seed,
            "last": {"top1": top1},
            "best": {"top1": top1 + 1},
            "steps_per_second": 100.0 + seed,
            "loss_parameters": 1234,
            "peak_mib": None if method == "CE" else 10.0 + seed,
        }
        for student in ("s_1", "s_2")
        for method, tops in TOPS.items()
        for seed, top1 in enumerate(tops[:seeds])
    ]
    return [row | {"tuned_over": 8} for row in tables.summarize(rows, "KD")]


def test_differences_are_paired_over_seeds() -> None:
    kd, row, _ = table()[:3]
    half = 4.302653 * 0.288675  # t of two degrees of freedom × standard error of 1, 1.5, 0.5
    assert row["difference"] == pytest.approx((1.0, 0.288675), abs=1e-5)
    assert row["interval"] == pytest.approx((1 - half, 1 + half), abs=1e-5)
    assert (row["steps_per_second"], row["peak_mib"]) == (101.0, 11.0)
    assert (kd["last"][0], kd["best"][0]) == (81.0, 82.0)


def test_a_label_that_looks_like_another_and_its_student_keeps_its_own_figures() -> None:
    rows = [row | {"method": {"learned": "KD s_2"}.get(row["method"], row["method"])} for row in table()]
    figures = tables.figures_of(rows, rows[0]["method"])
    assert len([key for key in figures if key.endswith("_accuracy")]) == len(rows)


def test_the_table_is_text_latex_and_csv() -> None:
    lines = tables.list_lines(table(), "KD")
    text = tables.format_table(lines, ["100 % of it"])
    assert text.splitlines()[2].startswith(
        "s_1      A&B_100%  82.00 ± 0.76  83.00 ± 0.76  +1.00 ± 0.29  [−0.24, +2.24]  3"
    )
    assert text.endswith("\n\n100 % of it\n")
    latex = tables.format_latex(lines, ["100 % of it"])
    body = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert len(body) == 1 + 6
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {10}
    assert r"A\&B\_100\%" in latex
    assert r"$\pm$" in latex
    assert all(line.startswith("%") or not re.search(r"(?<!\\)[%#_]|[−±]", line) for line in latex.splitlines())
    assert latex.count(r"\midrule") == 2, "one below the header, one between the students"
    rows = list(csv.DictReader(io.StringIO(tables.format_csv(tables.list_rows(table(seeds=1))))))
    assert float(rows[1]["last"]) == 81.0
    assert rows[1]["interval_low"] == rows[2]["peak_mib"] == "", "nothing where nothing is known"
    for seeds in (1, 3):
        tables.plot_table(table(seeds=seeds), "KD", Path("comparison.png"))
        assert Path("comparison.png").read_bytes().startswith(b"\x89PNG")


def test_the_notes_say_why_a_method_has_less_than_the_budget() -> None:
    methods = {"KD": {"name": "kd", "grid": GRID}, "few": {"name": "kd", "grid": {"weight": [0.2, 0.5]}}, "CE": "kd"}
    for budget, tuned_over in ((5, {"KD": 4, "few": 4, "CE": 0}), (3, {"KD": 0, "few": 0, "CE": 0})):
        recipe = tuned_recipe(budget, 2, **methods)
        planned = Counter(trial.method for trial in trials.plan_tuning(recipe))
        assert {label: planned[label] for label in methods} == tuned_over
        rows = [row for row in table() if row["method"] == "KD"][:1]
        rows = [row | {"method": label, "tuned_over": count} for label, count in tuned_over.items() for row in rows]
        notes = "\n".join(tables.write_notes(recipe, dict.fromkeys(methods, "kd"), rows, []))
        assert "no more to choose from: few (4), CE (0)." in notes or budget == 3
        assert f"2 seeds of one more point go beyond it: KD ({tuned_over['KD']})" in notes


# Trials: their place, their cost, their results.


def test_workers_have_the_threads_that_are_asked_for_however_many_they_are(monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    given = []
    monkeypatch.setattr(
        "lkd.core.workers.ProcessPoolExecutor",
        lambda *_, initargs, **__: given.append(initargs[0]) or ThreadPoolExecutor(),
    )
    for count, threads in ((1, 0), (2, 0), (4, 0), (1, 2), (4, 2)):
        with start_workers(count, threads=threads):
            pass
    assert given == [1, 1, 1, 2, 2]


@pytest.mark.usefixtures("one_process")
def test_the_number_of_threads_is_part_of_a_trial_and_stands_in_its_results(capsys) -> None:
    learned = {"methods": {"CE": "cross_entropy"}, "baseline": "CE", "seeds": 1, "train": TrainRecipe(epochs=1)}
    for threads, said in ((1, ""), (2, "1 with 1"), (3, "1 with 1, 1 with 2"), (1, "")):
        with open_run(tiny_recipe(threads=threads, resume="auto", **learned), "compare") as run:
            compare(tiny_recipe(threads=threads, **learned), run)
        printed = capsys.readouterr().out
        assert ("are not used" in printed) == bool(said)
        assert said in printed
        assert read_json(run.path / "result.json")["figures"]["threads"] == threads
        assert f"CPU threads of each training: {threads}; trained on cpu (" in (run.path / "table.txt").read_text()
    assert sorted(read_json(path)["threads"] for path in run.path.glob("cells/*.json")) == [1, 2, 3]
    trial = Trial("CE", "cross_entropy", ModelRecipe(), 0, reported=True)
    assert trial_path(tiny_recipe(), trial, Path()) == trial_path(tiny_recipe(threads=1), trial, Path())


@pytest.mark.usefixtures("one_process")
def test_trainings_of_two_devices_are_called_so(monkeypatch) -> None:
    train = TrainRecipe(epochs=1)
    recipe = tiny_recipe(methods={"CE": "cross_entropy"}, baseline="CE", seeds=2, train=train, resume="auto")
    for devices in (1, 2):
        with open_run(recipe, "compare") as run:
            compare(recipe, run)
        notes = (run.path / "table.txt").read_text()
        assert ("Devices round differently" in notes) == (devices == 2)
        next(run.path.glob("cells/*.json")).unlink()
        monkeypatch.setattr("lkd.evaluation.comparison.trials.describe_device", lambda _: "cuda (Tesla T4)")
    assert ", cuda (Tesla T4)." in notes


@pytest.mark.usefixtures("one_process")
def test_a_grid_over_losses_and_a_test_image_that_makes_no_sense(monkeypatch) -> None:
    """The grid picks the loss; where the test split alone gives logits that are not finite, that counts as guessing."""
    methods = {"CE": "cross_entropy", "any": {"grid": {"name": ["kd", "cross_entropy"]}}}
    recipe = tiny_recipe(methods=methods, baseline="CE", seeds=1, train=TrainRecipe(epochs=1))
    score = trials.evaluate

    def evaluate(network, images, device):
        if len(images) > 200:  # the test split
            raise DivergedError("evaluation: logits are not finite")
        return score(network, images, device)

    monkeypatch.setattr(trials, "evaluate", evaluate)
    with open_run(recipe, "compare") as run:
        rows = compare(recipe, run)
    assert {row["last"][0] for row in rows} == {10.0}
    assert "Diverged, and counted as guessing" in (run.path / "table.txt").read_text()


def test_any_change_of_the_recipe_is_another_trial(tmp_path) -> None:
    recipe = tiny_recipe()
    trial = Trial("CE", "cross_entropy", ModelRecipe(), 0, reported=True)
    path = trial_path(recipe, trial, tmp_path)
    slash = Trial("CE", "cross_entropy", ModelRecipe("torchvision/googlenet"), 0, reported=True)
    assert trial_path(recipe, slash, tmp_path).parent == path.parent, "where a report looks"
    moved, changed = tiny_recipe(), tiny_recipe()
    moved.data.root, changed.data.label_noise = "/elsewhere", 0.1
    moved.data.workers, moved.data.read_timeout, moved.data.evaluation_batch_size = 3, 5.0, 100
    assert trial_path(moved, trial, tmp_path) == path
    assert trial_path(changed, trial, tmp_path) != path
    for part, field in ((recipe.data, "class_map"), (recipe.teacher, "classes")):
        setattr(part, field, "classes.txt")
        Path("classes.txt").write_text("1 2")
        before = trial_path(recipe, trial, tmp_path)
        Path("classes.txt").write_text("2 1")
        assert trial_path(recipe, trial, tmp_path) != before, field
        setattr(part, field, None)
    assert trial_path(recipe, Trial("CE", "cross_entropy", ModelRecipe(), 0, reported=False), tmp_path) != path
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(seed)
        save_loss(f"{name}.lkd.safetensors", LearnedLoss({"logits": DecoupledLoss()}), {})
    learned = [
        trial_path(recipe, Trial("L", f"{n}.lkd.safetensors", ModelRecipe(), 0, reported=True), tmp_path) for n in "abc"
    ]
    assert learned[0] == learned[1] != learned[2], "a learned loss is its content, not its path"
    files = {n: {"name": f"{n}.lkd.safetensors"} for n in "abc"}
    losses = [files["a"] | {"adapters": True}, *({"name": "influence_weighted", "loss": files[n]} for n in "ac")]
    others = {trial_path(recipe, Trial("L", loss, ModelRecipe(), 0, reported=True), tmp_path) for loss in losses}
    Path("a.lkd.safetensors").write_bytes(Path("c.lkd.safetensors").read_bytes())
    others.add(trial_path(recipe, Trial("L", losses[1], ModelRecipe(), 0, reported=True), tmp_path))
    assert len(others - set(learned)) == 4, "nor is one that another loss weighs"


def test_only_the_blocks_are_timed() -> None:
    cost = trials.Cost(torch.device("cpu"))
    for _ in range(2):
        time.sleep(0.2)
        with cost.measured():
            time.sleep(0.05)
    assert 0.1 <= cost.seconds < 0.3


@pytest.mark.skipif(sys.platform != "linux", reason="measured on Linux only")
def test_the_peak_is_that_of_the_blocks_whatever_came_before() -> None:
    for earlier in (1, 400):
        torch.ones(earlier * 2**18)  # MiB, freed at once
        cost = trials.Cost(torch.device("cpu"))
        torch.ones(200 * 2**18)  # evaluation
        with cost.measured():
            torch.ones(64 * 2**18)
        with cost.measured():
            torch.ones(16 * 2**18)
        assert cost.peak_mib == pytest.approx(64, abs=6)


@pytest.mark.usefixtures("one_process")
def test_a_comparison_runs_once_and_reports_every_seed() -> None:
    recipe = tiny_recipe()
    with open_run(recipe, "compare", quiet=True) as run:
        found = compare(recipe, run)
    assert [row["method"] for row in found] == ["CE", "KD"]
    rows = list(csv.DictReader((run.path / "cells.csv").open()))
    assert sorted((row["method"], row["seed"]) for row in rows) == [("CE", "0"), ("CE", "1"), ("KD", "0"), ("KD", "1")]
    for trial in trials.plan_tuning(recipe):
        assert "last" not in read_json(trial_path(recipe, trial, run.path)), "tuning must not read the test split"
    assert len(trials.plan_report(recipe, read_json(run.path / "picks.json"))) == 4
    before = {path: path.stat().st_mtime_ns for path in (run.path / "cells").iterdir()}
    recipe.resume = "auto"
    with open_run(recipe, "compare", quiet=True) as run:
        assert compare(recipe, run) == found
    assert {path: path.stat().st_mtime_ns for path in (run.path / "cells").iterdir()} == before


def test_weight_zero_kd_is_paired_with_cross_entropy(tmp_path) -> None:
    losses = ["cross_entropy", {"name": "kd", "weight": 0.0, "temperature": 2.0}]
    first, second = (
        trials.run_trial(tiny_recipe(), Trial("x", loss, ModelRecipe(), 5, reported=True), tmp_path / f"{number}.json")
        for number, loss in enumerate(losses)
    )
    assert first["last"] == second["last"]
    assert first["meta_validation"] == second["meta_validation"]


@pytest.mark.usefixtures("one_process")
def test_a_training_that_diverges_is_a_result() -> None:
    methods = {
        "CE": {"name": "cross_entropy", "grid": {"train.learning_rate": [1e30, 0.1]}},
        "wild": {"name": "cross_entropy", "train": {"learning_rate": 1e30}},
    }
    recipe = tiny_recipe(methods=methods, baseline="CE", seeds=1)
    with open_run(recipe, "compare", quiet=True) as run:
        found = compare(recipe, run)
    assert read_json(run.path / "picks.json")["CE"]["train"]["learning_rate"] == 0.1
    assert found[0]["last"][0] != 10.0
    assert found[1]["last"][0] == found[1]["best"][0] == 10.0
    assert "Diverged, and counted as guessing: wild on tiny_cnn, seed 0." in (run.path / "table.txt").read_text()
    diverged = [row["diverged_at"] for row in csv.DictReader((run.path / "cells.csv").open())]
    assert diverged[0] == ""
    assert 0 < int(diverged[1]) < 8


def test_what_diverges_right_after_its_best_epoch_still_has_that_epoch(monkeypatch, tmp_path) -> None:
    run_step = Training.run_step

    def run_an_epoch(training: Training, *rest) -> dict:
        if training.step == training.batches.steps_per_epoch:
            raise DivergedError("the loss is not finite")
        return run_step(training, *rest)

    monkeypatch.setattr(Training, "run_step", run_an_epoch)
    trial = Trial("CE", "cross_entropy", ModelRecipe("tiny_cnn"), 0, reported=True)
    row = trials.run_trial(tiny_recipe(), trial, tmp_path / "trial.json")
    assert row["best_step"] == row["diverged_at"]
    assert row["last"]["top1"] == 10.0
    assert row["best"]["cross_entropy"] != row["last"]["cross_entropy"]
