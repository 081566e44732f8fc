"""The learned loss over features: shapes of any kind, what it learns apart from them, and its hypergradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cosine_similarity, normalize

import lkd
from lkd.config import DataRecipe, ModelRecipe, TeacherRecipe, TrainRecipe
from lkd.core.errors import UserError
from lkd.core.outputs import Outputs
from lkd.losses import FeatureLoss, LearnedLoss
from lkd.losses.build import build_loss
from lkd.losses.learned.features import (
    attend_places,
    draw_orthonormal,
    draw_projection,
    project_channels,
    relate_images,
)
from lkd.losses.learned.file import save_loss
from lkd.losses.learned.loss import build_learned_loss
from lkd.training.build import prepare_images
from meta import ESTIMATORS, verify
from tests.lkd.parts import prepare_loss, prepare_teacher, start_training
from tests.lkd.test_invariances import wander
from tests.lkd.test_learned_forms import bilevel_problem

SMALL = {"stage1": (8, 14, 14), "stage2": (16, 7, 7), "stage3": (32, 4, 4)}
LARGE = {"stem": (64, 56, 56), "a": (64, 56, 56), "b": (96, 28, 28), "c": (40, 14, 14), "d": (24, 7, 7)}
TOKENS = {"block1": (16, 24), "block2": (16, 24)}
CPU = torch.device("cpu")


def draw_outputs(stages, batch: int = 6, classes: int = 5, dtype: torch.dtype = torch.float32) -> Outputs:
    features = {name: torch.randn(batch, *shape, dtype=dtype) for name, shape in stages.items()}
    return Outputs(2 * torch.randn(batch, classes, dtype=dtype), features)


def total(loss: nn.Module, student: Outputs, teacher: Outputs, progress: float = 0.4) -> Tensor:
    target = torch.arange(len(student.logits)) % student.logits.shape[1]
    return torch.stack(list(loss(student, teacher, target, progress).values())).sum()


@pytest.mark.parametrize(
    ("student", "teacher", "classes"),
    [(SMALL, LARGE, 2), (LARGE, SMALL, 1000), (TOKENS, SMALL, 10), (LARGE, TOKENS, 10)],
    ids=["small from large", "large from small", "tokens from small", "large from tokens"],
)
def test_one_file_compares_networks_of_any_shape(tmp_path, student, teacher, classes: int) -> None:
    path = tmp_path / "f.lkd.safetensors"
    learned = LearnedLoss({"features": wander(FeatureLoss()).float()})
    save_loss(path, learned, {})
    ours, theirs = draw_outputs(student, classes=classes), draw_outputs(teacher, classes=classes)
    loaded = lkd.load_loss(path)
    assert torch.equal(total(loaded, ours, theirs), total(learned, ours, theirs))
    attached = build_loss(str(path), student, teacher)
    assert attached.teacher_stages == tuple(teacher)[-3:]
    read = Outputs(theirs.logits, {name: theirs.features[name] for name in attached.teacher_stages})
    torch.testing.assert_close(total(attached, ours, read), total(learned, ours, theirs))
    assert total(loaded, ours, theirs) > 0


def test_it_hardly_depends_on_the_size_of_the_images() -> None:
    """The same content at 28×28 and, eight times as large, at 224×224."""
    loss = wander(FeatureLoss())
    student, teacher = (draw_outputs(SMALL, dtype=torch.float64) for _ in range(2))
    larger = [
        Outputs(o.logits, {n: f.repeat_interleave(8, 2).repeat_interleave(8, 3) for n, f in o.features.items()})
        for o in (student, teacher)
    ]
    torch.testing.assert_close(total(loss, *larger), total(loss, student, teacher), rtol=0.02, atol=0)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.1, 1.0, 100.0]), batch=st.integers(1, 5))
def test_it_is_not_negative_and_blind_to_scale(seed: int, scale: float, batch: int) -> None:
    torch.manual_seed(seed)
    loss = wander(FeatureLoss(), seed=seed)
    student, teacher = (draw_outputs(SMALL, batch, dtype=torch.float64) for _ in range(2))
    value = total(loss, student, teacher)
    assert value >= 0
    scaled = Outputs(student.logits, {name: scale * feature for name, feature in student.features.items()})
    torch.testing.assert_close(total(loss, scaled, teacher), value, rtol=1e-2, atol=1e-3)


def test_equal_entries_are_at_rest() -> None:
    """Where both give the same map; the channels' projections differ, so that comparison is left out."""
    loss = wander(FeatureLoss(deepest=1))
    stages = {"last": (8, 4, 4)}
    teacher = draw_outputs(stages, dtype=torch.float64)
    feature = (3 * teacher.features["last"]).requires_grad_()
    terms = loss(Outputs(teacher.logits, {"last": feature}), teacher, torch.arange(6) % 5, 0.4)
    same = terms["places"] + terms["images"]
    assert 0 <= same < 1e-12
    assert torch.autograd.grad(same, feature)[0].abs().max() < 1e-6


