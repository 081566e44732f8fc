"""Ranking fidelity: its rule, a problem whose answer is known, what it writes, what it refuses."""

import csv
import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from lkd.cli import main
from lkd.config import DataRecipe, FidelityRecipe, PoolSettings, TrainRecipe
from lkd.config.parse import parse_recipe
from lkd.core.errors import UserError
from lkd.core.files import read_json
from lkd.evaluation.comparison.trials import open_inputs
from lkd.evaluation.fidelity import check_ages, check_recipe
from lkd.evaluation.fidelity_results import Setting, SettingFidelity, average_ages, recommend, write_results
from lkd.tracking.run import open_run
from lkd.tracking.tracker import read_log
from lkd.training.build import choose_student

OBJECTIVES = ["cross_entropy", "calibrated_cross_entropy"]


def fidelity_of(rho: float, low: float) -> SettingFidelity:
    return SettingFidelity([0.0], [1.0], rho, rho, low, 1.0)


def test_ages_are_weighed_by_squared_positive_correlation() -> None:
    draws = [np.linspace(0, 1, 101), np.ones(101), np.ones(101)]
    assert average_ages([0.0, 0.5, 0.8], [-0.1, 0.0, 0.0], draws).weights == [0, 0, 0]
    found = average_ages([0.0, 0.5, 0.8], [0.8, 0.4, -0.9], draws)
    assert found.weights == pytest.approx([0.8, 0.2, 0])
    assert found.mean == pytest.approx(0.1)
    assert found.rho == pytest.approx(0.8 * 0.8 + 0.2 * 0.4)
    assert (found.low, found.high) == pytest.approx((0.8 * 0.025 + 0.2, 0.8 * 0.975 + 0.2))


def test_the_rule() -> None:
    settings = {
        Setting("constant", "brier", 20): fidelity_of(0.95, 0.9),
        Setting("constant", "brier", 60): fidelity_of(0.2, 0.1),
        Setting("cosine", "brier", 20): fidelity_of(0.6, 0.2),
        Setting("cosine", "brier", 60): fidelity_of(0.8, 0.5),
        Setting("cosine", "brier", 200): fidelity_of(0.9, 0.6),
    }  # cosine: 0.77 in the mean over K against 0.58
    for tolerance, steps in ((0.05, 200), (0.15, 60), (0.5, 20)):
        assert recommend(settings, tolerance) == ("cosine", "brier", steps)
    assert recommend({Setting("cosine", "brier", 20): fidelity_of(0.0, 0.0)}, 0.1) is None


def make_results(recipe: FidelityRecipe) -> tuple[list, list]:
    """Rows of trainings that rank the losses in their order, and of rollouts that do so at age 0 and annealed only."""
    noise = np.random.default_rng(1).normal
    labels = list(recipe.losses)
    full = []
    for seed in range(recipe.full_seeds):
        for number, label in enumerate(labels):
            figures = {"top1": 80 + number + noise(0, 0.1), "calibrated_cross_entropy": 1 - 0.1 * number}
            figures |= {"cross_entropy": 1.0, "temperature": 1.0}
            full.append({"method": label, "seed": seed, "seconds": 1.0, "meta_validation": figures})
    rollouts = []
    slopes = {("cosine", 0.0): 1.0, ("constant", 0.0): 0.3, ("cosine", 0.5): -1.0, ("constant", 0.5): -1.0}
    for (annealing, age), slope in slopes.items():
        for steps, number in itertools.product(recipe.rollout_lengths, range(recipe.rollouts)):
            values = {
                objective: {label: 2 - signal * place - noise(0, 0.5) for place, label in enumerate(labels)}
                for objective, signal in zip(OBJECTIVES, (-abs(slope), slope), strict=True)
            }
            row = {"annealing": annealing, "steps": steps, "age": age, "number": number, "values": values}
            rollouts.append(row | {"student": number, "progress": age})
    rollouts[0]["values"]["cross_entropy"][labels[0]] = math.inf  # one that diverged
    return full, rollouts


def test_known_rankings_are_found_and_written() -> None:
    recipe = FidelityRecipe(run_dir="run", ages=[0.0, 0.5], objectives=OBJECTIVES)
    with open_run(recipe, "fidelity", quiet=True) as run:
        result = write_results(recipe, *make_results(recipe), run)
    assert list(result["recommended"].values()) == ["cosine", "calibrated_cross_entropy", 20]
    assert result["age_weights"] == [[0.0, 1.0], [0.5, 0.0]]
    found = [row for row in result["rows"] if row["criterion"] == "accuracy"]
    rows = {tuple(row[key] for key in (*Setting._fields, "age")): row["rho"] for row in found}
    assert rows["cosine", "calibrated_cross_entropy", 20, 0.0] == 1
    assert rows["cosine", "cross_entropy", 60, 0.0] == -1
    assert rows["cosine", "calibrated_cross_entropy", 60, 0.5] == -1
    assert all(row["low"] <= row["high"] for row in result["rows"])
    assert result["ceilings"]["accuracy"]["rho"] == 1
    assert read_json(run.path / "fidelity.json") == result
    (logged,) = read_log(run.path / "log.jsonl")
    assert read_json(run.path / "result.json")["figures"].items() <= logged.items()
    assert {"commit", "versions", "recipe"} <= result.keys()
    table = (run.path / "table.txt").read_text()
    assert "--meta.rollout_steps 20 --meta.annealing cosine --meta.objective calibrated_cross_entropy" in table
    assert "(age: weight): 0: 1.00, 0.5: 0.00" in table
    assert "Doubtful" not in table


