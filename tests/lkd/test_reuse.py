"""The best loss by reuse is saved, not the last one; one that nothing taught is not called learned."""

from pathlib import Path

import pytest
import torch

from lkd.config import CompareRecipe, DataRecipe, InspectRecipe, TrainRecipe
from lkd.core.errors import UserError
from lkd.core.files import read_json
from lkd.core.interrupt import StopRequest
from lkd.core.random import draw_seed
from lkd.evaluation.comparison.compare import compare
from lkd.evaluation.comparison.tables import UNLEARNED
from lkd.evaluation.inspection_report import describe_file, inspect_recipe
from lkd.evaluation.report.page import build_page, tabulate_learned
from lkd.evaluation.report.runs import read_runs
from lkd.export.share import write_card
from lkd.losses import ReplayedLoss
from lkd.losses.learned.file import NOT_LEARNED, load_loss, read_provenance
from lkd.meta_training.online_student import copy_state
from lkd.meta_training.outer_loop import OuterLoop
from lkd.meta_training.reuse import Reuse, shorten
from lkd.tracking.run import Run, open_run
from lkd.training.evaluate import evaluate
from lkd.training.training import DivergedError, Training
from tests.lkd.meta_recipes import CPU, YOUNG, build_loss_networks, open_world, run_recipe, tiny_recipe


def make_reuse(recipe) -> Reuse:
    return Reuse([open_world(recipe)], recipe.meta, Run(Path("run"), CPU, None, "meta-train", quiet=True))


def script_scores(monkeypatch, scores: list[float]) -> None:
    remaining = iter(scores)
    figures = {"top1": 50.0}
    monkeypatch.setattr(Reuse, "train_student", lambda *_: figures | {"calibrated_cross_entropy": next(remaining)})


@pytest.mark.parametrize(("scores", "best"), [([3, 1, 1, 2], 2), ([float("nan"), float("inf"), 2, 0.5], 5)])
def test_the_loss_of_the_best_look_is_saved(monkeypatch, scores, best: int) -> None:
    """Looks come before steps 0, 2 and 4 and after the last, the fifth; of equals the first one wins; NaN is worst."""
    script_scores(monkeypatch, scores)
    seen, step = {}, OuterLoop.run_step

    def run_step(loop):
        seen[loop.step] = copy_state(loop.loss)
        result = step(loop)
        seen[loop.step] = copy_state(loop.loss)
        return result

    monkeypatch.setattr(OuterLoop, "run_step", run_step)
    recipe = tiny_recipe(YOUNG, outer_steps=5, rollout_steps=1, students_per_step=1, reuse_every=2)
    path = run_recipe(recipe)
    assert [row["step"] for row in read_provenance(path)["reuse"]] == [0, 2, 4, 5]
    saved = load_loss(path).state_dict()
    assert all(torch.equal(tensor, seen[best][name]) for name, tensor in saved.items())
    assert max(seen) == 5
    provenance = read_provenance(path)
    assert (provenance["learned"], provenance["kept_step"]) == (True, best)
    assert (path.parent / "pictures" / "kept-loss.png").exists()


def test_a_loss_that_nothing_taught_is_nowhere_called_learned(monkeypatch, capsys, one_process) -> None:
    script_scores(monkeypatch, [1, 2, 3])
    path = run_recipe(tiny_recipe(YOUNG, run_dir="m", outer_steps=2, rollout_steps=1, reuse_every=1))
    assert (read_provenance(path)["learned"], read_provenance(path)["kept_step"]) == (False, 0)
    curve = read_provenance(path)["curve"]
    first, last = ({k: v for k, v in row.items() if k.startswith("share/")} for row in (curve[0], curve[-1]))
    file = describe_file(path)
    assert not file["learned"]
    assert file["gradient_shares"] == {name.removeprefix("share/"): value for name, value in first.items()}
    assert first != last
    text, _ = inspect_recipe(InspectRecipe(str(path)))
    assert text.startswith(f"{path.name} ({NOT_LEARNED})")
    assert NOT_LEARNED in write_card(path, "hf://owner/losses/loss.lkd.safetensors")

    methods = {"learned": str(path), "KD": "kd"}
    shared = {"data": DataRecipe(train_size=200, meta_validation_size=100), "train": TrainRecipe(epochs=1)}
    recipe = CompareRecipe(run_dir="c", methods=methods, seeds=1, workers=1, **shared)
    with open_run(recipe, "compare") as run:
        compare(recipe, run)
    assert f"methods.learned: {UNLEARNED}" in capsys.readouterr().out
    for name in ("table.txt", "table.tex"):
        assert f"learned ({NOT_LEARNED})" in Path("c", name).read_text()
    assert read_json(Path("c/result.json"))["figures"]["learned_learned"] == 0

    runs = read_runs(["m", "c"])
    (row,) = tabulate_learned(runs[:1])[1:]
    assert any(NOT_LEARNED in cell for cell in row)
    page = build_page(runs)
    assert f"learned ({NOT_LEARNED})" in page
    assert f"kept by m ({NOT_LEARNED})" in page
    assert "learned by m" not in page


