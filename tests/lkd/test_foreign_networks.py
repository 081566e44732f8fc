"""Networks that people bring: checkpoints of other programs, architectures of their own, fixed sizes, odd outputs."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from lkd.cli import main
from lkd.config import DataRecipe, TrainRecipe
from lkd.core.errors import UserError
from lkd.core.workers import prepare_worker
from lkd.data.arrays import read_images
from lkd.losses import CrossEntropyLoss
from lkd.models.build import build, unwrap
from lkd.models.dry_run import check_trainable, fit_image_size
from lkd.models.files import fit_to_images, load_network
from lkd.models.foreign_weights import load_foreign_network
from lkd.models.teacher import load_teacher
from lkd.training.build import build_batches, prepare_images
from lkd.training.training import Training
from tests.processes import FORK

networks = importlib.import_module("lkd.models.build")  # its package has a function of that name
DATA = ["--data.train_size=100", "--data.meta_validation_size=100"]
S = [*DATA, "--train.epochs=1", "--train.batch_size=50"]
CE = ["--loss", "cross_entropy"]
NAME = "mobilenetv3_small_050"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=10, in_chans=1)


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + key: value for key, value in state.items()}


WRAPPED = {
    "plain.pth": lambda state: state,
    "module.pth.tar": lambda state: {"arch": "x", "epoch": 3, "state_dict": prefixed("module.", state)},
    "compiled.pt": lambda state: {"model_state_dict": prefixed("_orig_mod.", state)},
    "both.pt": lambda state: {"model": prefixed("module._orig_mod.", state), "args": argparse.Namespace(lr=1)},
    "lightning.ckpt": lambda state: {"state_dict": prefixed("student.", state), "loops": {}, "epoch": 1},
    "model.bin": lambda state: prefixed("model.", state),
    "numpy.pth": lambda state: {"state_dict": state, "best": np.float64(71.5), "at": np.arange(3), "p": Path("a")},
}


@pytest.mark.outside(18)
@pytest.mark.parametrize("file", WRAPPED)
def test_weights_are_found_wherever_a_script_put_them(file: str, model: nn.Module, tmp_path: Path) -> None:
    torch.save(WRAPPED[file](model.state_dict()), tmp_path / file)
    network, header = load_network(tmp_path / file, NAME)
    assert torch.equal(network.model.classifier.weight, model.classifier.weight)
    assert (header["architecture"]["num_classes"], header["architecture"]["in_chans"]) == (10, 1)


@pytest.mark.outside(18)
@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "ema"])
def test_the_average_is_taken_before_the_weights(key: str, model: nn.Module, tmp_path: Path) -> None:
    average = {name: value + 1 for name, value in model.state_dict().items()}
    content = {"state_dict": model.state_dict(), key: {"n_averaged": torch.tensor(3), **prefixed("module.", average)}}
    torch.save(content, tmp_path / "m.pth")
    network, _, taken = load_foreign_network(tmp_path / "m.pth", NAME)
    assert torch.equal(network.model.classifier.bias, model.classifier.bias + 1)
    assert taken == f"{key}.module."


@pytest.mark.outside(18)
def test_a_whole_network_is_read_without_its_code(model: nn.Module, tmp_path: Path) -> None:
    torch.save(nn.DataParallel(model), tmp_path / "m.pth")
    network, _ = load_network(tmp_path / "m.pth", NAME)
    assert torch.equal(network.model.classifier.weight, model.classifier.weight)


@pytest.mark.outside(18)
def test_timms_safetensors(model: nn.Module, tmp_path: Path) -> None:
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    network, _ = load_network(tmp_path / "model.safetensors", NAME)
    assert torch.equal(network.model.classifier.weight, model.classifier.weight)
    with pytest.raises(UserError, match="name"):
        load_network(tmp_path / "model.safetensors")


@pytest.mark.outside(18)
def test_torchvisions_networks(tmp_path: Path) -> None:
    theirs = torchvision.models.get_model("mobilenet_v3_small", num_classes=7).eval()
    torch.save({"model": theirs.state_dict(), "lr_scheduler": {}}, tmp_path / "m.pth")
    network, _ = load_network(tmp_path / "m.pth", "mobilenet_v3_small")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(network(images).logits, theirs(images))
    grey = build("torchvision/mobilenet_v3_small", 7, 1)
    assert grey(torch.randn(2, 1, 32, 32)).logits.shape == (2, 7)


@pytest.mark.outside(18)
@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_torchvisions_networks_that_shift_their_input_are_named(name: str, tmp_path: Path, capsys, caplog) -> None:
    network = torchvision.models.get_model(name, weights=None, num_classes=3, aux_logits=False, init_weights=False)
    torch.save(network.state_dict(), tmp_path / "x.pth")
    load_foreign_network(tmp_path / "x.pth", name)  # inception_v3 is timm's too, with weights of the same names
    assert f"torchvision/{name} and the option transform_input" in caplog.text
    assert not capsys.readouterr().out  # `lkd predict` writes its table there
    caplog.clear()
    options = {"aux_logits": False, "transform_input": True}
    loaded = load_foreign_network(tmp_path / "x.pth", f"torchvision/{name}", options)[0]
    assert not caplog.text
    assert unwrap(loaded).transform_input


def test_efficientnet_lite_sees_images_in_its_own_normalisation_wherever_it_is_asked(tmp_path: Path) -> None:
    network, path = timm.create_model("tf_efficientnet_lite0", num_classes=10).eval(), tmp_path / "x.pth"
    torch.save(network.state_dict(), path)
    pixels = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8)
    images = read_images((pixels, torch.arange(12) % 10), mean=(0.4, 0.4, 0.4), std=(0.2, 0.2, 0.2))
    teacher, architecture = load_teacher(images, str(path), "tf_efficientnet_lite0")
    evaluated = fit_to_images("x", *load_network(path, "tf_efficientnet_lite0"), images)
    with torch.no_grad():
        expected = network((pixels.float() / 255 - 0.5) / 0.5)
        for each in (teacher, evaluated):
            torch.testing.assert_close(each(images.normalize(pixels)).logits, expected, rtol=1e-3, atol=1e-4)
    assert architecture["is_input_said"]


@pytest.mark.outside(18)
def test_another_networks_weights_are_refused(tmp_path: Path) -> None:
    torch.save(build("resnet32", 10).state_dict(), tmp_path / "m.pth")
    with pytest.raises(UserError, match="holds a resnet32, not a resnet20"):
        load_network(tmp_path / "m.pth", "resnet20")
    torch.save(timm.create_model("resnet18", num_classes=5).state_dict(), tmp_path / "m.pth")
    with pytest.raises(UserError, match="holds no resnet34"):
        load_network(tmp_path / "m.pth", "resnet34")


@pytest.mark.outside(18)
def test_an_own_checkpoint_teaches_starts_a_student_and_is_evaluated(model: nn.Module, tmp_path, capsys) -> None:
    torch.save({"state_dict": model.state_dict(), "state_dict_ema": model.state_dict()}, tmp_path / "m.pth")
    words = ["--teacher.path", "m.pth", "--teacher.name", NAME, "--student.name", NAME, "--student.path", "m.pth"]
    assert main(["distill", *S, *words, "--loss", "kd", "--train.learning_rate", "0", "--run_dir", "r"]) == 0
    printed = capsys.readouterr().out
    assert "from state_dict_ema.*" in printed
    assert "starts from m.pth" in printed
    trained, _ = load_network(Path("r/student.safetensors"))
    assert torch.equal(trained.model.classifier.weight, model.classifier.weight)
    assert {"network", "teacher"} <= {row["kind"] for row in json.loads(Path("r/lineage.json").read_text())["used"]}
    assert main(["evaluate", "--checkpoint", "m.pth", "--name", NAME, *DATA, "--split", "meta_validation"]) == 0
    assert "since the file does not say how:" in capsys.readouterr().out


def test_what_a_foreign_network_was_built_with_is_given_by_options(model: nn.Module, tmp_path, capsys) -> None:
    torch.save(model.state_dict(), "m.pth")
    found = []
    for options in ("{}", "{act_layer: relu}"):
        words = ["m.pth", "--name", NAME, "--options", options]
        assert main(["evaluate", *words, *DATA, "--split", "meta_validation"]) == 0
        found.append(capsys.readouterr().out.partition("cross_entropy")[2])
        assert main(["export", *words, "--image_size", "32", "--out_dir", "out", "--formats", "[safetensors]"]) == 0
    assert found[0] != found[1], "another activation is another network"
    assert json.loads(Path("out/export.json").read_text())["architecture"]["options"] == {"act_layer": "relu"}
    assert main(["evaluate", "embedded", "--options", "{act_layer: relu}"]) == 2
    assert "has its own" in capsys.readouterr().err


@pytest.mark.outside(18)
def test_a_start_of_another_number_of_classes_keeps_all_but_the_classifier(tmp_path, capsys) -> None:
    torch.save(build("resnet8", 100, 1).state_dict(), tmp_path / "m.pth")
    words = ["--student.name", "resnet8", "--student.path", "m.pth", "--train.learning_rate", "0"]
    assert main(["distill", *S, *CE, *words, "--train.batch_size", "100", "--run_dir", "r"]) == 0
    assert "anew: fc.weight, fc.bias" in capsys.readouterr().out
    trained = load_network(Path("r/student.safetensors"))[0]
    assert torch.equal(trained.conv1.weight, torch.load("m.pth")["conv1.weight"])


PLUGIN = """
import lkd
from torch import nn