def test_where_nothing_ranks_nothing_is_recommended() -> None:
    recipe = FidelityRecipe(run_dir="run", ages=[0.5], annealing=["cosine"], objectives=OBJECTIVES)
    full, rollouts = make_results(recipe)
    with open_run(recipe, "fidelity", quiet=True) as run:
        result = write_results(recipe, full, [row for row in rollouts if row["age"] == 0.5], run)
    assert (result["recommended"], result["age_weights"]) == (None, [])
    assert "Recommended: nothing." in (run.path / "table.txt").read_text()


RECIPE = """
run_dir: run
data: {train_size: 400, meta_validation_size: 200}
teacher: {random_answers: 1}
student: {name: tiny_cnn}
train: {epochs: 5, batch_size: 50}
pool: {students: 2, snapshots: 2, max_age: 0.5}
losses:
  CE: cross_entropy
  some: {name: kd, weight: 0.6, temperature: 1.0}
  all: {name: kd, weight: 1.0, temperature: 1.0}
ages: [0, 0.5]
rollout_lengths: [20]
annealing: [cosine]
objectives: [calibrated_cross_entropy]
full_seeds: 2
rollouts: 2
"""


@pytest.mark.usefixtures("one_process")
def test_a_teacher_of_noise_is_ranked_last_and_nothing_is_done_twice(capsys) -> None:
    """The more of a teacher that answers at random, the worse: that ranking is known beforehand."""
    Path("recipe.yaml").write_text(RECIPE)
    words = ["fidelity", "recipe.yaml"]
    assert main(words) == 0
    result = read_json(Path("run/fidelity.json"))
    rows = {row["age"]: row["rho"] for row in result["rows"] if row["criterion"] == "accuracy"}
    assert rows[0.0] == 1
    with open("run/rollouts.csv") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 2 * 2 * 3  # ages × draws × losses
    assert {row["loss"] for row in found} == {"CE", "some", "all"}
    kept = sorted(path for folder in ("cells", "rollouts", "pool") for path in Path("run", folder).iterdir())
    assert len(kept) == 3 * 2 + 2 * 2 + 2 * 2 + 1
    missing = kept.pop(next(n for n, path in enumerate(kept) if path.parent.name == "rollouts"))
    before, text = {path: path.stat().st_mtime_ns for path in kept}, missing.read_text()
    missing.unlink()
    assert main([*words, "--resume", "auto"]) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert missing.read_text() == text
    assert read_json(Path("run/fidelity.json"))["rows"] == result["rows"]
    assert "Recommended: --meta.rollout_steps 20" in capsys.readouterr().out


def small_recipe(**changes) -> FidelityRecipe:
    settings = {
        "data": DataRecipe(train_size=200, meta_validation_size=100),
        "train": TrainRecipe(epochs=10, batch_size=20),  # 100 steps
        "pool": PoolSettings(students=1, snapshots=9, max_age=0.8),
        "rollout_lengths": [20],
    }
    return FidelityRecipe(**(settings | changes))


def check(recipe: FidelityRecipe, total_steps: int = 100) -> None:
    world = open_inputs(recipe)
    check_recipe(recipe, world, choose_student(recipe.student, world.images.train), total_steps)
    check_ages(recipe, None, total_steps)


KD = {"name": "kd"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": {"KD": KD}}, r"losses: 1 given \(KD\); a ranking needs at least 3"),
        ({"losses": {"a": KD, "b": "kd", "c": "kdd"}}, r"losses\.c: loss: unknown name 'kdd'; nearest: kd"),
        ({"losses": {"a": KD, "b": KD, "c": KD | {"grid": {}}}}, r"losses\.c: takes no `grid`"),
        ({"losses": {"a": KD, "b": KD, "c": "fitnet"}}, r"losses\.c: has parts that are trained along"),
        ({"ages": [0.0, 0.75]}, r"ages: 0\.75 is not an age of the pool, which has 0, 0\.1, .*0\.8; take one of these"),
        ({"ages": []}, r"ages: \[\] must hold at least one"),
        ({"ages": [0.1, 0.1]}, "each once"),
        ({"rollout_lengths": [20, 21]}, r"21 steps .* at age 0\.8, 20 of 100 steps are left"),
        ({"objectives": ["brierr"]}, "objectives: unknown name 'brierr'"),
        ({"annealing": []}, r"annealing: \[\] must hold"),
    ],
)
def test_mistakes_show_before_any_training(changes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(small_recipe(**changes))


def test_an_annealed_rollout_may_be_longer_than_what_is_left() -> None:
    """It stands for all that is left of a training, at another pace."""
    check(small_recipe(rollout_lengths=[50], annealing=["cosine"]))
    check(small_recipe(rollout_lengths=[20]))


def test_the_default_losses_are_eight_and_the_pool_has_the_default_ages() -> None:
    recipe = parse_recipe("fidelity", [])
    assert len(recipe.losses) == 8
    check(recipe, 806)
