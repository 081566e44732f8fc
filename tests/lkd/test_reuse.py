"""The best loss by reuse is saved, not the last one."""

from pathlib import Path

import pytest
import torch

from lkd.config import DataRecipe, TrainRecipe
from lkd.core.interrupt import StopRequest
from lkd.losses import ReplayedLoss
from lkd.losses.learned.file import load_loss, read_provenance
from lkd.meta_training.online_student import copy_state, draw_seed
from lkd.meta_training.outer_loop import OuterLoop
from lkd.meta_training.reuse import Reuse, shorten
from lkd.tracking.run import Run
from lkd.training.build import prepare_images
from lkd.training.evaluate import evaluate
from lkd.training.training import DivergedError, Training
from tests.lkd.meta_recipes import build_loss_networks, run_recipe, tiny_recipe
from tests.lkd.parts import list_students, prepare_teacher, start_training

CPU = torch.device("cpu")


def make_reuse(recipe) -> Reuse:
    images = prepare_images(recipe.data)
    teacher = prepare_teacher(recipe.teacher, recipe.data, images, CPU)
    return Reuse(
        recipe, list_students(recipe, images), images, teacher, Run(Path("run"), CPU, None, "meta-train", quiet=True)
    )


def script_scores(monkeypatch, scores: list[float]) -> None:
    remaining = iter(scores)
    figures = {"top1": 50.0}
    monkeypatch.setattr(Reuse, "train_student", lambda *_: figures | {"calibrated_cross_entropy": next(remaining)})


@pytest.mark.parametrize(
    ("scores", "best", "last"),
    [([3, 2, 1, 2], 4, 5), ([1, 2, 3, 4], 0, 5), ([3, 1, 1, 2], 2, 5), ([1, float("inf"), 2, 0.5], 5, 5)],
)
def test_the_loss_of_the_best_look_is_saved(monkeypatch, scores, best: int, last: int) -> None:
    """Looks come before steps 0, 2 and 4 and after the last, the fifth; of equals the first one wins."""
    script_scores(monkeypatch, scores)
    seen, step = {}, OuterLoop.run_step

    def run_step(loop):
        seen[loop.step] = copy_state(loop.loss)
        result = step(loop)
        seen[loop.step] = copy_state(loop.loss)
        return result

    monkeypatch.setattr(OuterLoop, "run_step", run_step)
    recipe = tiny_recipe({"max_age": 0.0, "snapshots": 1}, outer_steps=5, reuse_every=2, reuse_epochs=1)
    path = run_recipe(recipe)
    assert [row["step"] for row in read_provenance(path)["reuse"]] == [0, 2, 4, 5]
    saved = load_loss(path).state_dict()
    assert all(torch.equal(tensor, seen[best][name]) for name, tensor in saved.items())
    assert max(seen) == last


def test_patience_ends_meta_training(monkeypatch) -> None:
    script_scores(monkeypatch, [2, 1, 3, 1, 0])
    pool = {"max_age": 0.0, "snapshots": 1}
    path = run_recipe(tiny_recipe(pool, outer_steps=9, reuse_every=1, reuse_epochs=1, reuse_patience=2))
    provenance = read_provenance(path)
    assert [row["step"] for row in provenance["reuse"]] == [0, 1, 2, 3]
    assert len(provenance["curve"]) == 3


def test_while_the_loss_alternates_its_course_so_far_is_tried(monkeypatch) -> None:
    script_scores(monkeypatch, [3, 2, 3, 4, 5])
    recipe = tiny_recipe(interleaving="alternate", outer_steps=4, reuse_every=1, reuse_epochs=1)
    loss = load_loss(run_recipe(recipe))
    assert isinstance(loss, ReplayedLoss)
    assert loss.starts == [0, 0.25]


def test_a_look_is_fresh_short_trainings_with_the_loss_frozen() -> None:
    recipe = tiny_recipe(reuse_every=1, reuse_students=2, reuse_epochs=1)
    reuse, loss = make_reuse(recipe), build_loss_networks(recipe)
    before = copy_state(loss)
    row = reuse.look(0, loss, [(0.0, before)], StopRequest())
    short = TrainRecipe(epochs=1, batch_size=20)
    figures = []
    for number in range(2):
        training = start_training(
            recipe.student,
            reuse.images.train,
            loss.requires_grad_(False),
            reuse.teacher,
            short,
            DataRecipe(),
            draw_seed(0, 7, number),
            CPU,
        )
        for _ in range(10):
            training.run_step()
        figures.append(evaluate(training.student, reuse.images.meta_validation, CPU))
    names = ("calibrated_cross_entropy", "top1")
    assert row == {"step": 0, **{name: (figures[0][name] + figures[1][name]) / 2 for name in names}}
    assert figures[0] != figures[1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in loss.state_dict().items())
    assert reuse.look(3, loss, [(0.0, before)], StopRequest()) == row | {"step": 3}
    assert reuse.trainings == 2 * 2 * 0.5


def test_a_student_that_diverges_has_the_worst_score(monkeypatch) -> None:
    reuse = make_reuse(tiny_recipe(reuse_every=1, reuse_epochs=1))
    loss = build_loss_networks(reuse.recipe)

    def run_step(self, *watch):
        raise DivergedError("not finite")

    monkeypatch.setattr(Training, "run_step", run_step)
    assert reuse.look(0, loss, [(0.0, copy_state(loss))], StopRequest())["calibrated_cross_entropy"] == float("inf")


def test_a_shorter_training_keeps_its_shape() -> None:
    whole = TrainRecipe(epochs=240, schedule="multistep", milestones=[150, 180, 210], warmup_epochs=24)
    short = shorten(whole, 24)
    assert (short.epochs, short.milestones, short.warmup_epochs) == (24, [15, 18, 21], 2)
    assert shorten(whole, 2).milestones == [1, 2]
