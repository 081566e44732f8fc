"""What people do first with a trained network, and what stops them: predict, evaluate, a loss of their own, no git."""

import csv
import io
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy

import lkd
from lkd.cli import main
from lkd.config import CompareRecipe, DataRecipe, ModelRecipe, TrainRecipe
from lkd.core import files
from lkd.core.errors import UserError
from lkd.core.files import environment
from lkd.core.outputs import Outputs
from lkd.data.embedded import TEACHER
from lkd.evaluation.comparison.trials import Trial, run_trial
from lkd.losses import KDLoss
from lkd.losses.loss import DistillationLoss, wrap_loss
from lkd.models import build
from lkd.models.files import load_network, save_network
from lkd.models.teacher import TabulatedTeacher, Teacher
from lkd.training.build import build_batches, prepare_images
from lkd.training.distill import label_by_teacher
from lkd.training.evaluate import evaluate
from lkd.training.introduce import introduce_images, may_have_seen
from lkd.training.training import BrokenInputError, DivergedError, Training
from tests.lkd.tiny_images import write_image_folder

S = ["--data.train_size=100", "--data.meta_validation_size=100", "--train.epochs=1", "--train.batch_size=50"]
CPU = torch.device("cpu")


@pytest.fixture
def shoe() -> Path:
    """An embedded image of class 9, and one of class 1, as files."""
    images = prepare_images(DataRecipe(train_size=100, meta_validation_size=100)).train
    for hidden in (".hidden", "@eaDir"):
        Path("photos", hidden).mkdir(parents=True)
    for label, name in ((9, "shoe.png"), (1, "trouser.png")):
        pixels = images.images[(images.labels == label).nonzero()[0, 0], 0].numpy()
        Image.fromarray(pixels).save(Path("photos") / name)
        Image.fromarray(pixels).save(Path("photos/@eaDir") / name)
    Path("photos/.hidden/not.png").write_bytes(b"no")
    return Path("photos/shoe.png")


@pytest.mark.outside(41)
def test_predict_names_the_classes_with_the_networks_own_probabilities(shoe: Path, capsys) -> None:
    assert main(["predict", "embedded", str(shoe), "--top_k", "2"]) == 0
    line = capsys.readouterr().out.strip()
    assert line.startswith("photos/shoe.png: Ankle boot ")
    assert line.count("%") == 2
    assert main(["predict", str(TEACHER), str(shoe), "--out", "p.csv"]) == 0
    assert "normalised by mean [0.286]" in capsys.readouterr().err, "which the file does not say"
    (row,) = csv.DictReader(Path("p.csv").read_text().splitlines())
    pixels = torch.from_numpy(np.asarray(Image.open(shoe)).copy()).float()[None, None] / 255
    with torch.no_grad():
        expected = load_network(TEACHER)[0]((pixels - 0.2860) / 0.3530).logits.softmax(1)[0]
    assert float(row["probability_1"]) == pytest.approx(float(expected.max()), abs=1e-3)


@pytest.mark.outside(41)
def test_a_folder_becomes_csv_and_damaged_pictures_are_left_out(shoe: Path, capsys) -> None:
    Path("photos/broken.jpg").write_bytes(b"no picture")
    assert main(["predict", "embedded", "photos"]) == 0
    printed = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(printed.out)))
    assert [row["class_1"] for row in rows] == ["Ankle boot", "Trouser"]
    assert 0.2 < float(rows[0]["probability_1"]) <= 1
    assert "broken.jpg" in printed.err
    assert main(["predict", "embedded", "photos", "--out", "p.csv"]) == 0
    assert len(list(csv.DictReader(Path("p.csv").read_text().splitlines()))) == 2


