"""From a recipe to a learned loss, its file, and each part's share of the gradient."""

from pathlib import Path

import pytest
import torch

import lkd
from lkd.cli import main
from lkd.core.errors import UserError
from lkd.core.outputs import Outputs
from lkd.losses import KDLoss
from lkd.losses.build import build_loss
from lkd.losses.learned.file import save_loss
from lkd.losses.learned.forms import FORMS
from lkd.losses.learned.loss import build_learned_loss
from lkd.losses.learned.shares import find_saturated, gradient_shares
from tests.lkd.test_invariances import wander

STAGES = {"first": (4, 6, 6), "last": (8, 3, 3)}


def draw_outputs() -> Outputs:
    return Outputs(2 * torch.randn(8, 10), {name: torch.randn(8, *shape) for name, shape in STAGES.items()})


@pytest.mark.parametrize("form", FORMS)
def test_every_form_survives_its_file(tmp_path, form: str) -> None:
    options = {"form": form, "hidden": 5, "conditioning": ["state"], "lipschitz": 3.0, "normalize_gradient": True}
    loss = wander(build_learned_loss("both", options, STAGES, STAGES)).float()
    save_loss(tmp_path / "a.lkd.safetensors", loss, {})
    loaded = lkd.load_loss(tmp_path / "a.lkd.safetensors")
    call = draw_outputs(), draw_outputs(), torch.randint(10, (8,)), 0.6
    for name, value in loss(*call).items():
        assert torch.equal(loaded(*call)[name], value), name
    assert loaded.parts["logits"].architecture == loss.parts["logits"].architecture


def test_a_loss_that_the_package_carries_is_found_by_its_name_and_must_be_whole(universal: Path) -> None:
    named, direct = lkd.load_loss("universal").state_dict(), lkd.load_loss(universal).state_dict()
    assert all(torch.equal(named[name], direct[name]) for name in direct)
    with pytest.raises(UserError, match="loss: unknown name 'universl'; nearest: universal"):
        build_loss("universl")
    universal.write_bytes(universal.read_bytes() + b" ")
    with pytest.raises(UserError, match="is not the file that came with the package: install the package anew"):
        lkd.load_loss("universal")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("logit", {}, "meta.kind: unknown name 'logit'; nearest: logits"),
        ("logits", {"form": "balance"}, "meta.loss.form: unknown name 'balance'; nearest: decoupled, generic"),
        ("logits", {"form": "generic", "warmup": 0.5}, "meta.loss: unknown option 'warmup'; form generic takes"),
        ("logits", {"initial_weight": 2.0}, r"meta.loss: initial_weight: 2.0 is not in \(0, 1\)"),
        ("logits", {"hidden": "wide"}, "meta.loss: "),
        ("logits", {"conditioning": "state"}, "meta.loss: conditioning: 'state' is not a list"),
        ("logits", {"normalize_gradient": 1}, "meta.loss.normalize_gradient: 1 is neither true nor false"),
        ("logits", {"features": {"grid": 2}}, "meta.loss.features: kind logits has no network over features"),
        ("features", {"form": "generic"}, "kind features has no network over logits, which form could be for"),
        ("both", {"features": {"grd": 2}}, "meta.loss.features: unknown option 'grd'; the network over features takes"),
        ("both", {"features": 3}, "meta.loss.features: 3 is not a mapping"),
    ],
)
def test_impossible_recipes_are_one_clear_line(kind: str, options, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build_learned_loss(kind, options, STAGES, STAGES)
    assert "\n" not in str(error.value)


TINY = ["--data.train_size", "120", "--data.meta_validation_size", "60", "--train.epochs", "1"]
TINY += ["--train.batch_size", "20"]
META = ["--pool.students", "1", "--pool.snapshots", "2", "--pool.max_age", "0.5", "--meta.outer_steps", "2"]
META += ["--meta.rollout_steps", "3", "--meta.students_per_step", "1", "--meta.outer_batch_size", "50"]
META += ["--meta.reuse_every", "0"]


@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        ("logits", "{conditioning: [], lipschitz: 8.0}"),
        ("features", "{features: {hidden: 4}}"),
        ("both", "{form: generic, normalize_gradient: true, features: {hidden: 4, deepest: 1}}"),
    ],
)
def test_a_loss_of_every_kind_is_learned_and_reused(kind: str, loss: str) -> None:
    """The commands, end to end; reused on a student with other stages."""
    command = ["meta-train", *TINY, *META, "--meta.kind", kind, "--meta.loss", loss, "--run_dir", "learned"]
    assert main(command) == 0
    path = "learned/loss.lkd.safetensors"
    learned = lkd.load_loss(path)
    moved = [
        p for name, p in learned.named_parameters() if name.endswith(("4.weight", "head.weight")) and p.abs().max() > 0
    ]
    assert moved, "the heads started at zero"
    reuse = ["distill", *TINY, "--student.name", "small_mobilenet", "--train.learning_rate", "0.01", "--loss", path]
    assert main([*reuse, "--run_dir", "reused"]) == 0


