"""The pool of students, how they are drawn by age, and their rollouts: stretches of ordinary trainings."""

import json
import math
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from lkd.config import DataRecipe, ModelRecipe, PoolSettings, TrainRecipe
from lkd.core.errors import UserError
from lkd.core.files import hash_file
from lkd.core.interrupt import Interrupted
from lkd.core.outputs import Outputs
from lkd.core.random import seeded_generator
from lkd.data import Batches
from lkd.losses.build import build_loss
from lkd.meta_training.rollouts import (
    OBJECTIVES,
    brier_score,
    build_inner_optimizer,
    build_rollout_batches,
    compute_inner_loss,
    compute_outer_logits,
    half_cosine,
    list_inner_batches,
    smoothed_error,
)
from lkd.pool import pool as pools
from lkd.pool.pool import open_pool
from lkd.pool.sampling import build_age_weights, check_sampling, find_drawable_ages
from lkd.tracking.run import open_run
from lkd.training.build import choose_student, prepare_images
from lkd.training.training import Training
from meta import Problem, State, rollout
from meta.optim import PerStep
from tests.lkd.meta_recipes import make_pool, open_world, tiny_recipe
from tests.lkd.parts import prepare_student

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
    hashes = [hash_file(pool.folder / entry["file"]) for entry in pool.index["students"]]
    assert [entry["sha256"] for entry in pool.index["students"]] == hashes, "by which another pool is noticed"
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path.name != "index.json")
    fresh, half, old = (pool.read(position, network) for position in range(3))
    assert fresh.state.optimizer == {}
    assert (fresh.learning_rate, half.learning_rate) == pytest.approx((0.1, 0.05))
    assert half.rate_in(recipe.train) == half.learning_rate
    assert half.rate_in(replace(recipe.train, learning_rate=0.001)) == pytest.approx(0.0005)
    assert half._replace(whole_rate=math.nan).rate_in(TrainRecipe(learning_rate=7.0)) == half.learning_rate
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


def test_rollouts_do_not_start_at_the_rate_of_a_warm_up() -> None:
    """That of a fresh student would be 0, and so would its hypergradient."""
    recipe = tiny_recipe({"students": 1})
    recipe.train = TrainRecipe(epochs=2, batch_size=20, learning_rate=0.2, learning_rate_for_batch=40, warmup_epochs=1)
    world = open_world(recipe)
    with open_run(recipe, "pool", quiet=True) as run:
        pool = make_pool(recipe, world, run.path / "pool", run)
    rates = [pool.read(position, world.student.make()).learning_rate for position in range(3)]
    assert rates == pytest.approx([0.1, 0.1 * half_cosine(0.5), 0])


