"""Networks by name: sizes, stages, features under the engine; the literature's checkpoints by RepDistiller's names."""

import argparse
import hashlib
import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from lkd.cli import main
from lkd.core.errors import UserError
from lkd.models import build, describe, plain_state_dict
from lkd.models.cifar import CIFAR_NETWORKS, shuffle_channels
from lkd.models.foreign_weights import load_foreign_network, trim
from lkd.models.small import SMALL_NETWORKS
from meta import call_module

ROOT = Path(__file__).parents[2]
# Of each family: parameters with 100 classes, and a hash of the names and shapes that RepDistiller's code gives its
# weights. The parameters of all others are in docs/networks.md.
PUBLISHED = {
    "resnet8": (83_892, "b4faf54f7b37"),
    "resnet20": (278_324, "75666e3e546c"),
    "resnet8x4": (1_233_540, "70bbd2a0a18e"),
    "resnet32x4": (7_433_860, "4128398af90f"),
    "cifar_resnet50": (23_705_252, "ac953ac24853"),
    "wrn_16_2": (703_284, "d945e8e12fa2"),
    "wrn_40_2": (2_255_156, "98e306a74611"),
    "cifar_vgg8": (3_965_028, "917e90058a63"),
    "cifar_vgg13": (9_462_180, "4ab781141246"),
    "cifar_mobilenetv2_half": (812_836, "81fca5c1b045"),
    "cifar_shufflenetv1": (949_258, "ab5c850a94df"),
    "cifar_shufflenetv2": (1_355_528, "46a8810533f8"),
}


def rename(name: str, key: str) -> str:
    """RepDistiller's name of a weight."""
    return key.replace("downsample", "shortcut").replace("fc.", "linear.") if name == "cifar_resnet50" else key


@pytest.mark.parametrize("name", [*PUBLISHED, *SMALL_NETWORKS])
def test_sizes_names_and_stages(name: str) -> None:
    """Laid out on no device: nothing is computed."""
    with torch.device("meta"):
        network = build(name, 100)
        outputs = network(torch.empty(2, 3, 32, 32))
    assert outputs.logits.shape == (2, 100)
    sides = [feature.shape[-1] for feature in outputs.features.values()]
    assert len(sides) >= 3
    assert sides == sorted(sides, reverse=True)
    if name in PUBLISHED:
        shapes = {
            rename(name, key): shape
            for key, shape in trim({key: tuple(value.shape) for key, value in network.state_dict().items()}).items()
        }
        digest = hashlib.sha256(repr(sorted(shapes.items())).encode()).hexdigest()[:12]
        assert (sum(p.numel() for p in network.parameters()), digest) == PUBLISHED[name]


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_2", "cifar_vgg8", "cifar_mobilenetv2_half", "cifar_shufflenetv2"])
def test_images_may_be_grey(name: str) -> None:
    assert build(name, 7, 1)(torch.rand(2, 1, 32, 32)).logits.shape == (2, 7)


def test_the_documented_sizes_are_right() -> None:
    """docs/networks.md: name, parameters with 100 and with 1000 classes."""
    rows = re.findall(
        r"^\| `(\w+)`[^|]*\|[^|]*\| ([\d,]+) \| ([\d,]+) \|", (ROOT / "docs/networks.md").read_text(), re.M
    )
    assert {name for name, *_ in rows} >= {*CIFAR_NETWORKS, "mobilenetv1_100", "resnet18", "resnet34", "resnet50"}
    for name, *sizes in rows:
        with torch.device("meta"):
            network = build(name, 100, options={"act_layer": "relu"} if name == "mobilenetv1_100" else None)
        count = sum(p.numel() for p in network.parameters())
        (classifier,) = (m for m in network.modules() if getattr(m, "out_features", 0) == 100)
        assert [f"{count + more * (classifier.in_features + 1):,}" for more in (0, 900)] == sizes, name


def batch_norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    mean, var, weight, bias = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, mean, var, weight, bias)


def test_a_wide_block_computes_what_crds_does() -> None:
    """The shortcut with weights sees the activated input, the one without sees the input itself."""
    network = build("wrn_16_2", 10).eval()
    state = {
        key: value + 0.1 * torch.randn_like(value) for key, value in network.state_dict().items() if "num" not in key
    }
    state = {key: value.abs() if "var" in key else value for key, value in state.items()}
    network.load_state_dict(state, strict=False)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = network(x).features
    x = F.conv2d(x, state["conv1.weight"], padding=1)
    for number in (0, 1):
        name = f"block1.layer.{number}"
        active = F.relu(batch_norm(state, f"{name}.bn1", x))
        out = F.relu(batch_norm(state, f"{name}.bn2", F.conv2d(active, state[f"{name}.conv1.weight"], padding=1)))
        out = F.conv2d(out, state[f"{name}.conv2.weight"], padding=1)
        x = out + (F.conv2d(active, state[f"{name}.convShortcut.weight"]) if number == 0 else x)
    torch.testing.assert_close(features["block1"], x)
    assert shuffle_channels(torch.arange(6).view(1, 6, 1, 1), 3).flatten().tolist() == [0, 2, 4, 1, 3, 5]


def write_checkpoint(path: Path, name: str) -> dict[str, Tensor]:
    """A file as RepDistiller's train_teacher.py saves it, with random weights."""
    state = {rename(name, key): torch.rand(value.shape) for key, value in build(name, 100).state_dict().items()}
    torch.save({"epoch": 240, "model": state, "accuracy": torch.tensor(79.4), "optimizer": {"state": {}}}, path)
    return state