class Own(nn.Module):
    def __init__(self, classes, channels, width=4):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, width, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.body(x))

lkd.register("own", Own)
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(networks, "REGISTERED", {})
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "nets.py").write_text(PLUGIN)
    return ["--plugins", "nets.py"]


@pytest.mark.outside(19)
def test_an_own_architecture_on_the_command_line(plugin, capsys) -> None:
    assert main(["distill", *S, "--student.name", "my_package.my_module:build"]) == 2
    assert "lkd.register" in capsys.readouterr().err
    words = ["distill", *S, *CE, "--student", "{name: own, options: {width: 6}}", "--run_dir", "r"]
    assert main(words) == 2
    assert "plugins" in capsys.readouterr().err
    assert main([*words, *plugin]) == 0
    saved = json.loads(Path("r/config.json").read_text())
    assert len(saved["plugins"]) == 64
    assert "code" in {row["kind"] for row in json.loads(Path("r/lineage.json").read_text())["used"]}
    networks.REGISTERED.clear()
    for command in ("evaluate", "export"):
        assert main([command, "r/student.safetensors"]) == 2, "a file of results imports no code"
        assert "plugins" in capsys.readouterr().err
        assert main([command, "r/student.safetensors", *plugin]) == 0
        networks.REGISTERED.clear()
    assert main([*words, *plugin, "--resume", "auto"]) == 0
    Path("nets.py").write_text(PLUGIN + "#")
    assert main([*words, *plugin, "--resume", "auto"]) == 2
    assert "plugins" in capsys.readouterr().err


