"""The pool of students, and how they are drawn by age."""

import json
import math
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from lkd.config import DataRecipe, ModelRecipe, PoolSettings, TrainRecipe
from lkd.core.errors import UserError
from lkd.core.random import seeded_generator
from lkd.losses.build import build_loss
from lkd.meta_training.rollouts import (
    build_inner_optimizer,
    compute_inner_loss,
    compute_outer_logits,
    half_cosine,
)
from lkd.pool.pool import open_pool
from lkd.pool.sampling import build_age_weights, check_sampling, find_drawable_ages
from lkd.tracking.run import open_run
from lkd.training.build import choose_student, prepare_images
from meta import Problem, rollout
from meta.optim import PerStep
from tests.lkd.meta_recipes import make_pool, open_world, tiny_recipe

AGES = torch.tensor([0, 0.25, 0.5] * 2, dtype=torch.float64)  # of two trainings


def test_a_pool_keeps_whole_students_and_goes_on_where_it_stopped() -> None:
    recipe = tiny_recipe({"students": 1})
    world = open_world(recipe)
    images, network = world.images, world.student.make()
    with open_run(recipe, "pool", quiet=True) as run:
        pool = make_pool(recipe, world, run.path / "pool", run)
        before = {path: path.stat().st_mtime_ns for path in pool.folder.iterdir()}
        recipe.pool.students = 2
        pool = make_pool(recipe, world, pool.folder, run)
    assert [entry["progress"] for entry in pool.index["students"]] == [0, 0.5, 1] * 2
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path.name != "index.json")
    fresh, half, old = (pool.read(position, network) for position in range(3))
    assert fresh.state.optimizer == {}
    assert (fresh.learning_rate, half.learning_rate) == pytest.approx((0.1, 0.05))
    assert set(half.state.optimizer["momentum_buffer"]) == set(half.state.parameters)
    assert old.state.buffers["stages.stage1.1.num_batches_tracked"] == 20
    assert not torch.equal(fresh.state.parameters["classifier.weight"], old.state.parameters["classifier.weight"])

    architecture = world.student.architecture
    other = prepare_images(DataRecipe(train_size=200, meta_validation_size=100, split_seed=1))
    with pytest.raises(UserError, match="may have seen meta-validation"):
        open_pool(pool.folder, other, architecture)
    with pytest.raises(UserError, match="holds small_cnn students, not small_mobilenet"):
        open_pool(pool.folder, images, choose_student(ModelRecipe("small_mobilenet"), images.train).architecture)
    with pytest.raises(UserError, match="holds no pool"):
        open_pool(Path(), images, architecture)


def test_a_diverging_student_is_kept_up_to_its_divergence() -> None:
    recipe = tiny_recipe({"students": 1})
    recipe.train.learning_rate = 1e20
    world = open_world(recipe)
    with open_run(recipe, "pool", quiet=True) as run:
        pool = make_pool(recipe, world, run.path / "pool", run)
    assert pool.ages.tolist() == [0.0]
    kept = pool.read(0, world.student.make()).state.parameters
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())
    assert "student 0 of the pool has no ages after this: step" in Path("run/output.txt").read_text()


def draw_positions(settings: PoolSettings, count: int = 600) -> list[int]:
    weights = build_age_weights(settings)
    return [int(torch.multinomial(weights(AGES, n), 1, generator=seeded_generator(0, n))) for n in range(count)]


def draw_ages(settings: PoolSettings, count: int = 600) -> list[float]:
    return AGES[draw_positions(settings, count)].tolist()


def test_every_student_is_drawn_equally_often() -> None:
    for sampling in ("uniform", "live"):
        counts = Counter(draw_positions(PoolSettings(sampling=sampling)))
        assert all(70 < counts[position] < 130 for position in range(6))


def test_gaussian_sampling_follows_the_bell() -> None:
    counts = Counter(draw_ages(PoolSettings(sampling="gaussian", gaussian_age=0.25, gaussian_spread=0.25)))
    side = math.exp(-0.5) / (1 + 2 * math.exp(-0.5))
    for age, share in ((0, side), (0.25, 1 - 2 * side), (0.5, side)):
        assert counts[age] == pytest.approx(600 * share, abs=4 * math.sqrt(600 * share * (1 - share)))
    narrow = PoolSettings(sampling="gaussian", gaussian_age=0.3, gaussian_spread=1e-9)
    assert set(draw_ages(narrow, 20)) == {0.25}