def check_loading(path: Path, name: str) -> None:
    state = write_checkpoint(path, name)
    network, architecture, _ = load_foreign_network(path, name)
    assert architecture["num_classes"] == 100
    for key, value in network.state_dict().items():
        assert "num_batches" in key or torch.equal(value, state[rename(name, key)])


def test_a_checkpoint_with_a_command_line_in_it_loads(tmp_path) -> None:
    state = build("resnet8", 10).state_dict()
    torch.save({"opt": argparse.Namespace(lr=0.05), "model": state}, tmp_path / "resnet8_last.pth")
    assert load_foreign_network(tmp_path / "resnet8_last.pth", "resnet8")[1]["num_classes"] == 10
    torch.save({key: value for key, value in state.items() if "num_batches" not in key}, tmp_path / "plain.pth")
    load_foreign_network(tmp_path / "plain.pth", "resnet8")


def test_crds_checkpoints_are_loaded_and_others_refused_in_one_line(tmp_path) -> None:
    def refuse(name: str, file: str, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            load_foreign_network(tmp_path / file, name)
        assert "\n" not in str(caught.value)

    check_loading(tmp_path / "a.pth", "resnet20")
    refuse("resnet32x4", "a.pth", "holds a resnet20, not a resnet32x4")
    check_loading(tmp_path / "b.pth", "cifar_resnet50")  # whose names of modules are others
    refuse("cifar_vgg13", "b.pth", "holds a cifar_resnet50, not a cifar_vgg13")
    refuse("cifar_vgg13", "missing.pth", "no such file")
    refuse("resnet33x4", "b.pth", "nearest: resnet32x4")
    torch.save({"model": {"w": torch.zeros(())}}, tmp_path / "c.pth")
    refuse("resnet8", "c.pth", "holds no resnet8: 'conv1.weight' is missing")
    other = {"layer1.0.conv1.weight": torch.zeros(8, 3, 3, 3), "layer1.0.bn1.weight": torch.zeros(8)}
    torch.save(other, tmp_path / "f.pth")
    refuse("resnet18", "f.pth", "holds no resnet18: 'conv1.weight' is missing")
    torch.save([1, 2], tmp_path / "d.pth")
    refuse("resnet8", "d.pth", "holds no weights")
    (tmp_path / "e.pth").write_bytes(b"nothing")
    refuse("resnet8", "e.pth", "cannot be read")


def test_teachers_that_do_not_fit_are_one_line_and_code_2(tmp_path, capsys) -> None:
    write_checkpoint(tmp_path / "a.pth", "resnet8")
    cases = [
        (["--teacher.path", str(tmp_path / "a.pth"), "--teacher.name", "resnet8"], "3 input channels"),
        (["--teacher.path", str(tmp_path / "a.pth")], "teacher.name"),
        (["--teacher.name", "resnet34.tv_in1k"], "holds a small_resnet"),
        (["--teacher.name", "resnet34", "--teacher.pretrained", "true"], "tag"),
        (["--teacher.path", "random", "--teacher.name", "a.b", "--teacher.pretrained"], "exclude each other"),
        (["--teacher.options", "{act_layer: relu}"], "teacher.options"),
    ]
    for number, (words, message) in enumerate(cases):
        assert main(["distill", "--run_dir", f"r{number}", *words]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert "\n" not in error


@pytest.mark.parametrize(("name", "side"), [("mobilenetv3_small_050", 64), ("deit_tiny_patch16_224", 224)])
def test_timm_logits_are_timms_own(name: str, side: int) -> None:
    network = build(name, 5).eval()
    images = torch.randn(1, 3, side, side)
    with torch.no_grad():
        outputs = network(images)
        torch.testing.assert_close(outputs.logits, network.model(images), rtol=0, atol=1e-6)
    assert list(outputs.features) == network.stage_names
    timm.create_model(name, num_classes=5).load_state_dict(plain_state_dict(network))


def test_the_literatures_mobilenet_is_timms_with_relu() -> None:
    network = build("mobilenetv1_100", 1000, options={"act_layer": "relu"})
    said = describe("student", network, "mobilenetv1_100", (3, 224, 224))
    assert said.startswith("student: mobilenetv1_100, 4,231,976 parameters, 1,1")  # 569 M multiply-adds (Howard, 2017)
    assert "MFLOPs an image, ReLU, " in said
    assert said.endswith("tag none"), "its weights are random, though timm knows a tag of it"
    assert not describe("student", network, "mobilenetv1_100", (3, 64, 64), pretrained=True).endswith("tag none")
    assert network.training


def test_attention_is_counted() -> None:
    network = build("vit_tiny_patch16_224", 1000)
    assert "2,507.4 MFLOPs" in describe("student", network, "vit_tiny_patch16_224", (3, 224, 224))


def test_features_come_without_hooks_under_functional_call() -> None:
    network = build("resnet18", 4)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    before = {name: b.clone() for name, b in network.named_buffers()}
    outputs, buffers = call_module(network, parameters, dict(network.named_buffers()), torch.randn(2, 3, 32, 32))
    outputs.features["layer4"].sum().backward()
    assert parameters["model.conv1.weight"].grad.abs().sum() > 0
    assert all(torch.equal(before[name], b) for name, b in network.named_buffers())
    assert not torch.equal(buffers["model.bn1.running_mean"], before["model.bn1.running_mean"])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("smal_cnn", {}, "small_cnn"),
        ("resnet50.tv_in2k", {}, r"resnet50\.tv_in1k"),
        ("small_cnn", {"act_layer": "relu"}, "options"),
        ("resnet18", {"nonsense": 1}, "nonsense"),
    ],
)
def test_what_cannot_be_built_is_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(name, 10, options=options)