@pytest.mark.outside(19)
def test_workers_of_a_comparison_run_the_file(plugin) -> None:
    worker = FORK.Process(target=run_worker, args=(FORK.Value("i", 0),))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0


def run_worker(counter) -> None:
    prepare_worker(1, counter, "nets.py")
    build("own", 3)


@pytest.mark.outside(19)
@pytest.mark.parametrize("content", ["1 / 0", "import lkd; lkd.register('resnet18', 1)", None])
def test_a_plugin_that_fails_is_one_line(content, plugin, capsys) -> None:
    Path("nets.py").write_text(content) if content else Path("nets.py").unlink()
    assert main(["distill", *plugin]) == 2
    assert "\n" not in capsys.readouterr().err.strip()


@pytest.mark.outside(20)
@pytest.mark.parametrize(("name", "side"), [("vit_tiny_patch16_224", 28), ("swin_tiny_patch4_window7_224", 56)])
def test_a_network_of_fixed_size_takes_the_images_size(name: str, side: int) -> None:
    options = fit_image_size(name, {}, (1, side, side))
    network = build(name, 10, 1, options=options).eval()
    corner = torch.zeros(1, 1, side, side)
    corner[..., -1, -1] = 9
    with torch.no_grad():
        assert not torch.equal(network(corner).logits, network(0 * corner).logits), "the last pixel is seen"
    assert fit_image_size("resnet18", {}, (1, side, side)) == {}
    with pytest.raises(UserError, match="takes images of 1024×1024"):  # the tag of its weights is no part of 16
        fit_image_size("samvit_base_patch16.sa1b", {}, (3, 28, 28))
    assert fit_image_size(name, {}, (3, 224, 224)) == {}


@pytest.mark.outside(20)
def test_a_vision_transformer_learns_and_teaches_at_other_sizes(capsys) -> None:
    small = "{name: vit_tiny_patch16_224, options: {embed_dim: 12, depth: 1, num_heads: 2}"
    words = ["distill", *S, "--loss", "kd", "--student", small + "}", "--teacher", small + ", path: random}"]
    assert main([*words, "--run_dir", "r"]) == 0
    assert "sees the images as 224×224" in capsys.readouterr().out
    assert load_network(Path("r/student.safetensors"))[1]["architecture"]["options"]["img_size"] == 32


