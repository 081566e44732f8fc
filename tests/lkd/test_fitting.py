"""What fits what: teachers of other classes, lazy networks, functions as losses, estimators and networks."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import lkd
from lkd.api import name_loss, name_student, name_teacher
from lkd.config import DataRecipe, DistillRecipe, ModelRecipe, TeacherRecipe, TrainRecipe
from lkd.config.parse import make_recipe, parse_recipe
from lkd.core.content import describe_content
from lkd.core.errors import UserError
from lkd.core.outputs import Outputs
from lkd.losses.loss import wrap_loss
from lkd.meta_training.outer_loop import OuterLoop
from lkd.models.build import build as build_network
from lkd.models.build import unwrap
from lkd.models.teacher import take_classes
from lkd.training.answers import identify_answers, prepare_teacher
from lkd.training.build import build, choose_student, open_teacher, prepare_images
from lkd.training.distill import describe_batch, start_training
from tests.lkd.meta_recipes import YOUNG, build_loss_networks, run_recipe, tiny_recipe

WEIGHTED = {"name": "influence_weighted", "loss": "cross_entropy"}
OVER_LOGITS = ["kd", "dkd", "dist", "logit_standardization", "universal", "torchdistill/KDLoss", "torchdistill/SRDLoss"]
SMALL = DataRecipe(train_size=40, meta_validation_size=20)


def give(classes: int, **settings) -> tuple[DistillRecipe, dict[str, nn.Module]]:
    """A recipe with a teacher of so many classes, whose student has 10."""
    teacher = build_network("tiny_cnn", classes, 1).eval()
    recipe = DistillRecipe(data=SMALL, student=ModelRecipe("tiny_cnn"), **settings)
    recipe.teacher = replace(recipe.teacher, path="object/teacher@0")
    return recipe, {"object/teacher@0": teacher}


@pytest.mark.outside(38)
@pytest.mark.parametrize("classes", [12, 1])
@pytest.mark.parametrize("loss", ["fitnet", "at", "sp", "rkd", "cross_entropy", "torchdistill/SPKDLoss", WEIGHTED])
def test_losses_over_features_take_a_teacher_of_any_classes(loss: str | dict, classes: int) -> None:
    recipe, given = give(classes, loss=loss)
    parts = build(recipe, given)
    assert parts.teacher.architecture["num_classes"] == classes
    assert not parts.loss.reads_logits


class Centred(nn.Module):
    """A loss with a running mean of the teacher's logits."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(()))

    def forward(self, student, teacher, target):
        self.centre = 0.9 * self.centre + 0.1 * teacher.logits.mean()
        return (student.logits - teacher.logits + self.centre).square().mean()


def test_the_log_s_figures_leave_what_a_loss_remembers_alone() -> None:
    recipe, given = give(10, loss="kd")
    recipe.loss = name_loss(Centred(), given)
    parts, cpu = build(recipe, given), torch.device("cpu")
    teacher = prepare_teacher(parts.teacher, parts.images, cpu, parts.loss.teacher_stages)
    training = start_training(parts.student, parts.images, parts.loss, teacher, TrainRecipe(1, 20), 0, cpu)
    seen: list = []
    training.run_step(seen.append)
    [before] = [buffer.clone() for buffer in training.loss.buffers()]
    describe_batch(training, seen[0])
    assert list(training.loss.buffers()) == [before] != [0]


@pytest.mark.parametrize(("classes", "is_logged"), [(12, False), (10, True)])
def test_classes_that_are_others_are_not_compared_in_the_log(classes: int, is_logged: bool) -> None:
    recipe, given = give(classes, loss="at")
    parts, cpu = build(recipe, given), torch.device("cpu")
    teacher = prepare_teacher(parts.teacher, parts.images, cpu, parts.loss.teacher_stages)
    training = start_training(parts.student, parts.images, parts.loss, teacher, TrainRecipe(1, 20), 0, cpu)
    seen: list = []
    training.run_step(seen.append)
    assert ("train/agreement" in describe_batch(training, seen[0])) is is_logged


@pytest.mark.outside(38)
@pytest.mark.parametrize("loss", [*OVER_LOGITS, WEIGHTED | {"loss": "kd"}, WEIGHTED | {"teacher_rate": 0.1}])
def test_losses_over_logits_say_how_to_take_the_classes(loss: str | dict) -> None:
    recipe, given = give(12, loss=loss)
    with pytest.raises(UserError, match=r"has 12 classes, the data set and its students have 10: .*teacher\.classes"):
        build(recipe, given)


