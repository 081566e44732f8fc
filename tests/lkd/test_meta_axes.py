"""The options of meta-training, each against what it says; runs that are killed and gone on with."""

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

from lkd.config import DataRecipe, MetaTrainRecipe, ModelRecipe
from lkd.core.errors import UserError
from lkd.core.files import read_json
from lkd.core.outputs import Outputs
from lkd.data import Batch
from lkd.losses import DecoupledLoss, DistillationLoss, LearnedLoss
from lkd.losses.learned.file import read_provenance
from lkd.meta_training.checks import check_meta_validation, check_schedule, check_settings
from lkd.meta_training.log import summarize_cost
from lkd.meta_training.outer_loop import OuterLoop
from lkd.meta_training.rollouts import build_inner_optimizer
from lkd.pool.pool import Pool, count_pool_trainings, open_pool
from lkd.training.build import prepare_images
from meta import ESTIMATORS, Hypergradient, Problem, rollout
from tests.lkd.meta_recipes import build_loss_networks, run_recipe, tiny_recipe
from tests.lkd.parts import list_students, prepare_teacher, start_training

CPU = torch.device("cpu")
SMALL = {"max_age": 0.5, "snapshots": 2, "students": 1}


class Captured(Exception):
    """Ends a step once the estimator has been called."""


@pytest.fixture(scope="module")
def pool_dir(tmp_path_factory) -> Path:
    """A pool that many tests draw from."""
    folder = tmp_path_factory.mktemp("pool")
    run_recipe(tiny_recipe(SMALL, run_dir=str(folder), outer_steps=1))
    return folder / "pool"


def capture_problem(recipe: MetaTrainRecipe, pool_dir: Path, number: int = 0):
    """What the estimator would be given at the first outer step."""
    images = prepare_images(recipe.data)
    index = read_json(pool_dir / "index.json")
    loop = OuterLoop(
        recipe,
        images,
        list_students(recipe, images),
        answer_zero,
        build_loss_networks(recipe),
        [Pool(pool_dir, index)],
        CPU,
    )
    caught = []

    def estimator(problem: Problem) -> Hypergradient:
        caught.append(problem)
        raise Captured

    loop.estimator = estimator
    with pytest.raises(Captured):
        loop.differentiate_pool_student(number)
    return images, loop, caught[0]


def answer_zero(batch: Batch) -> Outputs:
    return Outputs(torch.zeros(len(batch.target), 10), {})


def test_the_outer_batch_is_of_meta_validation_or_of_the_rollout(pool_dir) -> None:
    images, _, problem = capture_problem(tiny_recipe(outer_batch_size=70), pool_dir)
    assert len(problem.outer_batch.index) == 70
    assert set(problem.outer_batch.index.tolist()) <= set(images.meta_validation.index.tolist())
    _, _, problem = capture_problem(tiny_recipe(batches="same", outer_batch_size=40), pool_dir)
    batches, outer = [batch for batch, _, _ in problem.inner_batches], problem.outer_batch
    inner = {int(i): image for batch in batches for i, image in zip(batch.index, batch.images, strict=True)}
    assert len(inner) == 60
    assert len(set(outer.index.tolist())) == 40
    assert all(torch.equal(inner[int(i)], image) for i, image in zip(outer.index, outer.images, strict=True))
    _, _, problem = capture_problem(tiny_recipe(batches="same", outer_batch_size=1000), pool_dir)
    assert set(problem.outer_batch.index.tolist()) == set(inner)


def test_momentum_is_restored_or_not(pool_dir) -> None:
    latest = {"sampling": "latest"}
    _, _, problem = capture_problem(tiny_recipe(latest), pool_dir)
    assert set(problem.state.optimizer["momentum_buffer"]) == set(problem.state.parameters)
    _, _, problem = capture_problem(tiny_recipe(latest | {"restore_momentum": False}), pool_dir)
    assert problem.state.optimizer == {}


def test_the_outer_loss_sees_averaged_iterates(pool_dir) -> None:
    """Against an average of the iterates of rollouts of one, two and three steps."""
    recipe = tiny_recipe({"sampling": "latest"}, average=0.8, annealing="constant")
    _, loop, problem = capture_problem(recipe, pool_dir)
    averaged = problem.state.parameters
    for steps in (1, 2, 3):
        plain = build_inner_optimizer(recipe.train, loop.pools[0].read(1, CPU).learning_rate, "constant", 3)
        end = rollout(replace(problem, inner_batches=problem.inner_batches[:steps], optimizer=plain))
        averaged = {name: 0.8 * tensor + 0.2 * end.parameters[name] for name, tensor in averaged.items()}
    found = ESTIMATORS["first_order"](problem)
    at_average = problem.evaluate(end._replace(parameters=averaged)).item()
    assert found.outer_value.item() == pytest.approx(at_average, rel=1e-5)
    assert found.outer_value.item() != pytest.approx(problem.evaluate(end).item())


