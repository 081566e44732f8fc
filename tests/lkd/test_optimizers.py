"""Optimisers by timm's names, regularisation and frozen stages: against timm, torch and plain loops."""

import copy
import random
from pathlib import Path

import pytest
import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from lkd.cli import main
from lkd.config import DataRecipe, ModelRecipe, TrainRecipe
from lkd.core.errors import UserError
from lkd.core.tensor_files import load_checkpoint, save_checkpoint
from lkd.data import Batches
from lkd.losses import CrossEntropyLoss
from lkd.models.build import build, unwrap
from lkd.models.files import load_network, save_network
from lkd.models.stages import find_head, freeze_stages
from lkd.training.build import choose_student, prepare_images
from lkd.training.introduce import introduce_network
from lkd.training.optimizer import (
    build_optimizer,
    build_scheduler,
    check_differentiable,
    check_names,
    doubt_learning_rate,
)
from lkd.training.training import Training
from tests.lkd.parts import VIT, prepare_student, start_training

CPU = torch.device("cpu")
CONVNEXT = {"patch_size": 2, "stem_type": "patch", "output_stride": 8, "depths": [1] * 4, "dims": [8, 8, 16, 16]}
ADAMW = {"optimizer": "adamw", "learning_rate": 2e-3, "weight_decay": 0.05}


@pytest.fixture(scope="module")
def images():
    return prepare_images(DataRecipe(train_size=100, meta_validation_size=50))


def start(images, model: ModelRecipe = VIT, data: DataRecipe | None = None, **changes) -> Training:
    recipe = TrainRecipe(**{"epochs": 2, "batch_size": 25} | changes)
    return start_training(model, images.train, CrossEntropyLoss(), None, recipe, data or DataRecipe(), 7, CPU)


def run(training: Training, steps: int | None = None) -> Training:
    for _ in range(steps or training.total_steps - training.step):
        training.run_step()
    return training


def collect_groups(optimizer: torch.optim.Optimizer, names: dict[torch.Tensor, str]) -> set[tuple]:
    found = {}
    for group in optimizer.param_groups:
        settings = group["weight_decay"], round(group.get("lr_scale", 1.0), 12)
        found.setdefault(settings, set()).update(names[p] for p in group["params"])
    return {(settings, *sorted(members)) for settings, members in found.items()}


def test_groups_are_those_of_timm() -> None:
    network = build(VIT.name, 10, 1, options=VIT.options)
    model = unwrap(network)
    names = {p: name for name, p in model.named_parameters()}
    recipe = TrainRecipe(**ADAMW)
    theirs = create_optimizer_v2(model, "adamw", lr=2e-3, weight_decay=0.05)
    assert collect_groups(build_optimizer(network, recipe), names) == collect_groups(theirs, names)

    recipe = TrainRecipe(**ADAMW, layer_decay=0.7)
    theirs = torch.optim.AdamW(param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.7))
    assert collect_groups(build_optimizer(network, recipe), names) == collect_groups(theirs, names)

    assert len(build_optimizer(network, TrainRecipe()).param_groups) == 1, "sgd decays everything"
    assert len(build_optimizer(network, TrainRecipe(decay_norms_and_biases=False)).param_groups) == 2


@pytest.mark.parametrize(
    "schedule", [{"schedule": "wsd", "epochs": 13, "warmup_steps": 500}, {"schedule": "rsqrt", "warmup_steps": 40}]
)
def test_schedules_are_not_judged_by_one_step_an_epoch(schedule) -> None:
    check_names(TrainRecipe(**schedule))