def test_projections_keep_lengths_and_do_not_depend_on_any_seed() -> None:
    for channels, size in ((8, 16), (128, 16), (16, 16)):
        projection = draw_projection(channels, size, "student")
        assert projection.shape == (size, channels)
        gram = projection @ projection.T if size <= channels else projection.T @ projection
        torch.testing.assert_close(gram, torch.eye(min(size, channels)))
    assert not torch.equal(draw_projection(16, 16, "student"), draw_projection(16, 16, "teacher"))
    with torch.inference_mode():
        assert draw_projection(24, 16, "student").is_inference()
    assert not draw_projection(24, 16, "student").is_inference(), "else a training after an evaluation has no gradient"
    drawn = draw_projection(8, 16, "student")
    draw_orthonormal.cache_clear()
    torch.manual_seed(17)
    assert torch.equal(draw_projection(8, 16, "student"), drawn)


def test_pairing_and_weights_are_learned_by_relative_depth() -> None:
    loss = FeatureLoss()
    depths = torch.tensor([1 / 3, 2 / 3, 1.0])
    pairing = loss.assign_stages(depths, torch.tensor([0.25, 0.5, 0.75, 1.0]))
    torch.testing.assert_close(pairing.sum(1), torch.ones(3))
    assert pairing.argmax(1).tolist() in ([0, 2, 3], [1, 2, 3])
    torch.testing.assert_close(loss.weigh_stages(depths, torch.tensor(0.5)), torch.full((3, 3), 0.3))
    wander(loss)
    weights = loss.weigh_stages(depths, torch.tensor(0.5))
    assert ((weights > 0) & (weights < 10)).all()
    assert weights.std() > 0
    assert not torch.equal(weights, loss.weigh_stages(depths, torch.tensor(0.9)))


@pytest.mark.parametrize("conditioning", [["progress", "state"], ["progress"], ["state"], []])
def test_conditioning_says_what_is_seen(conditioning: list[str]) -> None:
    loss = wander(FeatureLoss(conditioning=conditioning))
    student, teacher = (draw_outputs(SMALL, dtype=torch.float64) for _ in range(2))
    value = total(loss, student, teacher)
    assert torch.equal(total(loss, student, teacher, 0.9), value) == ("progress" not in conditioning)
    moved = Outputs(-student.logits, student.features)
    assert torch.equal(total(loss, moved, teacher), value) == ("state" not in conditioning)