def test_rollouts_grow(pool_dir) -> None:
    recipe = tiny_recipe(outer_steps=5, initial_rollout_steps=2, rollout_steps=10)
    _, loop, problem = capture_problem(recipe, pool_dir)
    assert len(problem.inner_batches) == 2
    lengths = []
    for loop.step in range(5):
        lengths.append(loop.rollout_length())
    assert lengths == [2, 4, 6, 8, 10]
    loop.settings.initial_rollout_steps = 0
    assert loop.rollout_length() == 10


def test_dropout_is_a_function_of_the_step(pool_dir) -> None:
    torch.manual_seed(1)
    capture_problem(tiny_recipe(), pool_dir)
    first = torch.rand(3)
    torch.manual_seed(2)
    capture_problem(tiny_recipe(), pool_dir)
    assert torch.equal(torch.rand(3), first)


def test_architectures_take_turns_and_share_the_loss() -> None:
    recipe = tiny_recipe(SMALL | {"sampling": "fixed_step"}, outer_steps=2, students_per_step=3)
    recipe.students = [ModelRecipe("small_cnn"), ModelRecipe("small_mobilenet")]
    path = run_recipe(recipe)
    architectures = [read_json(path.parent / "pool" / str(n) / "index.json")["architecture"]["name"] for n in (0, 1)]
    assert architectures == ["small_cnn", "small_mobilenet"]
    rows = read_provenance(path)["curve"]
    # Ages 0 and 0.5 in turn for each: 0 0 0.5 | 0.5 0 0.
    assert [row["outer/progress"] for row in rows] == pytest.approx([0.5 / 3, 0.5 / 3])
    again = tiny_recipe(SMALL, run_dir="again")
    again.students, again.pool_dir = recipe.students[::-1], str(path.parent / "pool")
    with pytest.raises(UserError, match="holds small_cnn students, not small_mobilenet"):
        run_recipe(again)
    again.students, again.run_dir = [], "third"
    with pytest.raises(UserError, match="holds no pool"):
        run_recipe(again)


def test_live_students_are_trained_with_the_loss_as_it_is(monkeypatch) -> None:
    monkeypatch.setattr("lkd.meta_training.meta_train.drop_superseded_pools", lambda *arguments: None)
    recipe = tiny_recipe(SMALL | {"sampling": "live", "refresh_every": 2}, outer_steps=5, learning_rate=0.1)
    path = run_recipe(recipe)
    folders = sorted((path.parent / "live").iterdir())
    assert [folder.name for folder in folders] == ["step-000002", "step-000004"]
    images = prepare_images(recipe.data)
    first = read_json(path.parent / "pool" / "index.json")
    pools = [open_pool(folder, images, first["architecture"]) for folder in (path.parent / "pool", *folders)]
    assert [[entry["training"] for entry in pool.index["students"]] for pool in pools] == [[0, 0], [1, 1], [2, 2]]
    assert read_provenance(path)["parts_in_trainings"]["pool"] == 1.5
    assert count_pool_trainings(recipe, pools[:1], 4) == 1.0
    # Students trained again by the loss of that time are the same; by the initial loss they are not.
    assert retrain(recipe, pools[1], loss_after(recipe, 2, path.parent / "pool"))
    assert not retrain(recipe, pools[1], build_loss_networks(recipe))


def loss_after(recipe: MetaTrainRecipe, steps: int, folder: Path) -> LearnedLoss:
    images, teacher = prepared(recipe)
    pool = Pool(folder, read_json(folder / "index.json"))
    loop = OuterLoop(recipe, images, list_students(recipe, images), teacher, build_loss_networks(recipe), [pool], CPU)
    for _ in range(steps):
        loop.run_step()
    return loop.loss


def prepared(recipe: MetaTrainRecipe):
    images = prepare_images(recipe.data)
    return images, prepare_teacher(recipe.teacher, recipe.data, images, CPU)


def retrain(recipe: MetaTrainRecipe, pool: Pool, loss: LearnedLoss) -> bool:
    """Whether a student trained with this loss is the pool's last one."""
    images, teacher = prepared(recipe)
    training = start_training(
        recipe.student, images.train, loss.requires_grad_(False), teacher, recipe.train, DataRecipe(), 2000, CPU
    )
    for _ in range(10):
        training.run_step()
    expected = pool.read(1, CPU).state.parameters
    return all(torch.equal(parameter, expected[name]) for name, parameter in training.student.named_parameters())