def test_a_training_equals_a_plain_loop(images) -> None:
    """AdamW by timm's groups, warm-up by steps, clipping, smoothed labels, a rate in proportion to the batch."""
    warm = {"warmup_steps": 3, "warmup_learning_rate": 1e-5, "min_learning_rate": 1e-4, "cooldown_epochs": 1}
    rate = {"learning_rate": 4e-3, "learning_rate_for_batch": 50}
    training = start(images, **ADAMW | warm | rate, epochs=3, clip_norm=0.2, label_smoothing=0.1)
    student = prepare_student(VIT, images.train, 7, CPU).train()
    optimizer = create_optimizer_v2(unwrap(student), "adamw", lr=2e-3, weight_decay=0.05)
    rates = [1e-5 + (2e-3 - 1e-5) * step / 3 for step in range(3)]
    rates += [1e-4 + (2e-3 - 1e-4) * (1 + torch.tensor(step / 8 * torch.pi).cos().item()) / 2 for step in range(3, 8)]
    rates += [1e-4] * 4
    batches = Batches(images.train, 25, 7)
    for step, each in enumerate(rates):
        assert training.learning_rate == pytest.approx(each), step
        training.run_step()
        for group in optimizer.param_groups:
            group["lr"] = each
        batch = batches.at(step)
        optimizer.zero_grad()
        cross_entropy(student(batch.images).logits, batch.target, label_smoothing=0.1).backward()
        assert clip_grad_norm_(student.parameters(), 0.2) > 0.2
        optimizer.step()
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(training.student.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "muon"},
        {"optimizer": "adan"},
        {"optimizer": "adafactorbv"},
        {**ADAMW, "swa_epochs": 2, "layer_decay": 0.8, "head_learning_rate": 0.01},
    ],
    ids=str,
)
def test_a_resumed_training_has_the_same_bits(images, changes: dict, tmp_path: Path) -> None:
    changes = {"learning_rate": 1e-3, "clip_norm": 1.0, "epochs": 3, **changes}
    data = DataRecipe(random_erasing=0.5)
    whole = run(start(images, data=data, **changes), 6)
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, whole.state_dict())
    run(whole)
    resumed = start(images, data=data, **changes)
    resumed.load_state_dict(load_checkpoint(path))
    run(resumed)
    for name, tensor in whole.result.state_dict().items():
        assert torch.equal(resumed.result.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adamww"}, "train.optimizer: unknown name 'adamww'; nearest: adamw"),
        ({"optimizer": "adahessian"}, "train.optimizer: adahessian needs second derivatives"),
        ({"optimizer": "fusedlamb"}, "train.optimizer: fusedlamb cannot run here"),
        ({"optimizer": "adamw", "optimizer_options": {"beta": 1}}, "unknown name 'beta'; nearest: betas"),
        ({"optimizer": "adamw", "optimizer_options": {"lr": 1}}, "give train.learning_rate"),
        ({"optimizer": "adamw", "optimizer_options": {"betas": [2, 3]}}, "train.optimizer_options: Invalid beta"),
        ({"optimizer": "adamw", "nesterov": True}, "train.nesterov: is of sgd"),
        ({"precision": "float16"}, "train.precision: float16"),
        ({"warmup_steps": 2, "warmup_epochs": 1}, "train.warmup_steps"),
        ({"cooldown_epochs": 2}, "train.cooldown_epochs: 2 leave nothing"),
        (
            {"schedule": "multistep", "milestones": [1], "cooldown_epochs": 1},
            "train.cooldown_epochs: 1 is of schedules",
        ),
        ({"schedule": "constant", "min_learning_rate": 0.1}, "train.min_learning_rate: 0.1 is of schedules"),
        ({"swa_epochs": 1, "ema_decay": 0.9}, "train.swa_epochs"),
        ({"swa_epochs": 3}, "train.swa_epochs: 3 are more than train.epochs, 2"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(images, changes: dict, message: str) -> None:
    train = TrainRecipe(**{"epochs": 2, "batch_size": 25} | changes)
    with pytest.raises(UserError, match=message):
        introduce_network("student", choose_student(VIT, images.train), images, CPU, train)


def test_milestones_that_never_come_are_warned_of(images) -> None:
    steps = {"epochs": 4, "batch_size": 25, "schedule": "multistep"}
    cases = (([4, 5], 0), ([1, 2], 0), ([1, 3], 2), ([2, 3], 2))
    said = [
        introduce_network(
            "student",
            choose_student(VIT, images.train),
            images,
            CPU,
            TrainRecipe(**steps, milestones=milestones, warmup_epochs=warmup),
        )
        for milestones, warmup in cases
    ]
    assert ["train.milestones" in each for each in said] == [True, False, True, False]


@pytest.mark.parametrize("name", ["sgd", "sgdw", "momentum", "nesterov", "nesterovw"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_nesterovs_momentum_is_what_the_recipe_says(name: str, nesterov: bool) -> None:
    optimizer = build_optimizer(nn.Linear(2, 2), TrainRecipe(optimizer=name, nesterov=nesterov))
    assert optimizer.param_groups[0]["nesterov"] is (nesterov or name.startswith("nesterov"))


@pytest.mark.parametrize("command", ["teacher", "distill", "compare"])
def test_a_misspelt_name_is_refused_before_images_are_looked_for(command: str, tmp_path, capsys) -> None:
    words = [command, "--run_dir", str(tmp_path / "run"), "--data.name", "image_folder", "--data.root", "nowhere"]
    assert main([*words, "--train.optimizer", "adamww"]) == 2
    assert main([*words, "--train.schedule", "cosin"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "train.optimizer: unknown name 'adamww'" in first
    assert "train.schedule: 'cosin'" in second


def test_a_network_without_layers_has_no_layer_decay() -> None:
    with pytest.raises(UserError, match=r"train.layer_decay: this \w+ does not say"):
        build_optimizer(build("tiny_cnn", 10, 1), TrainRecipe(layer_decay=0.5))


def test_only_optimizers_with_an_adjoint_teach_a_loss() -> None:
    for name in ("sgd", "adam", "adamw"):
        check_differentiable(TrainRecipe(optimizer=name))
    with pytest.raises(UserError, match="lamb: a loss is not learned through its steps; sgd, adam and adamw serve"):
        check_differentiable(TrainRecipe(optimizer="lamb"))
    with pytest.raises(UserError, match="amsgrad"):
        check_differentiable(TrainRecipe(optimizer="adam", optimizer_options={"amsgrad": True}))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "tiny_cnn", "resnet8"])
def test_the_head_has_a_rate_of_its_own(name: str) -> None:
    network = build(name, 10, 3)
    optimizer = build_optimizer(network, TrainRecipe(learning_rate=0.1, head_learning_rate=0.4))
    build_scheduler(optimizer, TrainRecipe(schedule="constant"), 3).step_update(0)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    (head,) = find_head(network)
    for key, parameter in unwrap(network).named_parameters():
        assert rates[parameter] == pytest.approx(0.4 if key.startswith(head) else 0.1), key
    assert {len(parameter) for parameter, rate in rates.items() if rate > 0.1} == {10}


@pytest.mark.parametrize("as_on_gpus", [False, True])
def test_the_average_over_epochs_is_the_mean_of_their_weights(images, as_on_gpus: bool, monkeypatch) -> None:
    if as_on_gpus:  # where torch would average all tensors at once
        monkeypatch.setattr("torch.optim.swa_utils._get_foreach_kernels_supported_devices", lambda: ["cpu"])
    training = start(images, ModelRecipe("tiny_cnn"), epochs=4, swa_epochs=3)
    kept = []
    for epoch in range(4):
        assert (training.result is training.student) == (epoch <= 1)
        run(training, 4)
        kept.append(copy.deepcopy(training.student.state_dict()))
    for name, tensor in training.result.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, torch.stack([each[name] for each in kept[1:]]).mean(0))


def test_erased_images_are_a_function_of_the_step(images) -> None:
    plain = Batches(images.train, 25, 7)
    erased = [Batches(images.train, 25, 7, random_erasing=0.6) for _ in range(2)]
    states = torch.get_rng_state(), random.getstate()
    first, again, other = erased[0].at(2).images, erased[1].at(2).images, erased[0].at(3).images
    assert torch.equal(first, again)
    changed = (first != plain.at(2).images).flatten(1).any(1)
    assert 5 <= changed.sum() <= 24
    assert not torch.equal(changed, (other != plain.at(3).images).flatten(1).any(1))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_smoothed_and_mixed_labels_add_up(images) -> None:
    for options in ({}, {"mixup": 0.5}):
        target = Batches(images.train, 20, 7, label_smoothing=0.2, **options).at(0).target
        torch.testing.assert_close(target.sum(1), torch.ones(20))
        assert target.min() == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("name", "stages", "frozen"),
    [
        ("resnet18", ["stem", "layer1.0"], ("conv1", "bn1", "layer1.0")),
        ("vit_tiny_patch16_224", ["stem", "stage2"], ("cls_token", "pos_embed", "patch_embed", "blocks.1", "norm.")),
        ("convnext_atto", ["stem"], ("stem",)),
        ("small_cnn", ["stages.stage1"], ("stages.stage1",)),
    ],
)
def test_frozen_stages_stay_as_they_are(
    images, name: str, stages: list[str], frozen: tuple[str, ...], tmp_path: Path
) -> None:
    options = {"vit": VIT.options, "con": CONVNEXT}.get(name[:3], {})
    model = ModelRecipe(name, options=options, freeze=stages)
    training = start(images, model, epochs=1)
    before = copy.deepcopy(unwrap(training.student).state_dict())
    run(training, 2)
    for key, tensor in unwrap(training.student).state_dict().items():
        if not key.endswith("num_batches_tracked"):
            still = torch.equal(tensor, before[key])
            assert still == key.startswith(frozen) or key.endswith("k.bias"), key
    path = tmp_path / "student.safetensors"
    save_network(path, training.result, choose_student(model, images.train).architecture, {}, images.train)
    again, _ = load_network(path)
    batch = images.train.batch(torch.arange(20), CPU).images
    torch.testing.assert_close(again(batch).logits, training.student.eval()(batch).logits, rtol=1e-4, atol=1e-5)


def test_stages_that_a_network_lacks_are_refused(images) -> None:
    with pytest.raises(UserError, match=r"freeze: unknown name 'stage9'; nearest: stage"):
        choose_student(ModelRecipe("resnet18", freeze=["stage9"]), images.train)
    network = build("tiny_cnn", 10, 1)
    everything = [name for name, _ in network.named_children()]
    with pytest.raises(UserError, match="leaves nothing"):
        freeze_stages(network, everything)
    with pytest.raises(UserError, match=r"freeze: 0\.1 is a BatchNorm1d, whose statistics would go on moving"):
        freeze_stages(nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2)), ["0"])