def test_patience_ends_meta_training(monkeypatch) -> None:
    script_scores(monkeypatch, [2, 1, 3, 1, 0])
    recipe = tiny_recipe(YOUNG, outer_steps=9, rollout_steps=1, students_per_step=1, reuse_every=1)
    recipe.meta.reuse_patience = 2
    provenance = read_provenance(run_recipe(recipe))
    assert [row["step"] for row in provenance["reuse"]] == [0, 1, 2, 3]
    assert len(provenance["curve"]) == 3


def test_while_the_loss_alternates_its_course_so_far_is_tried(monkeypatch) -> None:
    script_scores(monkeypatch, [3, 2, 3, 4, 5])
    loss = load_loss(run_recipe(tiny_recipe(interleaving="alternate", outer_steps=4, reuse_every=1, rollout_steps=1)))
    assert isinstance(loss, ReplayedLoss)
    assert loss.starts == [0, 0.25]


def test_a_look_is_fresh_short_trainings_with_the_loss_frozen() -> None:
    recipe = tiny_recipe(reuse_every=1, reuse_students=2)
    reuse, loss = make_reuse(recipe), build_loss_networks(recipe)
    before = copy_state(loss)
    row = reuse.look(0, loss, [(0.0, before)], StopRequest())
    figures, world = [], reuse.worlds[0]
    assert world.train == TrainRecipe(epochs=1, batch_size=20)
    for number in range(2):
        training = world.start(loss.requires_grad_(False), draw_seed(0, 7, number))
        for _ in range(10):
            training.run_step()
        figures.append(evaluate(training.student, world.images.meta_validation, CPU))
    names = ("calibrated_cross_entropy", "top1")
    assert row == {"step": 0, **{name: (figures[0][name] + figures[1][name]) / 2 for name in names}}
    assert figures[0] != figures[1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in loss.state_dict().items())
    assert reuse.look(3, loss, [(0.0, before)], StopRequest()) == row | {"step": 3}
    assert reuse.trainings == 2 * 2 * 0.5


def test_a_student_that_diverges_has_the_worst_score(monkeypatch) -> None:
    recipe = tiny_recipe(reuse_every=1)
    reuse, loss = make_reuse(recipe), build_loss_networks(recipe)

    def run_step(self, *watch):
        raise DivergedError("not finite")

    monkeypatch.setattr(Training, "run_step", run_step)
    assert reuse.look(0, loss, [(0.0, copy_state(loss))], StopRequest())["calibrated_cross_entropy"] == float("inf")


def test_a_shorter_training_keeps_its_shape() -> None:
    whole = TrainRecipe(epochs=240, schedule="multistep", milestones=[150, 180, 210], warmup_epochs=24)
    short = shorten(whole, 24)
    assert (short.epochs, short.milestones, short.warmup_epochs) == (24, [15, 18, 21], 2)
    assert (shorten(whole, 5).milestones, shorten(whole, 4).milestones) == ([2, 3, 4], [1, 2, 3]), "no decay is lost"
    unreached = TrainRecipe(epochs=2, schedule="multistep", milestones=[30, 60])
    assert shorten(unreached, 1).milestones == [30, 60], "none is reached, so none is to be either"
    with pytest.raises(UserError, match="3 epochs have no room for the 3 milestones"):
        shorten(whole, 3)
    assert shorten(TrainRecipe(epochs=100, swa_epochs=5), 10).swa_epochs == 1
    assert shorten(TrainRecipe(epochs=30, warmup_epochs=1), 10).warmup_epochs == 1, (
        "else it would start at the full rate"
    )
    assert shorten(TrainRecipe(epochs=5, warmup_epochs=3), 1).warmup_epochs == 0, "else it would be all of it"
    cool = TrainRecipe(epochs=10, cooldown_epochs=9)
    assert (shorten(cool, 5).cooldown_epochs, shorten(cool, 1).cooldown_epochs) == (4, 0)