@pytest.mark.outside(41)
def test_pictures_that_cannot_be_read_and_answers_that_are_none(shoe: Path, capsys) -> None:
    Path("p").mkdir()
    shoe.rename("p/shoe.png")
    Path("p/torn.png").write_bytes(b"no picture")
    assert main(["predict", "embedded", "p", "--batch_size", "1"]) == 0
    assert len(list(csv.DictReader(io.StringIO(capsys.readouterr().out)))) == 1
    assert main(["predict", "embedded", "p/torn.png", "--out", "o.csv"]) == 2
    assert "pictures: none of 1 can be read" in capsys.readouterr().err
    network, header = load_network(TEACHER)
    torch.nn.init.constant_(list(network.parameters())[-1], float("inf"))
    shown = prepare_images(DataRecipe(train_size=100, meta_validation_size=100)).train
    save_network(Path("x.safetensors"), network, header["architecture"], {}, shown)
    assert main(["predict", "x.safetensors", "p/shoe.png"]) == 2
    assert "its answers are not finite" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["nowhere.png"], ["empty"]])
def test_predict_without_pictures_is_one_line(words: list[str], capsys) -> None:
    Path("empty").mkdir()
    assert main(["predict", "embedded", *words]) == 2
    assert "pictures" in capsys.readouterr().err


def test_a_size_that_a_network_does_not_take_is_one_line(shoe: Path, capsys) -> None:
    images = prepare_images(DataRecipe(train_size=100, meta_validation_size=100)).train
    options = {"img_size": 28, "patch_size": 7, "depth": 1, "embed_dim": 24}
    vit = {"name": "vit_tiny_patch16_224", "num_classes": 10, "in_chans": 1, "options": options}
    save_network(Path("vit.safetensors"), build(**vit), vit, {}, images)
    assert main(["predict", "vit.safetensors", str(shoe)]) == 0
    assert main(["predict", "vit.safetensors", str(shoe), "--image_size", "32"]) == 2
    assert "32×32" in capsys.readouterr().err
    four = {"name": "tiny_cnn", "num_classes": 10, "in_chans": 4}
    save_network(Path("four.safetensors"), build(**four), four, {"image_shape": [4, 28, 28]})
    assert main(["predict", "four.safetensors", str(shoe)]) == 2
    assert "4 channels" in capsys.readouterr().err


@pytest.mark.outside(41)
def test_evaluate_goes_by_the_files_data_and_a_test_figure_is_read_once(monkeypatch, capsys) -> None:
    pixels, labels = np.random.default_rng(0).integers(0, 255, (60, 12, 12), np.uint8), np.arange(60) % 3
    np.savez("mine.npz", train_images=pixels, train_labels=labels, test_images=pixels, test_labels=labels)
    mine = ["--data.name", "npz/mine", "--data.root", ".", "--data.meta_validation_size", "12"]
    small = ["--student.name", "tiny_cnn", "--train.epochs", "1", "--train.batch_size", "12", "--loss", "cross_entropy"]
    small += ["--teacher.path", "random", "--teacher.name", "tiny_cnn"]
    assert main(["distill", *mine, *small, "--run_dir", "r", "--report_test"]) == 0
    said = capsys.readouterr().out
    assert "test split, read once" in said
    provenance = load_network(Path("r/student.safetensors"))[1]["provenance"]
    assert main(["evaluate", "r/student.safetensors"]) == 0
    measured = capsys.readouterr().out
    assert "60 test images of npz/mine" in measured
    assert f"{provenance['test']['top1']:.4f}" in measured
    assert main(["evaluate", "--checkpoint", "r/student.safetensors", "--split", "meta_validation"]) == 0
    measured = capsys.readouterr().out
    assert "12 meta_validation images" in measured
    assert f"{provenance['meta_validation']['last']['top1']:.4f}" in measured, "the figure of the training itself"
    assert main(["evaluate", "--checkpoint", "r/student.safetensors", "--data.nane", "x"]) == 2
    assert "nearest: data.name" in capsys.readouterr().err


class Own(DistillationLoss):
    """Returns one tensor, and takes no progress."""

    def forward(self, student, teacher, target):  # type: ignore[override]
        return cross_entropy(student.logits, target)


LOSSES = {
    "torch's own": nn.CrossEntropyLoss(label_smoothing=0.1),
    "derived": Own(),
}