def test_a_head_is_kept_or_starts_anew(images, tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    plain = choose_student(ModelRecipe("tiny_cnn"), images.train)
    saved = plain.build(0, CPU)
    save_network(path, saved, plain.architecture, {}, images.train)
    kept, anew = (
        choose_student(ModelRecipe("tiny_cnn", path=str(path), new_head=new), images.train).build(1, CPU).state_dict()
        for new in (False, True)
    )
    for name, tensor in saved.state_dict().items():
        assert torch.equal(kept[name], tensor)
        assert torch.equal(anew[name], tensor) != name.startswith(find_head(saved)[0])
    plain = choose_student(ModelRecipe("torchvision/squeezenet1_1"), images.train)
    save_network(path, plain.build(0, CPU), plain.architecture, {}, images.train)
    with pytest.raises(UserError, match=r"student.new_head: torchvision/squeezenet1_1 has no classifier"):
        choose_student(ModelRecipe("torchvision/squeezenet1_1", path=str(path), new_head=True), images.train)
    with pytest.raises(UserError, match=r"student.new_head: is of the classifier in student.path"):
        choose_student(ModelRecipe("tiny_cnn", new_head=True), images.train)


@pytest.mark.parametrize(
    ("name", "rate", "said"),
    [
        *[("adamw", 0.1, True), ("lion", 0.1, True), ("nadam", 0.05, True), ("adamw", 0.001, False)],
        *[("lamb", 0.01, False), ("sgd", 0.1, False), ("rmsproptf", 0.1, False), ("adadelta", 1.0, False)],
    ],
)
def test_a_learning_rate_of_another_kind_of_optimiser_is_doubted(name: str, rate: float, said: bool) -> None:
    doubts = doubt_learning_rate(TrainRecipe(optimizer=name, learning_rate=rate))
    assert bool(doubts) == said
