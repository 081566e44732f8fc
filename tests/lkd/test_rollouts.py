"""A rollout is a stretch of an ordinary training; outer objectives are what they are defined as."""

from functools import partial

import pytest
import torch

from lkd.config import DataRecipe, ModelRecipe, TrainRecipe
from lkd.core.outputs import Outputs
from lkd.data import Batches
from lkd.losses.build import build_loss
from lkd.meta_training.rollouts import (
    OBJECTIVES,
    brier_score,
    build_inner_optimizer,
    build_rollout_batches,
    compute_inner_loss,
    compute_outer_logits,
    list_inner_batches,
    smoothed_error,
)
from lkd.training.build import prepare_images
from lkd.training.training import Training
from meta import Problem, State, rollout
from tests.lkd.parts import prepare_student

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