@pytest.mark.outside(42)
@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_of_any_form_is_adapted(kind: str) -> None:
    outputs, target = Outputs(torch.randn(4, 3), {}), torch.tensor([0, 1, 2, 0])
    terms = wrap_loss(LOSSES[kind])(outputs, outputs, target, 0.5)
    smoothing = 0.1 if kind == "torch's own" else 0.0
    torch.testing.assert_close(terms["loss"], cross_entropy(outputs.logits, target, label_smoothing=smoothing))


@pytest.mark.outside(42)
@pytest.mark.parametrize("loss", [nn.KLDivLoss(), lambda student: 0], ids=["KLDivLoss", "one argument"])
def test_a_loss_that_takes_something_else_is_one_line(loss) -> None:
    with pytest.raises(UserError, match="student, teacher, target"):
        wrap_loss(loss)


@pytest.mark.outside(42)
def test_a_reader_that_has_read_enough_is_no_fault(shoe: Path, monkeypatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def fileno(self) -> int:
            return os.open(os.devnull, os.O_WRONLY)

    monkeypatch.setattr(sys, "stdout", Closed())
    assert main(["predict", "embedded", str(shoe)]) == 141


@pytest.mark.outside(42)
def test_data_by_name_needs_no_split_sizes() -> None:
    images, labels = np.random.default_rng(0).integers(0, 255, (50, 12, 12), np.uint8), np.arange(50) % 2
    np.savez("own.npz", train_images=images, train_labels=labels, test_images=images[:6], test_labels=labels[:6])
    options = {"epochs": 1, "batch_size": 9, "root": ".", "quiet": True}
    result = lkd.distill("tiny_cnn", {"path": "random", "name": "tiny_cnn"}, "npz/own", loss="cross_entropy", **options)
    assert result.last["step"] == 5, "45 images to train on"


@pytest.mark.outside(27)
@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError])
def test_without_git_a_run_has_no_commit(error, monkeypatch) -> None:
    def fail(*_, **__):
        raise error(2, "git")

    monkeypatch.setattr(subprocess, "run", fail)
    assert environment()["commit"] is None


def test_the_commit_is_not_that_of_a_project_that_the_package_is_installed_in(tmp_path: Path, monkeypatch) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=me", "-c", "user.email=me@here"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "mine"]):
        subprocess.run([*git, *words], check=True)
    for folder, has_commit in (("lkd", True), (".venv/site-packages/lkd", False)):
        (tmp_path / folder).mkdir(parents=True)
        monkeypatch.setattr(files, "PACKAGE", tmp_path / folder)
        assert bool(environment()["commit"]) is has_commit


@pytest.fixture
def images():
    return prepare_images(DataRecipe(train_size=100, meta_validation_size=100, evaluation_batch_size=30))


@pytest.mark.outside(28)
def test_a_network_that_diverged_at_the_last_step_is_one_line(capsys) -> None:
    words = ["--train.learning_rate", "1e30", "--train.batch_size", "100", "--loss", "cross_entropy"]
    assert main(["distill", *S, *words, "--run_dir", "r"]) == 2
    assert "learning_rate" in capsys.readouterr().err


@pytest.mark.outside(28)
def test_pixels_that_are_not_finite_are_named_and_others_are_the_networks_fault(images) -> None:
    part = images.meta_validation
    pixels = part.images.float() / 255
    pixels[7] = float("nan")
    broken = type(part)(pixels, part.labels, part.index, part.class_names, (0.0,), (1.0,), 30)
    network = build("tiny_cnn", 10, 1).train()
    with pytest.raises(BrokenInputError, match=str(int(part.index[7]))):
        evaluate(network, broken, CPU)
    network.classifier.bias.data[0] = float("inf")
    with pytest.raises(DivergedError, match="100 of 100"):
        evaluate(network, part, CPU)
    assert network.training