@pytest.mark.outside(20)
def test_a_start_of_another_image_size_is_one_line_and_leaves_the_folder_free(capsys) -> None:
    architecture = {"name": "vit_tiny_patch16_224", "options": {"embed_dim": 12, "depth": 1, "num_heads": 2}}
    torch.save(build(**architecture, num_classes=10, in_chans=1).model.state_dict(), "vit.pth")
    student = f"{{name: vit_tiny_patch16_224, path: vit.pth, options: {architecture['options']}}}".replace("'", "")
    for words in (["--student", student], ["--student.name", "torchvision/alexnet"]):
        assert main(["distill", *S, "--loss", "kd", *words, "--run_dir", "r"]) == 2
        assert "takes no images of" in capsys.readouterr().err
    assert main(["distill", *S, "--loss", "cross_entropy", "--run_dir", "r"]) == 0


@pytest.mark.outside(20)
def test_a_network_that_takes_one_size_only_is_one_line() -> None:
    with pytest.raises(UserError, match=r"crossvit_9_240.*28×28"):
        fit_image_size("crossvit_9_240", {"nonsense": 1}, (3, 28, 28))


@pytest.mark.outside(21)
@pytest.mark.parametrize("words", [["--train.batch_size", "1"], ["--train.accumulation", "50"]])
def test_batch_norm_on_one_value_is_found_before_training(words: list[str], capsys) -> None:
    command = ["distill", *S, *CE, "--student.name", "resnet18", "--data.train_size", "50", *words, "--run_dir", "r"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "train.batch_size" in error
    assert "BatchNorm" in error


@pytest.mark.outside(21)
@pytest.mark.parametrize(("command", "role"), [("teacher", "model"), ("pool", "student"), ("meta-train", "student")])
def test_other_commands_find_it_too(command: str, role: str, capsys) -> None:
    words = [command, *S, f"--{role}.name", "resnet18", "--data.train_size", "50", "--train.batch_size", "1"]
    assert main([*words, "--run_dir", "r"]) == 2
    assert "BatchNorm" in capsys.readouterr().err


class TwoOutputs(nn.Module):
    """In train mode an auxiliary head's logits, too; in some form."""

    def __init__(self, form=lambda logits: (logits, 2 * logits)) -> None:
        super().__init__()
        self.form = form
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        self.norm = nn.BatchNorm1d(10)
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        logits = self.norm(self.body(x))
        return self.form(logits) if self.training else logits


@pytest.mark.outside(22)
def test_the_first_of_several_outputs_is_trained_and_said() -> None:
    network = networks.adapt_given(TwoOutputs(), "student", 10, (1, 28, 28))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    lines = check_trainable(network, "student", (1, 28, 28), 4)
    assert "2 outputs" in lines[0]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items()), "nothing changes"
    assert network.train()(torch.randn(3, 1, 28, 28)).logits.shape == (3, 10)


@pytest.mark.outside(22)
def test_deits_two_heads_are_refused_and_their_mean_is_not() -> None:
    options = {"img_size": 32, "embed_dim": 12, "depth": 1, "num_heads": 2}
    network = build("deit_tiny_distilled_patch16_224", 5, options=options)
    assert not check_trainable(network, "student", (3, 32, 32), 2)
    network.model.set_distilled_training(True)
    with pytest.raises(UserError, match="set_distilled_training"):
        check_trainable(network, "student", (3, 32, 32), 2)


@pytest.mark.outside(22)
def test_torchvisions_googlenet_is_trained_by_its_logits() -> None:
    named = TwoOutputs(lambda logits: torchvision.models.GoogLeNetOutputs(logits, 0 * logits, None))
    network = networks.adapt_given(named, "student", 10, (1, 28, 28))
    assert "3 outputs" in check_trainable(network, "student", (1, 28, 28), 2)[0]


@pytest.mark.outside(23)
def test_parameters_without_a_gradient_are_named_and_shared_trainings_allow_them(monkeypatch) -> None:
    network = networks.adapt_given(TwoOutputs(), "student", 10, (1, 28, 28))
    assert "unused.weight" in check_trainable(network, "student", (1, 28, 28), 4)[-1]
    seen = {}
    parallel = lambda network, gpu, **options: seen.update(options) or network  # noqa: E731
    monkeypatch.setattr("lkd.training.training.DistributedDataParallel", parallel)
    data, train = DataRecipe(train_size=100, meta_validation_size=100), TrainRecipe(epochs=1, batch_size=50)
    batches = build_batches(prepare_images(data).train, train, data, 0, torch.device("cpu"), (0, 2))
    Training(network, CrossEntropyLoss(), None, batches, train)
    assert seen == {"find_unused_parameters": True}  # as on CPUs of every network, whose sums have one order then