@pytest.mark.outside(38)
@pytest.mark.parametrize("classes", [[11, 2, 3, 4, 5, 6, 7, 8, 9, 1], "2-11", "columns.txt"])
def test_the_classes_of_a_teacher_are_taken(classes, tmp_path) -> None:
    Path("columns.txt").write_text("\n".join(map(str, range(10))))
    recipe, given = give(12, loss="kd", teacher=TeacherRecipe(classes=classes))
    parts = build(recipe, given)
    images = torch.randn(3, 1, 28, 28)
    columns = {"2-11": list(range(2, 12)), "columns.txt": list(range(10))}.get(str(classes), classes)
    (whole,) = given.values()
    with torch.no_grad():
        torch.testing.assert_close(parts.teacher.network(images).logits, whole(images).logits[:, columns])
    assert list(parts.teacher.network(images).features) == list(whole(images).features)
    assert unwrap(parts.teacher.network) is unwrap(whole), "whose tag is said"


@pytest.mark.outside(38)
@pytest.mark.parametrize("classes", ["1-1000", [0, 0], [12], [], "nowhere.txt", "words.txt"])
def test_classes_that_a_teacher_has_not_are_one_line(classes) -> None:
    Path("words.txt").write_text("cat dog")
    with pytest.raises(UserError, match=r"teacher\.classes: ") as error:
        take_classes(nn.Identity(), 12, classes)
    assert "\n" not in str(error.value)


@pytest.mark.outside(38)
def test_classes_are_named_on_the_command_line_and_known_to_a_cache() -> None:
    assert parse_recipe("distill", ["--teacher.classes", "1-1000"]).teacher.classes == "1-1000"
    assert parse_recipe("distill", ["--teacher.classes", "[3, 1]"]).teacher.classes == [3, 1]
    assert make_recipe(DistillRecipe, {"teacher": {"classes": [1, 2]}}).teacher.classes == [1, 2]
    images = prepare_images(SMALL)
    made_with = []
    for classes in (None, list(range(10)), [*range(1, 10), 0]):
        settings = TeacherRecipe(path="random", name="tiny_cnn", classes=classes)
        made_with.append(identify_answers(open_teacher(settings, images.train), images))
    assert "classes" not in made_with[0]["teacher"], "caches from before it was a setting stay good"
    assert made_with[1] != made_with[2]


@pytest.mark.outside(38)
def test_a_student_learns_features_of_a_teacher_without_classes() -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = build_network("tiny_cnn", 3, 1)

        def forward(self, images):
            outputs = self.network(images)
            return Outputs(list(outputs.features.values())[-1].mean((2, 3)), outputs.features)

    images, labels = torch.randint(256, (60, 1, 28, 28), dtype=torch.uint8), torch.arange(60) % 3
    found = lkd.distill("tiny_cnn", Features(), (images, labels), loss="at", epochs=1, batch_size=20, quiet=True)
    assert found.path.exists()


# Lazy networks, and functions.


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))


@pytest.mark.outside(32)
@pytest.mark.parametrize("given", [lazy, lazy()], ids=["builder", "module"])
def test_a_lazy_student_is_trained(given) -> None:
    images, labels = torch.randint(256, (60, 1, 8, 8), dtype=torch.uint8), torch.arange(60) % 3
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    found = lkd.distill(given, teacher, (images, labels), loss="kd", epochs=1, batch_size=20, quiet=True)
    assert {name: list(x.shape) for name, x in found.student.state_dict().items()}["4.weight"] == [3, 144]