def test_costs_are_in_student_trainings() -> None:
    path = run_recipe(tiny_recipe(outer_steps=2, reuse_every=1, reuse_epochs=1))
    provenance = read_provenance(path)
    parts = provenance["parts_in_trainings"]
    assert parts["pool"] == 2  # two students up to their end
    assert parts["reuse"] == 3 * 0.5  # before, between and after two outer steps, one of two epochs each
    # Six rollouts of 3 steps, each step some plain steps' work, in units of 20 steps.
    assert 0.3 < parts["outer_steps"] < 20
    assert provenance["cost_in_trainings"] == pytest.approx(sum(parts.values()), abs=0.02)
    cost = summarize_cost(1.5, 0.5, outer_seconds=30, training_seconds=10)
    assert cost["cost_in_trainings"] == 5


@pytest.mark.parametrize(
    ("pool", "meta", "message"),
    [
        ({}, {"initial_rollout_steps": 4}, "initial_rollout_steps: 4 is not between 0 .* and meta.rollout_steps 3"),
        ({}, {"reuse_every": 1, "reuse_epochs": 3}, r"reuse_epochs: 3 is not between 0 .* and train.epochs, 2"),
        ({}, {"reuse_patience": 2}, "reuse_patience: 2 needs looks at reuse"),
        ({"sampling": "latest"}, {"interleaving": "alternate"}, "pool.sampling: latest is not used"),
    ],
)
def test_impossible_settings_are_refused(pool, meta, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_settings(tiny_recipe(pool, **meta))


def test_what_alternation_would_not_use_is_refused() -> None:
    recipe = tiny_recipe(interleaving="alternate")
    recipe.pool_dir = "pool"
    with pytest.raises(UserError, match="pool_dir: pool is not used by"):
        check_settings(recipe)
    recipe.pool_dir, recipe.students = None, [ModelRecipe()] * 3
    with pytest.raises(UserError, match="students_per_step: 2 leaves out some of the 3 students"):
        check_settings(recipe)


def test_missing_classes_of_meta_validation_are_refused() -> None:
    check_meta_validation(prepare_images(DataRecipe(train_size=200, meta_validation_size=10)))
    images = prepare_images(DataRecipe(train_size=200, meta_validation_size=3))
    with pytest.raises(UserError, match=r"3 images have none of 7 of 10 classes \(.*, \.\.\.\); take more"):
        check_meta_validation(images)


@pytest.mark.parametrize(
    ("pool", "meta", "message"),
    [
        ({"max_age": 0.9}, {"annealing": "constant"}, "3 steps at a constant rate .* of age 0.9, which has 2 of 20"),
        ({"sampling": "latest"}, {}, "rollouts would all start at the end of the training"),
        ({"sampling": "gaussian", "gaussian_age": 1.5}, {}, "gaussian_age: 1.5 is outside the pool"),
    ],
)
def test_rollouts_that_do_not_fit_into_the_training_are_refused(pool, meta, message: str) -> None:
    recipe = tiny_recipe(pool, **meta)
    images = prepare_images(recipe.data)
    with pytest.raises(UserError, match=message):
        check_schedule(recipe, images, [])
    check_schedule(tiny_recipe({"max_age": 0.85}, annealing="constant"), images, [])


def test_ages_of_an_opened_pool_count(pool_dir) -> None:
    recipe = tiny_recipe({"max_age": 0.0}, annealing="constant", rollout_steps=11)
    images = prepare_images(recipe.data)
    check_schedule(recipe, images, [])
    pool = open_pool(pool_dir, images, read_json(pool_dir / "index.json")["architecture"])
    with pytest.raises(UserError, match=r"11 steps at a constant rate .* of age 0.5, which has 10 of 20"):
        check_schedule(recipe, images, [pool])


def test_a_pool_of_another_split_is_a_leak(pool_dir) -> None:
    recipe = tiny_recipe(run_dir="other")
    recipe.pool_dir, recipe.data.split_seed = str(pool_dir), 1
    with pytest.raises(UserError, match="its students may have seen meta-validation images"):
        run_recipe(recipe)


class FeaturePart(DistillationLoss):
    """A loss network over one stage of both networks."""

    architecture: ClassVar[dict] = {}
    teacher_stages = ("stage2",)

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, student: Outputs, teacher: Outputs, target, progress=None) -> dict[str, torch.Tensor]:
        assert set(teacher.features) == {"stage2"}
        a, b = (outputs.features["stage2"].mean((1, 2, 3)) for outputs in (student, teacher))
        return {"difference": self.weight.exp() * (a - b).square().mean()}


@pytest.mark.parametrize("interleaving", ["before", "alternate"])
def test_the_teachers_stages_that_the_loss_reads_are_given_to_it(interleaving: str, monkeypatch) -> None:
    def build(*_) -> LearnedLoss:
        return LearnedLoss({"logits": DecoupledLoss(), "features": FeaturePart()})

    monkeypatch.setattr("lkd.meta_training.meta_train.prepare_learned_loss", build)
    path = run_recipe(tiny_recipe(SMALL, interleaving=interleaving, reuse_every=3, reuse_epochs=1))
    changed = [key for key, tensor in load_file(path).items() if "features" in key and tensor != 0]
    assert changed