def test_gradient_shares_are_those_of_the_terms() -> None:
    """KD's by hand: the task's gradient is (1 − w)(p − y) / B, the distillation's w τ (p_τ − t_τ) / B."""
    student, teacher = (Outputs(5 * torch.randn(8, 10), {}) for _ in range(2))
    target = torch.randint(10, (8,))
    shares = gradient_shares(KDLoss(0.9, 3.0), student, teacher, target)
    plain = (student.logits.softmax(1) - torch.nn.functional.one_hot(target, 10)).norm()
    distillation = 0.9 * 3 * ((student.logits / 3).softmax(1) - (teacher.logits / 3).softmax(1)).norm()
    task = 0.1 * plain
    assert task + distillation > plain
    assert shares["task"] == pytest.approx(float(task / (task + distillation)), rel=1e-5)
    assert sum(shares.values()) == pytest.approx(1)
    weak = gradient_shares(KDLoss(0.9, 3.0), student, student, target)
    assert weak == pytest.approx({"task": 0.1, "distillation": 0}, abs=1e-5), "beside cross-entropy"


def test_a_saturated_network_is_found() -> None:
    loss = build_learned_loss("both", {"form": "generic", "conditioning": ["progress"]}, STAGES, STAGES)
    student, teacher, target = draw_outputs(), draw_outputs(), torch.randint(10, (8,))
    student.logits.requires_grad_()
    with torch.no_grad():  # as a log asks
        shares = gradient_shares(loss, student, teacher, target, 0.5)
        loss.parts["features"].weights.head.bias.fill_(-20.0)
    assert set(shares) == set(loss(student, teacher, target, 0.5))
    assert find_saturated(shares) == []
    assert student.logits.grad is None
    assert find_saturated(gradient_shares(loss, student, teacher, target)) == ["features"]
    form = loss.parts["logits"]
    optimum = form.mix_target(form.read(student.logits, teacher.logits, target)).log().detach()
    at_rest = gradient_shares(loss, Outputs(optimum, student.features), teacher, target)
    assert set(find_saturated(at_rest)) == {"logits", "features"}, "both are nothing beside cross-entropy"


def test_shares_of_a_constant_are_zero_and_not_a_number_is_saturated() -> None:
    def constant(student, teacher, target, progress=None):
        own = torch.ones((), requires_grad=True)  # as of an autoencoder of the teacher's features
        return {"a/constant": torch.zeros(()), "a/own": own * 2, "b/term": student.logits.square().sum()}

    shares = gradient_shares(constant, draw_outputs(), draw_outputs(), torch.randint(10, (8,)))
    assert shares == {"a/constant": 0.0, "a/own": 0.0, "b/term": 1.0}
    assert find_saturated({**shares, "c/term": float("nan")}) == ["a", "c"]