@pytest.mark.outside(32)
def test_a_lazy_student_starts_from_weights_of_the_seed() -> None:
    given: dict = {}
    builder = choose_student(name_student(lazy, given), prepare_images(SMALL).train, given)
    with pytest.raises(UserError, match=r"\[2, 3\], not with logits \[2, 10\]"):
        builder.build(0, torch.device("cpu"))
    given = {}
    own = lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(10))  # noqa: E731
    builder = choose_student(name_student(own, given), prepare_images(SMALL).train, given)
    first, again, other = (next(builder.build(seed, torch.device("cpu")).parameters()) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.outside(32)
def test_a_lazy_teacher_or_loss_without_weights_is_one_line() -> None:
    with pytest.raises(UserError, match=r"teacher: '0\.weight' has no weights yet"):
        name_teacher(lazy(), {})
    with pytest.raises(UserError, match=r"loss: '0\.weight' has no weights yet"):
        name_loss(lazy(), {})
    ready = lazy()
    ready(torch.zeros(2, 1, 8, 8))
    assert name_teacher(ready, {}).path.startswith("object/Sequential@")


def mean_error(student, teacher, target, scale=1.0):
    return scale * (student.logits - teacher.logits).square().mean()


def unfinished():
    def loss(student, teacher, target):
        return later if target is None else mean_error(student, teacher, target)

    if not unfinished:
        later = None
    return loss


FUNCTIONS = {
    "partial": functools.partial(mean_error, scale=2.0),
    "a cell that is empty": unfinished(),
    "progress by name alone": lambda student, teacher, target, *, progress: (
        progress * mean_error(student, teacher, target)
    ),
    "bound method": type("Own", (), {"loss": lambda self, s, t, target: mean_error(s, t, target)})().loss,
}


@pytest.mark.outside(32)
@pytest.mark.parametrize("case", FUNCTIONS)
def test_a_function_is_a_loss(case: str) -> None:
    given: dict = {}
    name = name_loss(FUNCTIONS[case], given)
    assert given[name] is FUNCTIONS[case]
    student, teacher = (Outputs(torch.randn(3, 4), {}) for _ in range(2))
    terms = wrap_loss(given[name])(student, teacher, torch.zeros(3, dtype=torch.int64), 1.0)
    expected = mean_error(student, teacher, None) * (2 if case == "partial" else 1)
    torch.testing.assert_close(terms, {"loss": expected})


@pytest.mark.outside(32)
def test_a_function_is_known_by_what_it_was_given() -> None:
    one, two = (describe_content(functools.partial(mean_error, scale=scale)) for scale in (1.0, 2.0))
    assert one != two
    with pytest.raises(UserError, match="loss: add takes"):
        wrap_loss(torch.add)  # a function that says nothing of its arguments
    assert not wrap_loss(nn.CrossEntropyLoss()).reads_logits


# Estimators and networks; the least meta-trainings.


@pytest.mark.outside(37)
def test_what_a_network_forbids_an_estimator_is_said_before_the_pool() -> None:
    vit = {"img_size": 28, "patch_size": 7, "embed_dim": 16, "depth": 1, "num_heads": 2}
    recipe = tiny_recipe(pool=YOUNG, estimator="adjoint")
    recipe.student = ModelRecipe("vit_tiny_patch16_224", options=vit)
    with pytest.raises(UserError, match=r"meta\.estimator adjoint: .*cannot be differentiated twice"):
        run_recipe(recipe)
    assert not Path("run/pool").exists()


@pytest.mark.outside(37)
def test_what_an_estimator_does_not_support_is_one_line() -> None:
    with pytest.raises(UserError, match=r"meta\.estimator higher: .*SGD only"):
        run_recipe(tiny_recipe(pool=YOUNG, estimator="higher", average=0.5))
    assert not Path("run/pool").exists()


@pytest.mark.outside(37)
def test_what_the_engine_says_within_a_step_is_the_user_s_line(monkeypatch) -> None:
    def refuse(self, number):
        raise ValueError("the rollout has no end")

    monkeypatch.setattr(OuterLoop, "differentiate_pool_student", refuse)
    with pytest.raises(UserError, match="outer step 0: the rollout has no end"):
        run_recipe(tiny_recipe(pool=YOUNG))


@pytest.mark.outside(44)
@pytest.mark.parametrize("estimator", ["audited", "adjoint", "truncated"])
def test_the_least_meta_training_learns(estimator: str) -> None:
    """One outer step, one step a rollout, one student in the pool and in the step."""
    meta = {"outer_steps": 1, "students_per_step": 1, "rollout_steps": 1, "estimator": estimator}
    recipe = tiny_recipe(pool=YOUNG, **meta)
    before = build_loss_networks(recipe).state_dict()
    loss = lkd.load_loss(run_recipe(recipe))
    assert all(torch.isfinite(parameter).all() for parameter in loss.parameters())
    assert any(not torch.equal(before[name], value) for name, value in loss.state_dict().items())