class Greedy(nn.Module):
    """Has memory for 30 images."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(784, 10)

    def forward(self, images):
        if len(images) > 30:
            raise torch.OutOfMemoryError("out of memory")
        return Outputs(self.linear(images.flatten(1)), {})


@pytest.mark.outside(29)
def test_evaluation_takes_as_many_images_as_it_is_told(images) -> None:
    assert 0 <= evaluate(Greedy(), images.meta_validation, CPU)["top1"] <= 100
    with pytest.raises(UserError, match=r"data\.evaluation_batch_size"):
        evaluate(Greedy(), replace(images.meta_validation, at_once=40), CPU)


@pytest.mark.outside(29)
def test_a_teacher_out_of_memory_is_one_line(images) -> None:
    teacher = Teacher(Greedy())
    table = TabulatedTeacher(teacher, images.train, CPU)
    assert len(table.logits) == 100 + 1
    stranger = images.train.batch(torch.tensor([0]), CPU)._replace(index=torch.tensor([10**6]))
    assert table(stranger).logits.isnan().all(), "an image of another set stops a training"
    assert len(label_by_teacher(images, 10, teacher, CPU).train) == 100
    with pytest.raises(UserError, match=r"data\.evaluation_batch_size"):
        TabulatedTeacher(teacher, replace(images.train, at_once=31), CPU)
    train = TrainRecipe(epochs=1, batch_size=50)
    batches = build_batches(images.train, train, images.settings, 0, CPU)
    with pytest.raises(UserError, match=r"teacher.*train\.batch_size"):
        Training(build("tiny_cnn", 10, 1), KDLoss(), teacher, batches, train).run_step()


@pytest.mark.outside(28)
def test_a_comparison_takes_a_network_that_diverged_at_the_last_step_as_guessing(tmp_path: Path) -> None:
    data = DataRecipe(train_size=100, meta_validation_size=50)
    train = TrainRecipe(epochs=1, batch_size=100, learning_rate=1e30)
    recipe = CompareRecipe(data=data, train=train, methods={"A": "cross_entropy"}, baseline="A")
    row = run_trial(recipe, Trial("A", "cross_entropy", ModelRecipe("tiny_cnn"), 0, False), tmp_path / "row.json")
    assert row["diverged_at"] == 1
    assert row["meta_validation"]["top1"] == 10


@pytest.mark.parametrize(
    ("seed", "size", "doubted"), [(0, 200, False), (0, 100, False), (0, 300, True), (1, 200, True), (1, 0, False)]
)
def test_a_teacher_whose_file_says_that_it_was_trained_on_held_out_images_is_doubted(
    seed: int, size: int, doubted: bool
) -> None:
    images = prepare_images(DataRecipe("embedded", None, 400, size, split_seed=seed), scored=size > 0)
    provenance = {"recipe": {"data": asdict(DataRecipe("embedded", None, 400, 200))}}
    assert may_have_seen(provenance, images) is doubted
    provenance["recipe"]["data"]["meta_validation_size"] = None  # a tenth of images of which these are a part
    assert may_have_seen(provenance, images) is (doubted and seed == 1)
    provenance["recipe"]["data"]["meta_validation_size"] = 0
    assert may_have_seen(provenance, images) is (size > 0)
    assert not may_have_seen({"recipe": {"data": provenance["recipe"]["data"] | {"name": "cifar10"}}}, images)
    assert not may_have_seen("hostile", images)


def test_a_class_without_a_test_image_is_named(tmp_path: Path) -> None:
    write_image_folder(tmp_path, classes=3)
    recipe = DataRecipe("image_folder", str(tmp_path), meta_validation_size=0, image_size=8)
    assert "no test image" not in introduce_images(prepare_images(recipe, scored=False))
    missing = sorted((tmp_path / "val").iterdir())[1]
    shutil.rmtree(missing)
    assert f"no test image of {missing.name!r}" in introduce_images(prepare_images(recipe, scored=False))


def test_a_root_without_a_data_set_and_a_loss_that_is_none_are_said() -> None:
    assert "data.root: pictures is not read" in introduce_images(prepare_images(DataRecipe(root="pictures")))
    with pytest.raises(UserError, match="universal"):
        lkd.load_loss("kd")
