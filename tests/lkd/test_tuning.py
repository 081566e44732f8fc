"""The tuning budget: which points of a grid are trained, and what a method may set."""

from collections import Counter

import pytest

from lkd.config import CompareRecipe, DataRecipe, TrainRecipe
from lkd.core.errors import UserError
from lkd.core.files import write_json
from lkd.evaluation.comparison.compare import check_methods, pick_options, plan_tuning
from lkd.evaluation.comparison.trials import cell_path, choose_points, expand_grid, split_method
from lkd.training.build import prepare_images

IMAGES = prepare_images(DataRecipe(train_size=200, meta_validation_size=100))
GRID = {"weight": [0.2, 0.5, 0.8, 1.0], "temperature": [1.0, 2.0, 4.0, 8.0]}


def recipe_with(budget: int = 0, seeds: int = 1, **methods) -> CompareRecipe:
    return CompareRecipe(methods=methods, tuning_trainings=budget, tuning_seeds=seeds)


def test_a_grid_may_hold_the_learning_rate() -> None:
    method = {"name": "kd", "weight": 0.5, "grid": {"weight": [0.2, 1.0], "train.learning_rate": [0.03, 0.1]}}
    points = expand_grid(method)
    assert len(points) == 4
    assert {"name": "kd", "weight": 1.0, "train": {"learning_rate": 0.03}} in points
    loss, train = split_method(points[0], TrainRecipe(epochs=3))
    assert loss == {"name": "kd", "weight": 0.2}
    assert (train.learning_rate, train.epochs) == (0.03, 3)


@pytest.mark.parametrize("budget", [4, 8, 12])
def test_the_budget_is_the_same_for_all_and_spread_over_the_values(budget: int) -> None:
    recipe = recipe_with(
        budget,
        KD={"name": "kd", "weight": 0.8, "temperature": 4.0, "grid": GRID},
        CE={"name": "cross_entropy", "grid": {"train.learning_rate": [0.03, 0.1]}},
    )
    points = choose_points(recipe, "KD")
    assert len(points) == budget == len({str(point) for point in points})
    assert {"name": "kd", "weight": 0.8, "temperature": 4.0} in points, "the method's own options are among them"
    for option in GRID:
        assert set(Counter(point[option] for point in points).values()) == {budget // 4}
    assert points == choose_points(recipe, "KD")
    assert len(choose_points(recipe, "CE")) == 2
    recipe.seed = 1
    assert points != choose_points(recipe, "KD")


def test_the_first_point_holds_the_recipes_learning_rate() -> None:
    recipe = recipe_with(1, KD={"name": "kd", "grid": {"train.learning_rate": [0.03, 0.1], "weight": [0.2, 0.5]}})
    recipe.train.learning_rate = 0.1
    assert choose_points(recipe, "KD") == [{"name": "kd", "weight": 0.2, "train": {"learning_rate": 0.1}}]


def test_seeds_share_the_budget_and_the_pick_is_best_in_their_mean(tmp_path) -> None:
    recipe = recipe_with(8, 2, KD={"name": "kd", "grid": GRID})
    cells = plan_tuning(recipe)
    assert len(cells) == 8
    assert {cell.seed for cell in cells} == {0, 1}
    best, lucky = cells[1].loss, cells[2].loss
    for cell in cells:
        top1 = 80.0 if cell.loss == best else {0: 85.0, 1: 70.0}[cell.seed] if cell.loss == lucky else 60.0
        figures = {"top1": top1, "calibrated_cross_entropy": 1.0}
        write_json(cell_path(recipe, cell, tmp_path), {"meta_validation": figures})
    assert pick_options(recipe, tmp_path)["KD"] == best


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "kd", "grid": {"wight": [0.1, 0.2]}}, r"methods\.KD: loss 'kd': .* argument 'wight'"),
        ({"name": "kd", "grid": {"weight": 0.5}}, r"methods\.KD\.grid\.weight: 0\.5 is not a list of values to try"),
        ({"name": "kd", "grid": [0.5]}, r"methods\.KD\.grid: \[0\.5\] is not a mapping"),
        ({"name": "kd", "grid": {"train.lr": [0.1]}}, r"methods\.KD\.grid\.train\.lr'; nearest: "),
        ({"name": "kd", "train": {"learning_rate": "1e-1"}}, r"methods\.KD\.train\.learning_rate: '1e-1' is"),
        ({"name": "kd", "grid": {"train.learning_rate": [0.1, -1.0]}}, r"methods\.KD\.grid\.train\.learning_rate: -1"),
        ({"name": "kd", "train": {"epochs": 0}}, r"methods\.KD\.train\.epochs: 0"),
    ],
)
def test_a_bad_grid_is_one_line_before_any_training(method, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_methods(recipe_with(KD=method), IMAGES)


def test_a_bad_budget_is_one_line() -> None:
    with pytest.raises(UserError, match="tuning_trainings: 1 is not at least tuning_seeds, 2"):
        check_methods(recipe_with(1, 2, KD="kd"), IMAGES)
