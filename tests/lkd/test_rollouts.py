"""A rollout is a stretch of an ordinary training."""

import itertools
from functools import partial

import pytest
import torch

from lkd.config import DataRecipe, ModelRecipe, TrainRecipe
from lkd.core.outputs import Outputs
from lkd.data import Batches
from lkd.losses.build import build_loss
from lkd.meta_training.rollouts import (
    anneal_rate,
    build_inner_optimizer,
    compute_inner_loss,
    compute_outer_logits,
    draw_rollout_images,
    list_inner_batches,
)
from lkd.training.build import prepare_images
from lkd.training.training import Training
from meta import Problem, State, rollout
from tests.lkd.parts import prepare_student

CPU = torch.device("cpu")


def test_the_learning_rate_ends_at_zero() -> None:
    cosine = anneal_rate(0.2, "cosine", 50)
    rates = [cosine(step) for step in range(51)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[50] == pytest.approx(0, abs=1e-12)
    assert all(a > b for a, b in itertools.pairwise(rates))
    assert anneal_rate(0.2, "constant", 50) == 0.2


def test_progress_runs_from_the_age_to_the_end() -> None:
    images = prepare_images(DataRecipe(train_size=100, meta_validation_size=50)).train
    inner = list_inner_batches(Batches(images, 20, seed=3), lambda batch: Outputs(batch.target, {}), 0.2, 4, ())
    assert [progress for _, _, progress in inner] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert all(torch.equal(answer.logits, batch.target) for batch, answer, _ in inner)


def test_a_rollout_sees_its_images_as_often_as_it_is_told() -> None:
    images = prepare_images(DataRecipe(train_size=400, meta_validation_size=50)).train
    part = draw_rollout_images(images, 20, 10, 5, torch.Generator().manual_seed(0))
    assert len(part) == 40
    batches = Batches(part, 10, seed=1)
    seen = torch.cat([batches.at(step).index for step in range(20)])
    assert (seen.unique(return_counts=True)[1] == 5).all()
    assert torch.isin(seen, images.index).all()
    assert draw_rollout_images(images, 20, 10, 1, torch.Generator()) is images
    assert len(draw_rollout_images(images, 900, 10, 2, torch.Generator())) == 400
    assert len(draw_rollout_images(images, 3, 10, 50, torch.Generator())) == 10


def test_a_rollout_of_a_loss_without_parameters_is_a_training() -> None:
    """Against torch.optim.SGD, stepped by timm's schedule: cosine over one epoch of five steps is the annealed rate."""
    images = prepare_images(DataRecipe(train_size=100, meta_validation_size=50)).train
    train = TrainRecipe(epochs=1, batch_size=20, weight_decay=5e-3, nesterov=True)
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
        build_inner_optimizer(train, train.learning_rate, "cosine", 5),
    )
    end = rollout(problem)
    training = Training(student, loss, teacher, batches, train)
    for _ in range(5):
        training.run_step()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(end.parameters[name], parameter.detach(), rtol=1e-4, atol=1e-6)
    for name, buffer in student.named_buffers():
        torch.testing.assert_close(end.buffers[name], buffer, rtol=1e-4, atol=1e-6)
