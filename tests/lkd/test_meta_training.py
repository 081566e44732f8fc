"""The pool and the outer loop."""

import math
from functools import partial

import pytest
import torch

from lkd.config import DataRecipe, MetaTrainRecipe, ModelRecipe
from lkd.core.errors import UserError
from lkd.meta_training.checks import check_settings
from lkd.meta_training.outer_loop import OuterLoop
from lkd.meta_training.rollouts import build_inner_optimizer, compute_inner_loss
from lkd.pool.pool import build_pool, open_pool
from lkd.tracking.run import open_run
from lkd.training.build import choose_student, prepare_images
from meta import Problem, verify
from meta.estimators import ESTIMATORS
from tests.lkd.meta_recipes import build_loss_networks, run_recipe, tiny_recipe
from tests.lkd.parts import list_pool_parts, list_students, prepare_teacher

CPU = torch.device("cpu")


def make_loop(recipe: MetaTrainRecipe, images, teacher, *pools) -> OuterLoop:
    return OuterLoop(
        recipe, images, list_students(recipe, images), teacher, build_loss_networks(recipe), list(pools), CPU
    )


@pytest.fixture
def built():
    recipe = tiny_recipe()
    images = prepare_images(recipe.data)
    teacher = prepare_teacher(recipe.teacher, recipe.data, images, CPU)
    with open_run(recipe, "pool", quiet=True) as run:
        pool = build_pool(recipe, run.path / "pool", *list_pool_parts(recipe, images, teacher), run)
        yield recipe, images, teacher, pool, run


def test_the_pool_keeps_whole_students(built) -> None:
    _, _, _, pool, _ = built
    assert [entry["progress"] for entry in pool.index["students"]] == [0, 0.5, 1, 0, 0.5, 1]
    fresh, half, old = (pool.read(position, CPU) for position in range(3))
    assert fresh.state.optimizer == {}
    assert fresh.learning_rate == pytest.approx(0.1)
    assert half.learning_rate == pytest.approx(0.05)
    assert set(half.state.optimizer["momentum_buffer"]) == set(half.state.parameters)
    assert old.state.buffers["stages.stage1.1.num_batches_tracked"] == 20
    assert not torch.equal(fresh.state.parameters["classifier.weight"], old.state.parameters["classifier.weight"])


def test_a_pool_goes_on_where_it_stopped_and_is_refused_where_it_does_not_fit(built) -> None:
    recipe, images, teacher, pool, run = built
    before = {path: path.stat().st_mtime_ns for path in pool.folder.iterdir()}
    recipe.pool.students = 3
    grown = build_pool(recipe, pool.folder, *list_pool_parts(recipe, images, teacher), run)
    assert len(grown) == 9
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path.name != "index.json")
    architecture = choose_student(recipe.student, images.train).architecture
    other = prepare_images(DataRecipe(train_size=200, meta_validation_size=100, split_seed=1))
    with pytest.raises(UserError, match="may have seen meta-validation"):
        open_pool(pool.folder, other, architecture)
    with pytest.raises(UserError, match="holds small_cnn students, not small_mobilenet"):
        open_pool(pool.folder, images, choose_student(ModelRecipe("small_mobilenet"), images.train).architecture)
    with pytest.raises(UserError, match="holds no pool"):
        open_pool(run.path, images, architecture)


def test_the_hypergradient_of_the_loss_networks_is_right(built) -> None:
    """In float64, through a student with BatchNorm, momentum and weight decay, against central differences."""
    recipe, images, teacher, pool, _ = built
    training = make_loop(recipe, images, teacher, pool)
    (student,) = training.students
    student.double()
    training.loss.double()
    for parameter in training.loss.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    state = pool.read(1, CPU).state
    state = type(state)(
        *({k: v.double() if v.is_floating_point() else v for k, v in part.items()} for part in state[:2]),
        {slot: {k: v.double() for k, v in part.items()} for slot, part in state.optimizer.items()},
    )

    def widen(batch):
        return batch._replace(images=batch.images.double())

    from lkd.data import Batches

    batches = Batches(images.train, 20, seed=0)
    inner = [(widen(batches.at(k)), teacher(batches.at(k)), k / 3) for k in range(3)]
    inner = [(batch, answer._replace(logits=answer.logits.double()), progress) for batch, answer, progress in inner]
    outer = widen(images.meta_validation.batch(torch.arange(50), CPU))
    hyper = {name: parameter.detach() for name, parameter in training.loss.named_parameters()}
    optimizer = build_inner_optimizer(recipe.train, 0.05, "cosine", 3)
    inner_loss = partial(compute_inner_loss, student, training.loss)
    problem = Problem(inner_loss, training.problems.outer_loss(student), state, hyper, inner, outer, optimizer)
    results = {name: ESTIMATORS[name](problem) for name in ("unrolled", "higher")}
    for name, gradient in results["unrolled"].grads.items():
        torch.testing.assert_close(results["higher"].grads[name], gradient, rtol=1e-8, atol=1e-14)
    assert results["unrolled"].norm > 0
    checked = verify(ESTIMATORS["unrolled"], problem, step_size=1e-6)
    assert checked.relative_error < 1e-3


def test_meta_training_leaves_a_bad_balance() -> None:
    """With a teacher that answers at random everywhere, the learned loss must turn to the labels."""
    recipe = tiny_recipe(outer_steps=12, rollout_steps=15, learning_rate=0.1, outer_batch_size=100)
    recipe.meta.loss = {"initial_weight": 0.9}
    recipe.teacher.random_answers = 1.0
    recipe.pool.max_age = 0.0
    recipe.pool.snapshots = 1
    path = run_recipe(recipe)
    from lkd.losses.learned.file import load_loss, read_provenance

    curve = read_provenance(path)["curve"]
    assert len(curve) == 12
    assert curve[0]["loss/weight"] == pytest.approx(0.9, abs=1e-5)
    assert curve[-1]["loss/weight"] < 0.6
    assert all(math.isfinite(row["outer/hypergradient_norm"]) for row in curve)
    assert load_loss(path).parts["logits"].architecture["initial_weight"] == 0.9


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"estimator": "unroled"}, "nearest: unrolled"),
        ({"objective": "accuracy"}, "nearest: brier, calibrated_cross_entropy, cross_entropy"),
    ],
)
def test_impossible_settings_are_refused(setting, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_settings(tiny_recipe(**setting))
