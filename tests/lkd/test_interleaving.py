"""The dynamic strategy: the loss is updated while students are trained with it, and replayed by progress."""

from dataclasses import replace

import pytest
import torch

from lkd.config import MetaSettings
from lkd.core.errors import UserError
from lkd.core.outputs import Outputs
from lkd.core.random import draw_seed
from lkd.losses import DecoupledLoss, LearnedLoss, ReplayedLoss
from lkd.losses.learned.file import load_loss, read_provenance, save_loss
from lkd.losses.learned.trust import OWN_ACCURACY, Trust
from lkd.meta_training.meta_train import check_alternation
from lkd.meta_training.rollouts import compute_inner_loss, half_cosine
from lkd.models.files import load_network
from meta import Problem, State, Tape
from meta.estimators import ESTIMATORS
from meta.optim import SGD, Clipped, Optimizer, read_slots
from meta.tensors import cosine_similarity
from tests.lkd.meta_recipes import CPU, SMALL, make_loop, open_world, run_recipe, tiny_recipe


@pytest.mark.parametrize("train", [{}, {"clip_norm": 0.5}, {"precision": "bfloat16"}, {"accumulation": 2}])
def test_the_tape_gives_the_hypergradient_of_the_students_own_steps(train: dict) -> None:
    """Against the exact adjoint of the same steps, taken anew from the state before them.

    The loss is told the student's accuracy anew meanwhile, but not between the steps that are walked back.
    """
    recipe = tiny_recipe(interleaving="alternate", outer_steps=4, rollout_steps=5, students_per_step=1)
    recipe.meta.loss = {"conditioning": ["progress", "state", "own_accuracy"]}
    recipe.train = replace(recipe.train, **train)
    clip_norm = recipe.train.clip_norm
    world = open_world(recipe)
    looks = Trust.choose_looks(world.images.meta_validation, CPU)
    loop = make_loop(recipe, replace(world, trust=Trust(looks=looks)))
    for parameter in loop.loss.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    (own,) = loop.own.values()
    own.advance(5)
    student, optimizer = own.training.student, own.training.optimizer
    before = State(dict(student.named_parameters()), dict(student.named_buffers()), read_slots(optimizer, student))
    before = before.detach()
    batches = own.advance(10)
    assert [progress for _, _, progress in batches] == [0.25, 0.3, 0.35, 0.4, 0.45]
    outer_batch = loop.draw_outer_batch(batches, torch.Generator().manual_seed(0))

    def inner_loss(*arguments):
        return compute_inner_loss(student, own.loss, *arguments)

    taped = own.tape.hypergradient(inner_loss, loop.outer_loss(student), outer_batch)
    hyper = {name: parameter.detach() for name, parameter in loop.loss.named_parameters()}
    schedule: Optimizer = SGD(lambda step: 0.1 * half_cosine((5 + step) / 20), 0.9, weight_decay=5e-4)
    schedule = Clipped(schedule, clip_norm) if clip_norm else schedule
    outer_loss = loop.outer_loss(student)
    exact = ESTIMATORS["adjoint"](Problem(inner_loss, outer_loss, before, hyper, batches, outer_batch, schedule))
    torch.testing.assert_close(taped.final_state.parameters, exact.final_state.parameters, rtol=1e-4, atol=1e-5)
    assert cosine_similarity(taped.grads, exact.grads) > 0.99
    assert (taped.norm / exact.norm).item() == pytest.approx(1, abs=0.1), "kinks of the ReLU are crossed by differences"


@pytest.mark.parametrize(
    ("interleaving", "starts"), [("alternate", [0, 0.15, 0.3, 0.5, 0.65, 0.8]), ("both", [0, 0.3, 0.65])]
)
def test_the_replayed_loss_trains_the_same_student_again(interleaving: str, starts: list[float]) -> None:
    """A fresh training with the saved, frozen loss walks in the steps of the student that it was learned with."""
    recipe = tiny_recipe(SMALL, interleaving=interleaving, outer_steps=6, learning_rate=0.1)
    recipe.train.ema_decay = 0.9
    path = run_recipe(recipe)
    loss = load_loss(path)
    assert isinstance(loss, ReplayedLoss)
    assert loss.starts == pytest.approx(starts)
    training = open_world(recipe).start(loss, draw_seed(recipe.seed, 6, 0))
    while training.step < training.total_steps:
        training.run_step()
    student, header = load_network(path.parent / "student.safetensors")
    for name, parameter in training.result.named_parameters():
        torch.testing.assert_close(parameter.detach(), student.get_parameter(name), rtol=1e-5, atol=1e-6)
    assert header["provenance"]["meta_validation"]["last"]["top1"] > 0
    first, last = loss.losses[0], loss.losses[-1]
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), last.parameters(), strict=True))
    assert len(read_provenance(path)["curve"]) == 6


