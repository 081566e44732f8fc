"""The outer loop and its options, each against what it says; loss networks over features and several architectures."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lkd.config import DataRecipe, MetaTrainRecipe, ModelRecipe, TrainRecipe
from lkd.core.errors import UserError
from lkd.core.files import read_json
from lkd.core.outputs import Outputs
from lkd.core.tensor_files import digest
from lkd.data import Batches
from lkd.losses.build import build_loss, find_feature_parts, reads_features
from lkd.losses.learned.file import load_loss, read_provenance, save_loss
from lkd.meta_training.log import describe_reuse, describe_saturation, is_logged, is_pictured, measure_training_seconds
from lkd.meta_training.meta_train import check_meta_validation, check_schedule, check_schedules, check_settings
from lkd.meta_training.online_student import assemble_loss, copy_state
from lkd.meta_training.outer_loop import OuterGuard, OuterLoop
from lkd.meta_training.rollouts import build_inner_optimizer, compute_inner_loss
from lkd.meta_training.worlds import describe_pool
from lkd.pool.pool import Pool, World, count_pool_trainings
from lkd.training.build import choose_student, open_teacher, prepare_images
from meta import ESTIMATORS, Problem, rollout, verify
from tests.lkd.meta_recipes import (
    CPU,
    SMALL,
    YOUNG,
    build_loss_networks,
    load_pool,
    make_loop,
    open_world,
    run_recipe,
    tiny_recipe,
)
from tests.lkd.parts import VIT, prepare_learned_loss


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Pool:
    """A pool that many tests draw from."""
    folder = tmp_path_factory.mktemp("pool")
    run_recipe(tiny_recipe(SMALL, run_dir=str(folder), outer_steps=1))
    return load_pool(folder / "pool")


@pytest.fixture(scope="module")
def world() -> World:
    return open_world(tiny_recipe())


def draw_problem(recipe: MetaTrainRecipe, world: World, pool: Pool) -> Problem:
    """What the estimator is given at the first outer step."""
    return make_loop(recipe, world, pool).build_problem(0)


# ----------------------------------------------------------------------------------------------------------------------
# What a hypergradient is asked of.


def test_the_outer_batch_is_of_meta_validation_or_of_the_rollout(world, pool) -> None:
    outer = draw_problem(tiny_recipe(outer_batch_size=70), world, pool).outer_batch
    assert len(outer.index) == 70
    assert set(outer.index.tolist()) <= set(world.images.meta_validation.index.tolist())
    problem = draw_problem(tiny_recipe(batches="same", outer_batch_size=40), world, pool)
    batches, outer = [batch for batch, _, _ in problem.inner_batches], problem.outer_batch
    inner = {int(i): image for batch in batches for i, image in zip(batch.index, batch.images, strict=True)}
    assert len(inner) == 60
    assert len(set(outer.index.tolist())) == 40
    assert all(torch.equal(inner[int(i)], image) for i, image in zip(outer.index, outer.images, strict=True))


def test_momentum_is_restored_or_not(world, pool) -> None:
    latest = {"sampling": "latest"}
    problem = draw_problem(tiny_recipe(latest), world, pool)
    assert set(problem.state.optimizer["momentum_buffer"]) == set(problem.state.parameters)
    assert draw_problem(tiny_recipe(latest | {"restore_momentum": False}), world, pool).state.optimizer == {}


def test_the_outer_loss_sees_averaged_iterates(world, pool) -> None:
    """Against an average of the iterates of rollouts of one, two and three steps."""
    recipe = tiny_recipe({"sampling": "latest"}, average=0.8, annealing="constant")
    problem = draw_problem(recipe, world, pool)
    averaged, rate = problem.state.parameters, pool.read(1, world.student.make()).learning_rate
    for steps in (1, 2, 3):
        plain = build_inner_optimizer(world.student.make(), recipe.train, rate, "constant", 3)
        end = rollout(replace(problem, inner_batches=problem.inner_batches[:steps], optimizer=plain))
        averaged = {name: 0.8 * tensor + 0.2 * end.parameters[name] for name, tensor in averaged.items()}
    found = ESTIMATORS["first_order"](problem)
    at_average = problem.evaluate(end._replace(parameters=averaged)).item()
    assert found.outer_value.item() == pytest.approx(at_average, rel=1e-5)
    assert found.outer_value.item() != pytest.approx(problem.evaluate(end).item())


def test_rollouts_grow_and_dropout_is_a_function_of_the_step(world, pool) -> None:
    loop = make_loop(tiny_recipe(outer_steps=5, initial_rollout_steps=2, rollout_steps=10), world, pool)
    dropped = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        assert len(loop.build_problem(0).inner_batches) == 2
        dropped.append(torch.rand(3))
    assert torch.equal(*dropped)
    lengths = []
    for loop.step in range(5):
        lengths.append(loop.rollout_length())
    assert lengths == [2, 4, 6, 8, 10]


def test_the_hypergradient_of_the_loss_networks_is_right(world, pool) -> None:
    """In float64, through a student with BatchNorm, momentum and weight decay, against central differences."""
    loop = make_loop(tiny_recipe(), world, pool)
    (student,), images = loop.networks, world.images
    state = pool.read(1, student).state
    student.double()
    loop.loss.double()
    for parameter in loop.loss.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    state = type(state)(
        *({k: v.double() if v.is_floating_point() else v for k, v in part.items()} for part in state[:2]),
        {slot: {k: v.double() for k, v in part.items()} for slot, part in state.optimizer.items()},
    )

    def widen(batch):
        return batch._replace(images=batch.images.double())

    batches = [Batches(images.train, 20, seed=0).at(k) for k in range(3)]
    answers = [world.teacher(batch) for batch in batches]
    inner = [
        (widen(batch), answer._replace(logits=answer.logits.double()), k / 3)
        for k, (batch, answer) in enumerate(zip(batches, answers, strict=True))
    ]
    outer = widen(images.meta_validation.batch(torch.arange(50), CPU))
    hyper = {name: parameter.detach() for name, parameter in loop.loss.named_parameters()}
    optimizer = build_inner_optimizer(student, world.train, 0.05, "cosine", 3)
    inner_loss = partial(compute_inner_loss, student, loop.loss)
    problem = Problem(inner_loss, loop.outer_loss(student), state, hyper, inner, outer, optimizer)
    results = {name: ESTIMATORS[name](problem) for name in ("unrolled", "higher")}
    for name, gradient in results["unrolled"].grads.items():
        torch.testing.assert_close(results["higher"].grads[name], gradient, rtol=1e-8, atol=1e-14)
    assert results["unrolled"].norm > 0
    assert verify(ESTIMATORS["unrolled"], problem, step_size=1e-6).relative_error < 1e-3


def test_evolution_tries_other_directions_in_every_rollout(world, pool) -> None:
    """Of eight pairs each; were they the same, no hypergradient would leave the span of eight."""
    loop = make_loop(tiny_recipe(estimator="evolution", students_per_step=1, rollout_steps=1), world, pool)
    rows = []
    for loop.step in range(10):
        grads = loop.differentiate_pool_student(0).grads.values()
        rows.append(torch.cat([gradient.flatten() for gradient in grads]))
    assert torch.linalg.matrix_rank(torch.nn.functional.normalize(torch.stack(rows)), tol=1e-3) == 10


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs.


def test_architectures_take_turns_and_costs_are_in_student_trainings() -> None:
    recipe = tiny_recipe(SMALL | {"sampling": "fixed_step"}, outer_steps=2, students_per_step=3, reuse_every=2)
    recipe.meta.estimator = "first_order"
    recipe.students = [ModelRecipe("small_cnn"), ModelRecipe("small_mobilenet")]
    path = run_recipe(recipe)
    architectures = [read_json(path.parent / "pool" / str(n) / "index.json")["architecture"]["name"] for n in (0, 1)]
    assert architectures == ["small_cnn", "small_mobilenet"]
    provenance = read_provenance(path)
    # Ages 0 and 0.5 in turn for each: 0 0 0.5 | 0.5 0 0.
    assert [row["outer/progress"] for row in provenance["curve"]] == pytest.approx([0.5 / 3, 0.5 / 3])
    parts = provenance["parts_in_trainings"]
    assert parts["pool"] == 2 * 0.5
    assert parts["reuse"] == 2 * 2 * 0.5  # before and after the outer steps, of each architecture one of two epochs
    # Six rollouts of 3 steps, each step some plain steps' work, in units of 20 steps.
    assert 0.3 < parts["outer_steps"] < 20
    assert provenance["cost_in_trainings"] == pytest.approx(sum(parts.values()), abs=0.02)
    again = tiny_recipe(SMALL, run_dir="again")
    again.students, again.pool_dir = recipe.students[::-1], str(path.parent / "pool")
    assert describe_pool(again) == []
    again.data.label_noise, again.data.workers = 0.4, 7
    [said] = describe_pool(again)
    assert said.startswith("pool_dir: its students were trained with data.label_noise 0.0 (here 0.4); rollouts take")
    with pytest.raises(UserError, match=r"pool_dir: .* holds small_cnn students, not small_mobilenet"):
        run_recipe(again)
    again.students, again.run_dir = [], "third"
    with pytest.raises(UserError, match=r"pool_dir: .* holds no pool"):
        run_recipe(again)


def test_live_students_are_trained_with_the_loss_as_it_is(world, monkeypatch) -> None:
    monkeypatch.setattr("lkd.meta_training.meta_train.drop_superseded_pools", lambda *arguments: None)
    recipe = tiny_recipe(SMALL | {"sampling": "live", "refresh_every": 2}, outer_steps=5, learning_rate=0.1)
    recipe.meta.estimator, recipe.meta.students_per_step = "first_order", 1
    path = run_recipe(recipe)
    folders = sorted((path.parent / "live").iterdir())
    assert [folder.name for folder in folders] == ["step-000002", "step-000004"]
    first, *renewed = (load_pool(folder) for folder in (path.parent / "pool", *folders))
    trainings = [[entry["training"] for entry in pool.index["students"]] for pool in (first, *renewed)]
    assert trainings == [[0, 0], [1, 1], [2, 2]]
    assert read_provenance(path)["parts_in_trainings"]["pool"] == 1.5
    assert count_pool_trainings(recipe.pool, [first], 4) == 1.0
    assert count_pool_trainings(replace(recipe.pool, snapshots=1), [first], 4) == 0.5, "renewed at age 0"
    # Students trained again by the loss of that time are the same; by the initial loss they are not.
    loop = make_loop(recipe, world, first)
    for _ in range(2):
        loop.run_step()
    expected = renewed[0].read(1, world.student.make()).state.parameters
    for loss, same in ((loop.loss, True), (build_loss_networks(recipe), False)):
        training = world.start(loss.requires_grad_(False), 2000)
        for _ in range(10):
            training.run_step()
        found = training.student.named_parameters()
        assert all(torch.equal(parameter, expected[name]) for name, parameter in found) == same


def test_meta_training_leaves_a_bad_balance() -> None:
    """With a teacher that answers at random everywhere, the learned loss must turn to the labels."""
    recipe = tiny_recipe(YOUNG, outer_steps=8, rollout_steps=10, learning_rate=0.15, students_per_step=1)
    recipe.meta.estimator = "first_order"
    recipe.meta.outer_batch_size = 100
    recipe.meta.loss = {"initial_weight": 0.9}
    recipe.teacher.random_answers = 1.0
    path = run_recipe(recipe)
    curve = read_provenance(path)["curve"]
    assert len(curve) == 8
    assert curve[0]["loss/weight"] == pytest.approx(0.9, abs=1e-5)
    assert curve[-1]["loss/weight"] < 0.6
    assert all(math.isfinite(row["outer/hypergradient_norm"]) for row in curve)
    assert load_loss(path).parts["logits"].architecture["initial_weight"] == 0.9


# ----------------------------------------------------------------------------------------------------------------------
# What is refused before any long work.


@pytest.mark.parametrize(
    ("field", "pool", "meta"),
    [
        ("meta.estimator: .* nearest: unrolled", {}, {"estimator": "unroled"}),
        ("meta.objective", {}, {"objective": "accuracy"}),
        ("meta.initial_rollout_steps: 4 .* meta.rollout_steps 3", {}, {"initial_rollout_steps": 4}),
        ("meta.reuse_epochs: 3 .* train.epochs, 2", {}, {"reuse_every": 1, "reuse_epochs": 3}),
        ("train.schedule: step", {}, {"reuse_every": 1, "train": TrainRecipe(epochs=200, schedule="step")}),
        ("meta.reuse_patience: 2", {}, {"reuse_patience": 2}),
        ("meta.reference: .* needs looks", {}, {"reference": {"name": "cross_entropy"}}),
        ("pool.sampling: latest", {"sampling": "latest"}, {"interleaving": "alternate"}),
        ("pool_dir: pool", {}, {"interleaving": "alternate", "pool_dir": "pool"}),
        ("students_per_step: 2 .* 3 students", {}, {"interleaving": "alternate", "students": [ModelRecipe()] * 3}),
    ],
)
def test_impossible_settings_are_refused(field: str, pool, meta) -> None:
    others = {name: value for name, value in meta.items() if name in ("pool_dir", "students", "train")}
    own = {name: value for name, value in meta.items() if name not in others}
    with pytest.raises(UserError, match=field):
        check_settings(replace(tiny_recipe(pool, **own), **others))


def test_missing_classes_of_meta_validation_are_refused() -> None:
    check_meta_validation(prepare_images(DataRecipe(train_size=200, meta_validation_size=10)))
    images = prepare_images(DataRecipe(train_size=200, meta_validation_size=3))
    with pytest.raises(UserError, match=r"meta_validation_size: 3 images have none of 7 of 10 classes \(.*, \.\.\.\)"):
        check_meta_validation(images)


def test_rollouts_that_do_not_fit_into_the_training_are_refused(world, pool) -> None:
    for settings, meta, message in (
        ({"max_age": 0.9}, {"annealing": "constant"}, "meta.rollout_steps: 3 .* of age 0.9, which has 2 of 20"),
        ({"sampling": "latest"}, {}, "pool.max_age: rollouts would all start at the end"),
        ({"sampling": "gaussian", "gaussian_age": 1.5}, {}, "pool.gaussian_age: 1.5"),
    ):
        with pytest.raises(UserError, match=message):
            check_schedule(tiny_recipe(settings, **meta), world.images, [])
    check_schedule(tiny_recipe({"max_age": 0.85}, annealing="constant"), world.images, [])
    recipe = tiny_recipe({"max_age": 0.0}, annealing="constant", rollout_steps=11)
    check_schedule(recipe, world.images, [])
    with pytest.raises(UserError, match=r"11 steps at a constant rate .* of age 0.5, which has 10 of 20"):
        check_schedule(recipe, world.images, [pool])


def test_students_at_the_end_of_a_schedule_are_doubted(world, pool) -> None:
    def doubt(recipe, pools):
        opened = SimpleNamespace(recipe=recipe, world=SimpleNamespace(name=""), images=world.images)
        return check_schedules(recipe, [opened], pools)

    for max_age, train, warned in (
        (1.0, {}, True),
        (0.9, {}, False),
        (1.0, {"min_learning_rate": 1e-3}, False),
        (1.0, {"schedule": "constant"}, False),
    ):
        recipe = tiny_recipe({"max_age": max_age})
        recipe.train = replace(recipe.train, **train)
        assert bool(doubt(recipe, [])) == warned
    assert not doubt(tiny_recipe({"max_age": 1.0}), [pool]), "whose students are younger"


# ----------------------------------------------------------------------------------------------------------------------
# What keeps exploding hypergradients out, and what is logged.


def test_the_guard_leaves_out_what_is_far_above_the_median_and_shortens_rollouts() -> None:
    guard = OuterGuard(100.0)
    for step in range(1, 10):
        guard.record(step, [1.0], [], 100)
    assert guard.bound == math.inf, "nine norms are too few"
    guard.record(10, [2.0], [], 100)
    assert (guard.bound, guard.shorten(100)) == (100.0, 100)
    for step in (11, 12):
        said = guard.record(step, [], ["0: norm 1e+03 > 100"], 100)
        assert said == [f"outer step {step}: hypergradient left out: student 0: norm 1e+03 > 100"]
    assert guard.record(13, [], ["0: weight"], 100)[-1].endswith("rollouts are halved to 50 steps")
    assert (guard.shorten(100), guard.shorten(1), guard.bound) == (50, 1, math.inf)
    quiet = OuterGuard(100.0)
    quiet.record(1, [0.0] * 20, [], 100)
    assert quiet.bound == math.inf, "those that vanish say nothing of the others"
    quiet.record(2, [0.0, 0.5] * 10, [], 100)
    assert (quiet.bound, quiet.counted) == (50.0, 40)
    saved = OuterGuard(100.0)
    saved.load_state_dict(guard.state_dict())
    for step in (14, 15):
        saved.record(step, [], ["0: weight"], 1)
    assert "outer learning rate is halved to 0.5" in saved.record(16, [], ["0: weight"], 1)[-1]
    assert saved.rate == 0.5
    (line,) = saved.report()
    assert all(part in line for part in ("6 of 16", "halved 1 times", "ended at 0.5"))
    saved.record(17, [1.0], [], 1)
    assert saved.record(18, [], ["0: weight"], 1)[-1].startswith("outer step 18"), "the count starts anew"


def test_a_student_that_is_left_out_is_named_by_its_own_number(world, pool, monkeypatch) -> None:
    monkeypatch.setattr("lkd.meta_training.outer_loop.share_out", lambda count, name: range(count // 2, count))
    loop = make_loop(tiny_recipe(estimator="first_order"), world, pool)
    monkeypatch.setattr(loop, "estimator", lambda problem: ESTIMATORS["first_order"](problem)._replace(fault="x"))
    assert loop.run_step().left_out == ("1: x",), "of the second of two processes"


def test_a_loss_of_no_hypergradient_was_not_learned() -> None:
    recipe = tiny_recipe(YOUNG, outer_steps=1, estimator="first_order")
    recipe.train.learning_rate = 1e25
    provenance = read_provenance(run_recipe(recipe))
    assert provenance["hypergradients"]["counted"] == 0
    assert not provenance["learned"]


def test_clipped_hypergradients_are_so_while_the_loss_alternates_too() -> None:
    recipe = tiny_recipe(YOUNG, outer_steps=4, interleaving="both", clip_each=1e-4)
    curve = read_provenance(run_recipe(recipe))["curve"]
    assert all(0 < row["outer/hypergradient_norm"] < 1.001e-4 for row in curve)


def test_students_that_read_other_stages_share_a_teacher() -> None:
    recipe = tiny_recipe({**SMALL, "loss": "at"}, outer_steps=1, estimator="first_order")
    recipe.students = [ModelRecipe("small_cnn"), ModelRecipe("resnet8")]
    assert run_recipe(recipe).exists()


def test_where_nothing_that_is_learned_counts_it_is_said_before_and_after(capsys) -> None:
    """The universal loss falls back under a teacher whose answers are random; with trust hidden it does not."""
    recipe = tiny_recipe(YOUNG, outer_steps=2, estimator="first_order", start="universal", hide_trust=0.0)
    recipe.teacher.random_answers = 1.0
    provenance = read_provenance(run_recipe(recipe, quiet=False))
    said = capsys.readouterr().out
    assert said.index("nothing that is learned here will count") < said.index("all hypergradients were 0")
    assert provenance["hypergradients"]["vanished"] == provenance["hypergradients"]["counted"] > 0
    assert provenance["learned"], "as what it began with"


def test_the_cost_of_a_training_that_diverges_is_measured(world) -> None:
    diverging = replace(world, train=replace(world.train, learning_rate=1e20))
    assert measure_training_seconds([diverging], build_loss_networks(tiny_recipe())) > 0


def test_the_log_and_the_pictures_of_a_run_are_bounded() -> None:
    for steps in (1, 30, 1000, 1001, 10_000, 123_456):
        logged = [step for step in range(1, steps + 1) if is_logged(step, steps)]
        assert (logged[0], logged[-1]) == (1, steps)
        assert len(logged) == steps if steps <= 1000 else len(logged) <= 1001
    for steps, every, drawn in ((30, 10, 3), (1000, 10, 100), (1001, 10, 50), (10_000, 10, 100), (10_000, 3000, 3)):
        assert sum(is_pictured(step, steps, every) for step in range(1, steps + 1)) == drawn
        assert not is_pictured(every, steps, 0)


@pytest.mark.parametrize(
    ("step", "score", "said"), [(20, 0.5, ["step 20 of 30"]), (0, 2.302, ["not learned", "more than a guess"])]
)
def test_a_saved_loss_that_is_worth_nothing_is_said_to_be(step: int, score: float, said: list[str]) -> None:
    lines = describe_reuse({"step": step, "calibrated_cross_entropy": score}, 30, {"": 10})
    assert len(lines) == len(said)
    assert all(part in line for part, line in zip(said, lines, strict=True))


def test_the_worst_world_is_named_and_one_whose_students_guess_by_its_own_classes() -> None:
    best = {"step": 20, "regret": -0.05, "world/easy/regret": -0.2, "world/hard/regret": 0.1}
    best |= {"world/easy/calibrated_cross_entropy": 0.3, "world/hard/calibrated_cross_entropy": 4.61}
    _, regret, guess = describe_reuse(best, 30, {"easy": 10, "hard": 100})
    assert regret.endswith("+0.1000 in hard")
    assert guess.startswith("warning: hard: ")


CONVNEXT = {"patch_size": 2, "stem_type": "patch", "output_stride": 8, "depths": [1] * 4, "dims": [8, 8, 16, 16]}


@pytest.mark.parametrize("student", [VIT, ModelRecipe("convnext_atto", options=CONVNEXT)], ids=lambda each: each.name)
def test_a_loss_is_learned_with_a_modern_student_and_its_optimizer(student: ModelRecipe) -> None:
    """From a pool, with looks at reuse; by first_order, where attention has no double backward."""
    recipe = tiny_recipe(SMALL, estimator="first_order", reuse_every=3, learning_rate=0.1)
    recipe.student = replace(student, options=student.options | {"drop_path_rate": 0.1})
    recipe.train = TrainRecipe(
        epochs=2, batch_size=20, optimizer="adamw", learning_rate=2e-3, weight_decay=0.05, clip_norm=1.0,
        warmup_steps=3, label_smoothing=0.1, layer_decay=0.8,
    )  # fmt: skip
    provenance = read_provenance(run_recipe(recipe))
    assert provenance["hypergradients"]["counted"] == 6
    assert len(provenance["reuse"]) == 2


# ----------------------------------------------------------------------------------------------------------------------
# Loss networks over features.


def test_one_loss_over_features_is_learned_with_two_architectures(monkeypatch, capsys) -> None:
    """From pools and while it alternates; a part that is saturated is told once even if the run goes on later."""
    monkeypatch.setattr("lkd.meta_training.log.find_saturated", lambda shares: ["features"])
    recipe = tiny_recipe(YOUNG, outer_steps=3, interleaving="both", kind="features", checkpoint_every=1)
    recipe.students, recipe.resume = [ModelRecipe("small_cnn"), ModelRecipe("small_mobilenet")], "auto"
    run_step = OuterLoop.run_step
    with monkeypatch.context() as context:
        context.setattr(OuterLoop, "run_step", lambda loop: run_step(loop) if loop.step < 2 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_recipe(recipe, quiet=False)
    path = run_recipe(recipe, quiet=False)
    assert capsys.readouterr().out.count("warning: saturated") == 1
    initial = build_loss_networks(recipe).state_dict()
    last = load_loss(path).losses[-1].state_dict()
    changed = [name for name, tensor in last.items() if not torch.equal(tensor, initial[name])]
    assert any("features" in name for name in changed)
    for row in read_provenance(path)["curve"]:
        assert "loss/weight" not in row
        shares = {name: value for name, value in row.items() if name.startswith("share/")}
        assert set(shares) >= {"share/task/task", "share/features/places"}
        assert 0.5 < sum(shares.values()) < 1.0001


def test_a_loss_over_features_is_learned_over_worlds_and_gone_on_from() -> None:
    recipe = tiny_recipe(YOUNG, outer_steps=1, students_per_step=0, kind="both")
    recipe.worlds = {"clean": {}, "noisy": {"student": {"name": "small_mobilenet"}, "data": {"label_noise": 0.3}}}
    first = run_recipe(recipe)
    recipe.run_dir, recipe.meta.start = "more", str(first)
    before, after = load_loss(first).state_dict(), load_loss(run_recipe(recipe)).state_dict()
    assert before.keys() == after.keys()
    assert any("features" in name and not torch.equal(before[name], after[name]) for name in before)
    recipe.run_dir, recipe.worlds["other"] = "wrong", {"teacher": {"path": "random", "name": "tiny_cnn"}}
    with pytest.raises(UserError, match=r"worlds\.other\.teacher: its stages are .* meta\.kind logits"):
        run_recipe(recipe)


def test_a_replayed_loss_over_features_attaches_every_one_with_one_set_of_adapters(tmp_path: Path) -> None:
    recipe = tiny_recipe(kind="both", loss={"features": {"channels": 4}})
    images = prepare_images(recipe.data)
    networks = prepare_learned_loss(recipe, images)
    early = copy_state(networks)
    assert digest(copy_state(prepare_learned_loss(replace(recipe, seed=1), images))) != digest(early)
    late = {name: tensor + 0.3 for name, tensor in early.items()}
    path = tmp_path / "replayed.lkd.safetensors"
    save_loss(path, assemble_loss(networks, [(0.0, early), (0.5, late)]), {})
    assert reads_features(str(path))
    shape = images.train.image_shape
    networks = choose_student(recipe.student, images.train), open_teacher(recipe.teacher, images.train)
    stages = [network.find_stages(shape) for network in networks]
    loss = build_loss({"name": str(path), "adapters": True}, *stages)
    assert len(find_feature_parts(loss)) == 2
    assert loss.teacher_stages
    trained = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    assert len(trained) == len(find_feature_parts(loss)[0].adapters) == 3
    student, teacher = (
        Outputs(torch.randn(4, 10), {n: torch.randn(4, *s) for n, s in each.items()}) for each in stages
    )
    target = torch.arange(4)
    values = []
    for progress in (0.0, 0.9):
        total = sum(loss(student, teacher, target, progress).values())
        values.append(total.item())
        assert all(g.abs().sum() > 0 for g in torch.autograd.grad(total, trained))
    assert values[0] != values[1]


def test_a_saturated_part_is_described_and_a_teaching_one_is_not() -> None:
    row = {"outer/value": 1.0, "share/logits/task": 0.6, "share/features/places": 1e-6, "share/features/images": 1e-7}
    assert "features" in str(describe_saturation(row))
    assert "logits" not in str(describe_saturation(row))
    assert describe_saturation(row | {"share/features/images": 0.1}) is None