def test_fixed_steps_walk_through_the_ages_and_latest_stays_at_the_last() -> None:
    settings = PoolSettings(sampling="fixed_step")
    assert draw_ages(settings, 7) == [0, 0.25, 0.5, 0, 0.25, 0.5, 0]
    assert {position for n, position in enumerate(draw_positions(settings, 90)) if n % 3 == 1} == {1, 4}
    assert set(draw_ages(PoolSettings(sampling="latest"), 20)) == {0.5}


def test_fidelity_interpolates_what_the_file_says() -> None:
    Path("fidelity.json").write_text(json.dumps({"age_weights": [[0.4, 0.0], [0.1, 0.9], [0.2, 0.5]], "rows": []}))
    settings = PoolSettings(sampling="fidelity", fidelity_file="fidelity.json")
    ages = torch.tensor([0, 0.1, 0.13, 0.2, 0.39, 0.4, 1.0], dtype=torch.float64)
    expected = [0.9, 0.9, 0.9 - 0.03 * 4, 0.5, 0.01 * 2.5, 0, 0]
    np.testing.assert_allclose(build_age_weights(settings)(ages, 0).numpy(), expected, atol=1e-12)
    assert find_drawable_ages(build_age_weights(settings), AGES).tolist() == [0, 0.25]
    with pytest.raises(UserError, match=r"gives no weight to any age of the pool \(0.5 to 1\)"):
        check_sampling(settings, torch.tensor([0.5, 1.0], dtype=torch.float64))
    Path("fidelity.json").write_text(json.dumps({"age_weights": [[0.1, 2.0]]}))
    assert build_age_weights(settings)(AGES, 0).tolist() == [2.0] * 6


@pytest.mark.parametrize("content", ["{", "[]", "[[0, -1]]", "[[0, NaN]]", "[[0, 1], [0, 2]]", '[[0, "x"]]', None])
def test_bad_fidelity_files_are_refused(content: str | None) -> None:
    if content is not None:
        Path("fidelity.json").write_text(f'{{"age_weights": {content}}}' if "[" in content else content)
    with pytest.raises(UserError, match=r"fidelity\.json"):
        build_age_weights(PoolSettings(sampling="fidelity", fidelity_file="fidelity.json"))


def test_impossible_sampling_is_refused() -> None:
    with pytest.raises(UserError, match=r"gaussian_age: 0.7 is outside the pool.*from 0 to 0.5"):
        check_sampling(PoolSettings(sampling="gaussian", gaussian_age=0.7), AGES)
    with pytest.raises(UserError, match="fidelity_file: missing"):
        check_sampling(PoolSettings(sampling="fidelity"), AGES)


def test_a_pool_of_adamw_keeps_its_moments_and_not_what_is_frozen() -> None:
    """A rollout from the file, with what is kept there, takes the training's own next steps."""
    recipe = tiny_recipe({"students": 1})
    recipe.student.freeze = ["stages.stage1"]
    recipe.train = TrainRecipe(epochs=2, batch_size=20, optimizer="adamw", learning_rate=3e-3, clip_norm=1.0)
    world = open_world(recipe)
    with open_run(recipe, "pool", quiet=True) as run:
        pool = make_pool(recipe, world, run.path / "pool", run)
    network = world.student.make().train()
    half = pool.read(1, network)
    assert {name.split(".")[1] for name in half.state.parameters if name.startswith("stages")} >= {"stage2"}
    assert not any(name.startswith("stages.stage1") for name in half.state.parameters)
    slots = half.state.optimizer
    assert slots.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert all(kept.keys() == half.state.parameters.keys() for kept in slots.values())
    assert {float(step) for step in slots["step"].values()} == {10.0}
    seed = world.seed + 1000
    training = world.start(build_loss(recipe.pool.loss), seed)
    batches = []
    for _ in range(13):
        training.run_step(batches.append if training.step >= 10 else None)
    rates = [0.003 * half_cosine(step / 20) for step in (10, 11, 12)]
    optimizer = PerStep(
        lambda step: (build_inner_optimizer(network, recipe.train, rates[step], "constant", 1), step),
    )
    inner_loss = partial(compute_inner_loss, network, build_loss(recipe.pool.loss))
    end = rollout(Problem(inner_loss, partial(compute_outer_logits, network), half.state, {}, batches, None, optimizer))
    for name, parameter in training.student.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(end.parameters[name], parameter.detach(), rtol=1e-3, atol=1e-5)