class Student(nn.Module):
    """A tiny float64 student whose hidden layers are its features."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8).double(), nn.Linear(8, 4).double()
        self.head = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Outputs:
        first = self.first(x).tanh()
        second = self.second(first).tanh()
        features = {"first": first.view(-1, 2, 2, 2), "second": second.view(-1, 4, 1, 1)}
        return Outputs(self.head(second), features)


def test_hypergradients_through_features_are_right() -> None:
    stages = {"first": (2, 2, 2), "second": (4, 1, 1)}
    options = {"hidden": 4, "channels": 3, "grid": 2, "initial_weight": 3.0}
    loss = wander(build_learned_loss("both", {"features": options}, stages, stages))
    problem = bilevel_problem(loss, Student(), steps=3)
    for position, (inputs, teacher, target, progress) in enumerate(problem.inner_batches):
        answers = draw_outputs(stages, 7, 3, torch.float64)
        problem.inner_batches[position] = (inputs, Outputs(teacher.logits, answers.features), target, progress)
    assert verify(ESTIMATORS["adjoint"], problem).relative_error < 1e-5
    exact, tracked = (ESTIMATORS[name](problem) for name in ("adjoint", "higher"))
    torch.testing.assert_close(tracked.grads, exact.grads, rtol=1e-6, atol=1e-10)
    assert all(grads.abs().max() > 0 for name, grads in exact.grads.items() if name != "parts.features.pairing.4.bias")


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_gradients_stay_finite_for_features_of_any_scale(scale: float) -> None:
    loss = wander(FeatureLoss()).float()
    student, teacher = draw_outputs(SMALL), draw_outputs(LARGE)
    features = {name: (scale * feature).requires_grad_() for name, feature in student.features.items()}
    value = total(loss, Outputs(1e4 * student.logits, features), teacher)
    slopes = torch.autograd.grad(value, list(features.values()), create_graph=True)
    assert all(torch.isfinite(slope).all() for slope in slopes)
    again = torch.autograd.grad(sum(slope.sum() for slope in slopes), list(features.values()))
    assert all(torch.isfinite(slope).all() for slope in again)


@pytest.fixture
def path(tmp_path) -> str:
    loss = build_learned_loss("both", {}, SMALL, LARGE)
    save_loss(tmp_path / "both.lkd.safetensors", loss, {})
    return str(tmp_path / "both.lkd.safetensors")


def test_networks_that_give_no_features_are_one_clear_error(path: str) -> None:
    with pytest.raises(UserError, match="reads features: give build_loss the student's and the teacher's stages"):
        build_loss(path)
    for student, teacher, role in (({}, LARGE, "student"), (SMALL, {}, "teacher")):
        with pytest.raises(UserError, match=f"it reads features, but the {role} gives none") as error:
            build_loss(path, student, teacher)
        assert "\n" not in str(error.value)
        with pytest.raises(UserError, match=rf"reads features, but {role}.features is empty"):
            total(lkd.load_loss(path), draw_outputs(student), draw_outputs(teacher))
    with pytest.raises(UserError, match=r"teacher.features lacks b, c, d"):
        total(build_loss(path, SMALL, LARGE), draw_outputs(SMALL), draw_outputs({"a": (64, 56, 56)}))
    with pytest.raises(UserError, match="neither a map"):
        build_loss(path, SMALL, {"odd": (7, 24)})
    with pytest.raises(UserError, match="takes no temperature"):
        build_loss({"name": path, "temperature": 2.0}, SMALL, LARGE)
    with pytest.raises(UserError, match="adapters: 3 is neither"):
        build_loss({"name": path, "adapters": 3}, SMALL, LARGE)


@pytest.mark.parametrize("adapters", [False, True])
def test_a_saved_loss_trains_a_student_with_its_features(path: str, adapters: bool, tmp_path) -> None:
    """Through the same road as `lkd distill`: stages by a dry run, the teacher's tabulated, adapters trained along."""
    images = prepare_images(DataRecipe(train_size=120, meta_validation_size=50))
    student = ModelRecipe("small_mobilenet")
    loss = prepare_loss({"name": path, "adapters": adapters}, student, TeacherRecipe(), images, 3)
    teacher = prepare_teacher(TeacherRecipe(), DataRecipe(), images, CPU, loss.teacher_stages)
    assert set(teacher.features) == {"stage1", "stage2", "stage3"}
    recipe = TrainRecipe(epochs=1, batch_size=20, learning_rate=0.01)
    training = start_training(student, images.train, loss, teacher, recipe, DataRecipe(), 3, CPU)
    before = {name: parameter.detach().clone() for name, parameter in training.loss.named_parameters()}
    terms = [training.run_step() for _ in range(3)][-1]
    assert {"features/places", "features/images", "features/channels"} < set(terms)
    moved = [name for name, parameter in training.loss.named_parameters() if not torch.equal(parameter, before[name])]
    assert moved == ([f"parts.features.adapters.{number}" for number in range(3)] if adapters else [])
    save_loss(tmp_path / "again.lkd.safetensors", loss, {})
    again = lkd.load_loss(tmp_path / "again.lkd.safetensors")
    assert again.state_dict().keys() == lkd.load_loss(path).state_dict().keys()


def test_impossible_options_are_refused() -> None:
    for name, value in (("initial_weight", 10.0), ("deepest", 0), ("grid", 0), ("channels", 0)):
        with pytest.raises(ValueError, match=f"{name}: {value} is not"):
            FeatureLoss(**{name: value})


def test_comparisons_are_attention_maps_cosines_and_projections() -> None:
    features = [torch.randn(5, channels, 8, 8, dtype=torch.float64) for channels in (3, 20)]
    places = attend_places(features, 4)
    centred = [feature.mean((2, 3)) - feature.mean((0, 2, 3)) for feature in features]
    drawn = [draw_projection(rows.shape[1], 6, "student") for rows in centred]
    images, channels = relate_images(centred), project_channels(centred, drawn)
    for stage, (feature, rows) in enumerate(zip(features, centred, strict=True)):
        attention = avg_pool2d(feature.square().mean(1), 2).flatten(1)
        torch.testing.assert_close(places[stage], 4 * normalize(attention), rtol=1e-6, atol=0)
        cosines = cosine_similarity(rows.unsqueeze(1), rows.unsqueeze(0), dim=2)
        torch.testing.assert_close(images[stage], cosines, rtol=0, atol=1e-6)
        projected = normalize(rows @ drawn[stage].double().T)
        torch.testing.assert_close(channels[stage], 6**0.5 * projected, rtol=1e-5, atol=1e-6)