@pytest.mark.parametrize("rank", [0, 1])
def test_pools_that_one_process_was_stopped_at_stop_all(rank: int, monkeypatch) -> None:
    """Those whose pools are done, too."""
    asked, worlds, run = [], [SimpleNamespace(name="a"), SimpleNamespace(name="b")], Mock()
    building = Mock(side_effect=Interrupted("in the middle") if rank == 0 else None)
    monkeypatch.setattr(pools, "build_pool", building)
    monkeypatch.setattr(pools, "count_processes", lambda: 2)
    monkeypatch.setattr(pools, "own_rank", lambda: rank)
    monkeypatch.setattr(pools, "any_process", lambda flag, _: asked.append(flag) or True)
    with pytest.raises(Interrupted, match="in the middle" if rank == 0 else "while pools are built"):
        pools.build_pools(worlds, PoolSettings(), [Mock()] * 2, Path("pool"), run)
    assert asked == [rank == 0]
    assert building.call_args.args[0] is worlds[rank], "each its own world"


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
    optimizer = PerStep(lambda step: (build_inner_optimizer(network, recipe.train, rates[step], "constant", 1), step))
    inner_loss = partial(compute_inner_loss, network, build_loss(recipe.pool.loss))
    end = rollout(Problem(inner_loss, partial(compute_outer_logits, network), half.state, {}, batches, None, optimizer))
    for name, parameter in training.student.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(end.parameters[name], parameter.detach(), rtol=1e-3, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Rollouts and outer objectives.

CPU = torch.device("cpu")


def test_progress_runs_from_the_age_to_the_end() -> None:
    images = prepare_images(DataRecipe(train_size=100, meta_validation_size=50)).train
    inner = list_inner_batches(Batches(images, 20, seed=3), lambda batch: Outputs(batch.target, {}), 0.2, 4, ())
    assert [progress for _, _, progress in inner] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert all(torch.equal(answer.logits, batch.target) for batch, answer, _ in inner)


def test_a_rollout_sees_its_images_as_often_as_it_is_told() -> None:
    images = prepare_images(DataRecipe(train_size=400, meta_validation_size=50)).train

    def draw(steps: int, epochs: int) -> Batches:
        return build_rollout_batches(images, TrainRecipe(batch_size=10), steps, epochs, 0, DataRecipe(), CPU)

    batches = draw(20, 5)
    assert len(batches.images) == 40
    seen = torch.cat([batches.at(step).index for step in range(20)])
    assert (seen.unique(return_counts=True)[1] == 5).all()
    assert torch.isin(seen, images.index).all()
    assert draw(20, 1).images is images
    assert (len(draw(900, 2).images), len(draw(3, 50).images)) == (400, 10)


@pytest.mark.parametrize(
    "optimization",
    [
        {"weight_decay": 5e-3, "nesterov": True},
        {"optimizer": "adam", "learning_rate": 0.01, "clip_norm": 0.5},
        {"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.1, "head_learning_rate": 0.03},
    ],
    ids=str,
)
def test_a_rollout_of_a_loss_without_parameters_is_a_training(optimization: dict) -> None:
    """Against torch's optimiser by timm's schedule: cosine over one epoch of five steps is the annealed rate."""
    images = prepare_images(DataRecipe(train_size=100, meta_validation_size=50)).train
    train = TrainRecipe(**{"epochs": 1, "batch_size": 20} | optimization)
    loss, student = build_loss({"name": "kd", "temperature": 2.0}), prepare_student(ModelRecipe(), images, 0, CPU)

    def teacher(batch) -> Outputs:
        return Outputs(torch.nn.functional.one_hot(batch.target, 10) * 3.0, {})

    batches = Batches(images, 20, seed=3)
    start = State(dict(student.named_parameters()), dict(student.named_buffers()), {}).detach()
    problem = Problem(
        partial(compute_inner_loss, student, loss),
        partial(compute_outer_logits, student),
        start,
        {},
        list_inner_batches(batches, teacher, 0.0, 5, ()),
        None,
        build_inner_optimizer(student, train, train.learning_rate, "cosine", 5),
    )
    end = rollout(problem)
    training = Training(student, loss, teacher, batches, train)
    for _ in range(5):
        training.run_step()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(end.parameters[name], parameter.detach(), rtol=1e-4, atol=1e-6)
    for name, buffer in student.named_buffers():
        torch.testing.assert_close(end.buffers[name], buffer, rtol=1e-4, atol=1e-6)


def test_brier_score_is_a_sum_over_samples_and_classes() -> None:
    logits, target = torch.randn(4, 3, dtype=torch.float64), [2, 0, 1, 1]
    total = 0.0
    for row, label in zip(logits.tolist(), target, strict=True):
        powers = [2.718281828459045**value for value in row]
        total += sum((power / sum(powers) - (label == c)) ** 2 for c, power in enumerate(powers))
    assert brier_score(logits, torch.tensor(target)).item() == pytest.approx(total / 4, rel=1e-12)


def test_smoothed_error_becomes_the_error_rate() -> None:
    logits, target = torch.randn(200, 5, dtype=torch.float64), torch.randint(5, (200,))
    error = (logits.argmax(1) != target).double().mean()
    assert smoothed_error(1e6 * logits, target).item() == pytest.approx(error.item(), abs=1e-6)
    two = torch.tensor([[1.0, 0.0]])
    assert smoothed_error(two, torch.tensor([1])).item() == pytest.approx(1 / (1 + 2.718281828**-1.0))


@pytest.mark.parametrize(("name", "classes"), [(name, classes) for classes, name in enumerate(OBJECTIVES, 2)])
def test_objectives_have_the_gradient_of_finite_differences_and_ignore_shifts(name: str, classes: int) -> None:
    objective, target = OBJECTIVES[name], torch.randint(classes, (30,))
    logits = torch.randn(30, classes, dtype=torch.float64, requires_grad=True)
    value = objective(logits, target)
    (gradient,) = torch.autograd.grad(value, logits)
    direction = torch.randn_like(logits)
    with torch.no_grad():
        ahead, behind = (objective(logits + step * direction, target) for step in (1e-5, -1e-5))
        shifted = objective(logits + torch.randn(30, 1, dtype=torch.float64), target)
    assert ((ahead - behind) / 2e-5).item() == pytest.approx((gradient * direction).sum().item(), rel=1e-4, abs=1e-7)
    assert shifted.item() == pytest.approx(value.item(), rel=1e-9)
