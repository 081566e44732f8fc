"""Trust in caches, trials and commands: what a loss is told there."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lkd
from lkd.cli import main
from lkd.config import CompareRecipe, DataRecipe, FidelityRecipe, ModelRecipe, TeacherRecipe, TrainRecipe
from lkd.core.tensor_files import read_tensors, write_tensors
from lkd.evaluation.comparison.trials import Trial, run_trial
from lkd.evaluation.fidelity import Draw, run_draw
from lkd.evaluation.report.page import build_page
from lkd.evaluation.report.runs import read_runs
from lkd.losses.learned.loss import LearnedLoss
from lkd.losses.learned.trust import (
    TrustFigures,
)
from lkd.models.teacher_cache import INDEX, INDEX_KIND, VERSION
from lkd.training.answers import measure_teacher
from lkd.training.build import open_teacher, prepare_images
from lkd.training.distill import select_labelled
from tests.lkd.test_trust import CPU, DATA, build_loss


def test_a_cache_holds_the_trust_of_its_teacher_in_the_labels_that_it_was_made_with(tmp_path: Path, capsys) -> None:
    words = ["--data.train_size", "200", "--data.meta_validation_size", "100", "--data.label_noise", "0.3"]
    words += ["--data.augmentation", "flip_and_crop", "--data.augmentation_seeds", "1", "--train.epochs", "1"]
    words += ["--labelled_size", "120", "--loss", str(tmp_path / "x.lkd.safetensors")]
    lkd.save_loss(tmp_path / "x.lkd.safetensors", build_loss(), {})
    cached, old = ["--teacher.cache", str(tmp_path / "cache")], tmp_path / "cache" / INDEX
    assert main(["cache", *words, *cached]) == 0

    def distil(name: str, *more: str) -> str:
        assert main(["distill", *words, *more, "--run_dir", str(tmp_path / name)]) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("trust: "))

    told = distil("live")
    assert "agrees with" in told
    header = read_tensors(tmp_path / "live" / "student.safetensors", "network", 1)[1]
    images = prepare_images(replace(DATA, meta_validation_size=100, label_noise=0.3))
    trust = measure_teacher(open_teacher(TeacherRecipe(), images.train), select_labelled(images, 120), CPU)
    assert TrustFigures.from_json(header["provenance"]["trust"])[:4] == trust.figures[:4]
    assert str(trust) in build_page(read_runs([str(tmp_path / "live")]))
    assert distil("cached", *cached) == told
    other = distil("other", *cached, "--data.label_noise", "0.1")
    assert other.startswith("trust: unknown, as ")
    tensors, header = read_tensors(old, INDEX_KIND, VERSION)
    write_tensors(old, tensors, INDEX_KIND, VERSION, {k: header[k] for k in header if not k.startswith("trust")})
    assert distil("old", *cached).startswith("trust: unknown, as ")
    assert main(["cache", *words, *cached]) == 0
    assert distil("anew", *cached) == told


def test_a_trial_says_what_its_loss_was_told_of_the_labels_that_are_known(tmp_path: Path) -> None:
    lkd.save_loss(tmp_path / "x.lkd.safetensors", build_loss(), {})
    data, train = replace(DATA, label_noise=0.4), TrainRecipe(epochs=1, batch_size=50)
    recipe = CompareRecipe(data=data, train=train, labelled_size=100)
    rows = {
        name: run_trial(recipe, Trial(name, name, ModelRecipe("tiny_cnn"), 0, False), tmp_path / "row.json")
        for name in (str(tmp_path / "x.lkd.safetensors"), "kd")
    }
    learned, kd = rows.values()
    known = select_labelled(images := prepare_images(data), 100)
    expected = measure_teacher(open_teacher(TeacherRecipe(), images.train), known, CPU)
    assert TrustFigures.from_json(learned["trust"])[:4] == expected.figures[:4]
    assert "trust" not in kd


def measure_known_influence() -> None:
    words = ["--data.train_size", "60", "--data.meta_validation_size", "50", "--influence.curvature_examples", "10"]
    assert main(["influence", "--loss", "universal", "--influence.iterations", "1", *words]) == 0


def measure_known_variance() -> None:
    config = json.loads(Path("kd/config.json").read_text())
    config["recipe"]["loss"] = "universal"
    Path("kd/config.json").write_text(json.dumps(config))
    assert main(["variance", "--run_dir", "kd", "--samples", "4", "--batch_size", "10"]) == 0


def roll_out() -> None:
    data, train = DataRecipe(train_size=200, meta_validation_size=100), TrainRecipe(epochs=2, batch_size=20)
    recipe = FidelityRecipe(data=data, train=train, losses={"ours": "universal"}, rollout_epochs=1)
    run_draw(recipe, Draw("cosine", 2, 0.5, 0, 1), Path("learned/pool"), Path("row.json"))


@pytest.mark.parametrize("measure", [measure_known_influence, measure_known_variance, roll_out])
def test_what_is_measured_of_a_loss_is_measured_of_one_that_is_told_trust(measure, gallery: Path, monkeypatch) -> None:
    for run in ("kd", "learned"):
        shutil.copytree(gallery / run, run)
    seen, plain = [], LearnedLoss.forward

    def forward(self: LearnedLoss, *arguments):
        seen.append(self.forms()[0].trust.clone())
        return plain(self, *arguments)

    monkeypatch.setattr(LearnedLoss, "forward", forward)
    measure()
    told = torch.stack(seen)
    assert told.isfinite().all()
    assert (told[:, 0] > 0.8).all(), "the embedded teacher's"