def test_each_student_in_training_is_told_its_own_accuracy() -> None:
    recipe = tiny_recipe(interleaving="alternate", outer_steps=4, rollout_steps=5)
    recipe.meta.loss = {"conditioning": ["own_accuracy"]}
    world = open_world(recipe)
    looks = Trust.choose_looks(world.images.meta_validation, CPU)
    loop = make_loop(recipe, replace(world, trust=Trust(looks=looks)))
    loop.run_step(), loop.run_step()
    first, second = (own.training for own in loop.own.values())
    seen = first.loss.forms()[0].trust[OWN_ACCURACY].item()
    assert second.loss.forms()[0].trust[OWN_ACCURACY].item() != seen
    assert all(a is b for a, b in zip(first.loss.parameters(), loop.loss.parameters(), strict=True))


def test_a_replayed_loss_is_in_steps_and_survives_its_file(tmp_path) -> None:
    losses = [LearnedLoss({"logits": DecoupledLoss(initial_weight=weight)}) for weight in (0.2, 0.5, 0.8)]
    loss = ReplayedLoss(losses, [0, 0.25, 0.5])
    save_loss(tmp_path / "a.lkd.safetensors", loss, {})
    loaded = load_loss(tmp_path / "a.lkd.safetensors")
    student, teacher = (Outputs(torch.randn(4, 3), {}) for _ in range(2))
    target = torch.randint(3, (4,))
    for progress, part in ((0, 0), (0.24, 0), (0.25, 1), (torch.tensor(0.49), 1), (0.5, 2), (1.0, 2)):
        expected = losses[part](student, teacher, target, progress)
        for found in (loss, loaded):
            assert found(student, teacher, target, progress) == expected
    with pytest.raises(ValueError, match="progress: None; a replayed loss must be told"):
        loaded(student, teacher, target)
    with pytest.raises(ValueError, match="progress: "):
        loaded(student, teacher, target, 1.5)
    for starts in ([0, 0.5], [0.1, 0.2, 0.3], [0, 0.5, 0.5]):
        with pytest.raises(ValueError, match="do not increase from 0, one for each of 3 losses"):
            ReplayedLoss(losses, starts)


def test_updates_are_spread_evenly_and_only_the_steps_that_are_walked_back_are_recorded(monkeypatch) -> None:
    watched, ends = [], []
    monkeypatch.setattr(Tape, "watch", lambda self, batch: watched.append(batch[2]))
    recipe = tiny_recipe(interleaving="both", outer_steps=5, students_per_step=1)
    loop = make_loop(recipe, open_world(recipe))
    (own,) = loop.own.values()
    for loop.step in (2, 3, 4):
        with pytest.raises(ValueError, match="the tape is empty"):  # it was told nothing
            loop.differentiate_online_student(0)
        ends.append(own.training.step)
    assert ends == [6, 13, 20]
    assert watched == [step / 20 for end in ends for step in range(end - 3, end)]


@pytest.mark.parametrize(
    ("meta", "field"),
    [
        ({"rollout_steps": 11}, r"meta.rollout_steps: 11 .* 2 updates of a training of 20 steps \(10 apart"),
        ({"estimator": "unrolled"}, "meta.estimator: unrolled"),
        ({"reuse_patience": 1, "reuse_every": 1}, "meta.reuse_patience: 1"),
        ({"average": 0.5}, "meta.average"),
        ({"initial_rollout_steps": 2}, "meta.initial_rollout_steps"),
        ({"interleaving": "both", "outer_steps": 1}, "meta.outer_steps: 1"),
    ],
)
def test_what_does_not_go_with_alternation_is_refused(meta, field: str) -> None:
    settings = {"interleaving": "alternate", "outer_steps": 2, "rollout_steps": 5}
    with pytest.raises(UserError, match=field):
        check_alternation(MetaSettings(**settings | meta), 20)
    check_alternation(MetaSettings(**settings | {"rollout_steps": 10}), 20)
