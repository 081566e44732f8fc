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
from lkd.export.export import draw_images, export
from lkd.models import build
from lkd.models.files import load_network, save_network

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


def test_every_format_gives_the_students_logits(tmp_path: Path) -> None:
    """Against the student itself, on images of another batch size than the export saw."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    student = save_student(tmp_path / "s.safetensors")
    formats = ["timm", "safetensors", "onnx", "torch_export"]
    written = export(ExportRecipe(str(tmp_path / "s.safetensors"), str(tmp_path / "out"), formats))
    images = torch.randn(7, 3, 32, 32)
    with torch.no_grad():
        expected = student(images).logits
        read = timm.create_model("test_efficientnet", num_classes=5, checkpoint_path=str(written["timm"].path)).eval()
        torch.testing.assert_close(read(images), expected)
        read.load_state_dict(load_file(written["safetensors"].path))
        torch.testing.assert_close(read(images), expected)
        program = torch.export.load(written["torch_export"].path).module()
        torch.testing.assert_close(program(images), expected, rtol=1e-4, atol=1e-5)
    session = onnxruntime.InferenceSession(str(written["onnx"].path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
    row = read_json(tmp_path / "out" / "export.json")
    assert set(row["exported"]) == set(formats)
    assert all(each["difference"] < 1e-4 for each in row["exported"].values())


def test_the_command_exports_a_student_of_ours(tmp_path: Path, capsys) -> None:
    save_student(tmp_path / "s.safetensors", "small_cnn")
    assert main(["export", "--checkpoint", str(tmp_path / "s.safetensors"), "--out_dir", str(tmp_path / "out")]) == 0
    assert "student.pt2: torch_export; largest difference" in capsys.readouterr().out
    weights = load_file(tmp_path / "out" / "student.safetensors")
    assert weights.keys() == load_network(tmp_path / "s.safetensors")[0].state_dict().keys()


def test_what_cannot_be_exported_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    save_student(tmp_path / "s.safetensors", "small_cnn")
    recipe = ExportRecipe(str(tmp_path / "s.safetensors"), str(tmp_path / "out"))
    for changes, message in (
        ({"formats": ["tflite"]}, "formats: unknown name .tflite"),
        ({"formats": []}, "formats: empty"),
        ({"formats": ["timm"]}, "formats: timm has no small_cnn"),
        ({"formats": ["onnx"]}, r"onnxruntime; pip install 'lkd\[export\]'"),
        ({"checkpoint": "missing.safetensors"}, "missing.safetensors"),
        ({"tolerance": -1.0}, "student.safetensors: its logits differ"),
    ):
        with pytest.raises(UserError, match=message):
            export(replace(recipe, **changes))


def test_the_size_comes_from_the_file_or_the_recipe() -> None:
    header = {"architecture": {"in_chans": 1}, "provenance": {"image_shape": [1, 28, 20]}}
    assert draw_images(header, ExportRecipe()).shape == (4, 1, 28, 20)
    assert draw_images(header, ExportRecipe(image_size=12)).shape == (4, 1, 12, 12)
    with pytest.raises(UserError, match=r"image_size: .* does not say which images"):
        draw_images({"architecture": {"in_chans": 1}, "provenance": {}}, ExportRecipe())
