"""The literature's CIFAR networks: sizes, weights by RepDistiller's names, and its checkpoints."""

import argparse
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lkd.cli import main
from lkd.core.errors import UserError
from lkd.models import build
from lkd.models.cifar import CIFAR_NETWORKS
from lkd.models.published_weights import load_crd_checkpoint

ROOT = Path(__file__).parents[2]
PARAMETERS = {  # with 100 classes
    "resnet8": 83_892,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "cifar_resnet50": 23_705_252,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "cifar_vgg8": 3_965_028,
    "cifar_vgg13": 9_462_180,
    "cifar_mobilenetv2_half": 812_836,
    "cifar_shufflenetv1": 949_258,
    "cifar_shufflenetv2": 1_355_528,
}
Shapes = dict[str, tuple[int, ...]]


def conv(name: str, inputs: int, outputs: int, kernel: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, kernel, kernel)}


def norm(name: str, channels: int) -> Shapes:
    return {f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")}


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def resnet_weights(depth: int, widths: list[int], bottleneck: bool = False) -> Shapes:
    """RepDistiller's resnet.py; with `bottleneck`, its resnetv2.py."""
    shortcut, classifier, wider = ("shortcut", "linear", 4) if bottleneck else ("downsample", "fc", 1)
    depths = [3, 4, 6, 3] if bottleneck else [(depth - 2) // 6] * 3
    found, inputs = conv("conv1", 3, widths[0], 3) | norm("bn1", widths[0]), widths[0]
    for layer, (blocks, width) in enumerate(zip(depths, widths[1:], strict=True), 1):
        for block in range(blocks):
            name = f"layer{layer}.{block}"
            kernels = ((inputs, width, 1), (width, width, 3), (width, 4 * width, 1)) if bottleneck else ()
            for number, shape in enumerate(kernels or ((inputs, width, 3), (width, width, 3)), 1):
                found |= conv(f"{name}.conv{number}", *shape) | norm(f"{name}.bn{number}", shape[1])
            if block == 0 and (layer > 1 or inputs != width * wider):
                found |= conv(f"{name}.{shortcut}.0", inputs, width * wider, 1)
                found |= norm(f"{name}.{shortcut}.1", width * wider)
            inputs = width * wider
    return found | linear(classifier, inputs, 100)


def wide_resnet_weights(depth: int, factor: int) -> Shapes:
    found, inputs = conv("conv1", 3, 16, 3), 16
    for stage in (1, 2, 3):
        width = 8 * 2**stage * factor
        for block in range((depth - 4) // 6):
            name = f"block{stage}.layer.{block}"
            found |= norm(f"{name}.bn1", inputs) | conv(f"{name}.conv1", inputs, width, 3)
            found |= norm(f"{name}.bn2", width) | conv(f"{name}.conv2", width, width, 3)
            if inputs != width:
                found |= conv(f"{name}.convShortcut", inputs, width, 1)
            inputs = width
    return found | norm("bn1", inputs) | linear("fc", inputs, 100)


def vgg_weights(depth: int) -> Shapes:
    found, inputs = {}, 3
    for block, width in enumerate((64, 128, 256, 512, 512)):
        for number in range(depth):
            found |= conv(f"block{block}.{3 * number}", inputs, width, 3) | {
                f"block{block}.{3 * number}.bias": (width,)
            }
            found |= norm(f"block{block}.{3 * number + 1}", width)
            inputs = width
    return found | linear("classifier", 512, 100)


def mobilenet_weights() -> Shapes:
    found, inputs = conv("conv1.0", 3, 16, 3) | norm("conv1.1", 16), 16
    for stage, (wider, width, blocks) in enumerate(
        [(1, 8, 1), (6, 12, 2), (6, 16, 3), (6, 32, 4), (6, 48, 3), (6, 80, 3), (6, 160, 1)]
    ):
        for block in range(blocks):
            name, inside = f"blocks.{stage}.{block}.conv", inputs * wider
            found |= conv(f"{name}.0", inputs, inside, 1) | norm(f"{name}.1", inside)
            found |= conv(f"{name}.3", 1, inside, 3) | norm(f"{name}.4", inside)
            found |= conv(f"{name}.6", inside, width, 1) | norm(f"{name}.7", width)
            inputs = width
    return found | conv("conv2.0", 160, 1280, 1) | norm("conv2.1", 1280) | linear("classifier.0", 1280, 100)


def shufflenet_v1_weights() -> Shapes:
    found, inputs = conv("conv1", 3, 24, 1) | norm("bn1", 24), 24
    for layer, (width, blocks) in enumerate(((240, 4), (480, 8), (960, 4)), 1):
        for block in range(blocks):
            name, outside = f"layer{layer}.{block}", width - inputs if block == 0 else width
            inside = outside // 4
            found |= conv(f"{name}.conv1", inputs if inputs == 24 else inputs // 3, inside, 1)
            found |= norm(f"{name}.bn1", inside)
            found |= conv(f"{name}.conv2", 1, inside, 3) | norm(f"{name}.bn2", inside)
            found |= conv(f"{name}.conv3", inside // 3, outside, 1) | norm(f"{name}.bn3", outside)
            inputs = width
    return found | linear("linear", 960, 100)


def shufflenet_v2_weights() -> Shapes:
    found, inputs = conv("conv1", 3, 24, 1) | norm("bn1", 24), 24
    for layer, (width, blocks) in enumerate(((116, 3), (232, 7), (464, 3)), 1):
        half = width // 2
        for number, shape in enumerate(
            ((1, inputs, 3), (inputs, half, 1), (inputs, half, 1), (1, half, 3), (half, half, 1)), 1
        ):
            found |= conv(f"layer{layer}.0.conv{number}", *shape) | norm(f"layer{layer}.0.bn{number}", shape[1])
        for block in range(1, blocks + 1):
            for number, shape in enumerate(((half, half, 1), (1, half, 3), (half, half, 1)), 1):
                name = f"layer{layer}.{block}"
                found |= conv(f"{name}.conv{number}", *shape) | norm(f"{name}.bn{number}", shape[1])
        inputs = width
    return found | conv("conv2", 464, 1024, 1) | norm("bn2", 1024) | linear("linear", 1024, 100)


CRD_WEIGHTS = {
    **{f"resnet{n}": resnet_weights(n, [16, 16, 32, 64]) for n in (8, 20, 32, 44, 56, 110)},
    **{f"resnet{n}x4": resnet_weights(n, [32, 64, 128, 256]) for n in (8, 32)},
    "cifar_resnet50": resnet_weights(50, [64, 64, 128, 256, 512], bottleneck=True),
    **{f"wrn_{depth}_{factor}": wide_resnet_weights(depth, factor) for depth, factor in ((16, 2), (40, 1), (40, 2))},
    "cifar_vgg8": vgg_weights(1),
    "cifar_vgg13": vgg_weights(2),
    "cifar_mobilenetv2_half": mobilenet_weights(),
    "cifar_shufflenetv1": shufflenet_v1_weights(),
    "cifar_shufflenetv2": shufflenet_v2_weights(),
}


def write_checkpoint(path: Path, name: str) -> dict[str, Tensor]:
    """A file as RepDistiller's train_teacher.py saves it, with random weights."""
    state = {key: torch.rand(shape) * 0.1 for key, shape in CRD_WEIGHTS[name].items()}
    counters = {key.replace("running_var", "num_batches_tracked"): torch.tensor(7) for key in state if "_var" in key}
    ordered = {key: value for key, value in (state | counters).items() if not key.startswith(("fc", "linear", "class"))}
    ordered |= {key: value for key, value in state.items() if key not in ordered}
    torch.save({"epoch": 240, "model": ordered, "accuracy": torch.tensor(79.4), "optimizer": {"state": {}}}, path)
    return state


def test_sizes_are_the_published_ones() -> None:
    assert PARAMETERS.keys() == CIFAR_NETWORKS.keys() == CRD_WEIGHTS.keys()
    for name, expected in PARAMETERS.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in build(name, 100).parameters()) == expected, name


@pytest.mark.parametrize("name", CIFAR_NETWORKS)
def test_networks_give_logits_and_stages_and_load_crd_checkpoints(name: str, tmp_path) -> None:
    state = write_checkpoint(tmp_path / "c.pth", name)
    network, num_classes = load_crd_checkpoint(tmp_path / "c.pth", name)
    assert num_classes == 100
    values = {key: value for key, value in network.state_dict().items() if "num_batches" not in key}
    assert all(
        torch.equal(a, b) for a, b in zip(values.values(), (state[rename(name, k)] for k in values), strict=True)
    )
    outputs = network(torch.randn(2, 3, 32, 32))
    assert outputs.logits.shape == (2, 100)
    sides = [feature.shape[-1] for feature in outputs.features.values()]
    assert len(sides) >= 4
    assert sides == sorted(sides, reverse=True)
    assert build(name, 7, 1)(torch.randn(2, 1, 32, 32)).logits.shape == (2, 7)


def rename(name: str, key: str) -> str:
    return key.replace("downsample", "shortcut").replace("fc.", "linear.") if name == "cifar_resnet50" else key


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


def test_a_shuffle_block_computes_what_crds_does() -> None:
    network = build("cifar_shufflenetv1", 10).eval()
    state = network.state_dict()
    x = torch.randn(2, 240, 8, 8)
    block = network.get_submodule("layer1")[1]
    out = F.relu(batch_norm(state, "layer1.1.bn1", F.conv2d(x, state["layer1.1.conv1.weight"], groups=3)))
    n, c, h, w = out.shape
    out = out.view(n, 3, c // 3, h, w).permute(0, 2, 1, 3, 4).reshape(n, c, h, w)
    out = F.conv2d(out, state["layer1.1.conv2.weight"], padding=1, groups=c)
    out = F.relu(batch_norm(state, "layer1.1.bn2", out))
    out = batch_norm(state, "layer1.1.bn3", F.conv2d(out, state["layer1.1.conv3.weight"], groups=3))
    with torch.no_grad():
        torch.testing.assert_close(block(x), F.relu(out + x))


def test_a_checkpoint_with_a_command_line_in_it_loads(tmp_path) -> None:
    state = build("resnet8", 10).state_dict()
    torch.save({"opt": argparse.Namespace(lr=0.05), "model": state}, tmp_path / "resnet8_last.pth")
    assert load_crd_checkpoint(tmp_path / "resnet8_last.pth", "resnet8")[1] == 10
    torch.save(state, tmp_path / "plain.pth")
    load_crd_checkpoint(tmp_path / "plain.pth", "resnet8")


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


def test_unusable_checkpoints_are_one_line(tmp_path) -> None:
    def refuse(name: str, file: str, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            load_crd_checkpoint(tmp_path / file, name)
        assert "\n" not in str(caught.value)

    write_checkpoint(tmp_path / "a.pth", "resnet20")
    refuse("resnet32x4", "a.pth", "holds a resnet20, not a resnet32x4")
    write_checkpoint(tmp_path / "b.pth", "cifar_resnet50")  # whose names of modules are others
    refuse("cifar_vgg13", "b.pth", "holds a cifar_resnet50, not a cifar_vgg13")
    refuse("cifar_vgg13", "missing.pth", "no such file")
    refuse("resnet33x4", "b.pth", "nearest: resnet32x4")
    torch.save({"model": {"w": torch.zeros(())}}, tmp_path / "c.pth")
    refuse("resnet8", "c.pth", "holds no resnet8: 'conv1.weight' is missing")
    torch.save([1, 2], tmp_path / "d.pth")
    refuse("resnet8", "d.pth", "holds no state dict")
    (tmp_path / "e.pth").write_bytes(b"nothing")
    refuse("resnet8", "e.pth", "cannot be read")
    torch.save({"model": Malicious()}, tmp_path / "f.pth")
    refuse("resnet8", "f.pth", "cannot be read")
    assert not Path("touched").exists()


def test_teachers_that_do_not_fit_are_one_line_and_code_2(tmp_path, capsys) -> None:
    write_checkpoint(tmp_path / "a.pth", "resnet8")
    cases = [
        (["--teacher.path", str(tmp_path / "a.pth"), "--teacher.name", "resnet8"], "has 100 classes, the data set"),
        (["--teacher.path", str(tmp_path / "a.pth"), "--teacher.name", "resnet20"], "holds a resnet8, not a resnet20"),
        (["--teacher.path", str(tmp_path / "a.pth")], "teacher.name: missing"),
        (["--teacher.path", "random"], "teacher.name: missing"),
        (["--teacher.name", "resnet34.tv_in1k"], "embedded holds a small_resnet, not the resnet34.tv_in1k"),
        (["--teacher.name", "resnet34", "--teacher.pretrained", "true"], "resnet34 has no tag"),
        (["--teacher.name", "resnet34.tv_in2k", "--teacher.pretrained", "true"], "nearest: resnet34.tv_in1k"),
        (["--teacher.path", "random", "--teacher.name", "a.b", "--teacher.pretrained"], "exclude each other"),
        (["--teacher.options", "{act_layer: relu}"], "do not apply to a file"),
    ]
    for number, (words, message) in enumerate(cases):
        assert main(["distill", "--run_dir", f"r{number}", *words]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert "\n" not in error


def test_the_documented_sizes_are_right() -> None:
    """docs/networks.md: name, parameters with 100 and with 1000 classes."""
    rows = re.findall(
        r"^\| `(\w+)`[^|]*\|[^|]*\| ([\d,]+) \| ([\d,]+) \|", (ROOT / "docs/networks.md").read_text(), re.M
    )
    assert {name for name, *_ in rows} >= {*CIFAR_NETWORKS, "mobilenetv1_100", "resnet18", "resnet34", "resnet50"}
    for name, *sizes in rows:
        options = {"act_layer": "relu"} if name == "mobilenetv1_100" else None
        for classes, size in zip((100, 1000), sizes, strict=True):
            with torch.device("meta"):
                count = sum(p.numel() for p in build(name, classes, options=options).parameters())
            assert f"{count:,}" == size, name
