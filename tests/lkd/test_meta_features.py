"""Meta-training of loss networks over features: several architectures, alternation, the log."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lkd.config import ModelRecipe
from lkd.core.outputs import Outputs
from lkd.core.tensor_files import digest
from lkd.losses.build import build_loss, find_feature_parts, reads_features
from lkd.losses.learned.file import load_loss, read_provenance, save_loss
from lkd.meta_training.log import describe_saturation
from lkd.meta_training.online_student import assemble_loss, copy_state
from lkd.meta_training.outer_loop import OuterLoop
from lkd.training.build import choose_student, open_teacher, prepare_images
from tests.lkd.meta_recipes import YOUNG, build_loss_networks, run_recipe, tiny_recipe
from tests.lkd.parts import prepare_learned_loss


def test_one_loss_over_features_is_learned_with_two_architectures(monkeypatch, capsys) -> None:
    """From pools and while it alternates; a part that is saturated is told once even if the run goes on later."""
    monkeypatch.setattr("lkd.meta_training.log.find_saturated", lambda shares: ["features"])
    recipe = tiny_recipe(YOUNG, outer_steps=4, interleaving="both", kind="features", checkpoint_every=1)
    recipe.students, recipe.resume = [ModelRecipe("small_cnn"), ModelRecipe("small_mobilenet")], "auto"
    run_step = OuterLoop.run_step
    with monkeypatch.context() as context:
        context.setattr(OuterLoop, "run_step", lambda loop: run_step(loop) if loop.step < 3 else 1 / 0)
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
