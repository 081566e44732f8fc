"""Exported students, read back by what others read them with."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from lkd.cli import main
from lkd.config import ExportRecipe
from lkd.core.errors import UserError
from lkd.core.files import read_json
from lkd.export.export import draw_images, export, round_down_crop
from lkd.models import build
from lkd.models.files import save_network
from tests.lkd.parts import VIT

SHAPE = {"image_shape": [3, 32, 32]}


def save_student(path: Path, name: str = "test_efficientnet", **architecture) -> torch.nn.Module:
    torch.manual_seed(0)
    described = {"name": name, "num_classes": 5, "in_chans": 3, "options": {}} | architecture
    network = build(**described)
    for module in network.modules():  # statistics that a wrong mode would show
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
    save_network(path, network, described, SHAPE)
    return network.eval()


@torch.no_grad()
def test_timm_reads_its_own_networks_weights(tmp_path: Path) -> None:
    student = save_student(tmp_path / "s.safetensors")
    recipe = ExportRecipe(str(tmp_path / "s.safetensors"), str(tmp_path / "out"), ["timm", "safetensors"])
    written, images = export(recipe), torch.randn(7, 3, 32, 32)
    read = timm.create_model("test_efficientnet", num_classes=5, checkpoint_path=str(written["timm"].path)).eval()
    torch.testing.assert_close(read(images), student(images).logits)
    read.load_state_dict(load_file(written["safetensors"].path))
    torch.testing.assert_close(read(images), student(images).logits)


@torch.no_grad()
def test_the_command_exports_what_others_run(tmp_path: Path, capsys) -> None:
    """Against the student itself, on images of another batch size than the export saw."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    student, images = save_student(tmp_path / "s.safetensors", "tiny_cnn"), torch.randn(7, 3, 32, 32)
    words = ["--checkpoint", str(tmp_path / "s.safetensors"), "--out_dir", "out"]
    assert main(["export", *words, "--formats", "[safetensors, onnx, torch_export]"]) == 0
    assert "student.pt2: torch_export; largest difference" in capsys.readouterr().out
    program = torch.export.load("out/student.pt2").module()
    torch.testing.assert_close(program(images), student(images).logits, rtol=1e-4, atol=1e-5)
    session = onnxruntime.InferenceSession("out/student.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), student(images).logits, rtol=1e-4, atol=1e-5)
    assert load_file("out/student.safetensors").keys() == student.state_dict().keys()
    exported = read_json(Path("out/export.json"))["exported"]
    assert len(exported) == 3
    assert all(each["difference"] < 1e-4 for each in exported.values())


def test_a_folder_holds_one_network(tmp_path: Path) -> None:
    """Else timm, told of the folder alone, would load the weights of the one and the configuration of the other."""
    out = tmp_path / "out"
    for number, name in enumerate(("first", "second")):
        save_student(tmp_path / f"{name}.safetensors", num_classes=5 + number)
    first, second = (
        ExportRecipe(str(tmp_path / f"{n}.safetensors"), str(out), ["safetensors"]) for n in ("first", "second")
    )
    export(first)
    export(replace(first, formats=["timm"]))
    assert read_json(out / "export.json")["exported"].keys() == {"safetensors", "timm"}
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match="out holds another network, as student"):
        export(second)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    (out / "config.json").write_text("{}")  # as of a network that says how its images are prepared; the second does not
    export(replace(second, formats=["safetensors", "timm"]))
    assert not (out / "config.json").exists()


def test_what_cannot_be_exported_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    save_student(tmp_path / "s.safetensors", "small_cnn")
    save_student(tmp_path / "vit.safetensors", VIT.name, options=VIT.options)
    recipe = ExportRecipe(str(tmp_path / "s.safetensors"), str(tmp_path / "out"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.jsonl").touch()
    for changes, message in (
        ({"out_dir": str(tmp_path / "run")}, "run is a run directory"),
        ({"formats": ["tflite"]}, "formats: unknown name .tflite"),
        ({"formats": []}, "formats: empty"),
        ({"formats": ["timm"]}, "formats: timm has no small_cnn"),
        ({"formats": ["safetensors", "onnx"]}, "onnx needs onnxruntime: pip install onnx"),
        ({"checkpoint": "missing.safetensors"}, "missing.safetensors"),
        ({"checkpoint": str(tmp_path / "vit.safetensors")}, r"vit.safetensors: takes no images of 32×32 .* image_size"),
        ({"tolerance": -1.0}, "student.safetensors: its logits differ"),
    ):
        with pytest.raises(UserError, match=message):
            export(replace(recipe, **changes))
        assert "safetensors" not in changes.get("formats", []) or not list(Path(recipe.out_dir).glob("*")), "too late"


def test_the_size_comes_from_the_file_or_the_recipe() -> None:
    header = {"architecture": {"in_chans": 1}, "provenance": {"image_shape": [1, 28, 20]}}
    assert draw_images(header, ExportRecipe()).shape == (4, 1, 28, 20)
    assert draw_images(header, ExportRecipe(image_size=12)).shape == (4, 1, 12, 12)
    with pytest.raises(UserError, match=r"image_size: .* does not say which images"):
        draw_images({"architecture": {"in_chans": 1}, "provenance": {}}, ExportRecipe())


@pytest.mark.parametrize("size", [32, 96, 160, 224, 443])
def test_timm_resizes_as_a_student_of_files_was_trained(size: int) -> None:
    crop = round_down_crop({"input_size": (3, size, size), "crop_pct": 224 / 256})
    resize = timm.data.create_transform((3, size, size), crop_pct=crop).transforms[0]
    assert resize.size == round(size * 256 / 224)
    assert size != 224 or crop == 0.875
