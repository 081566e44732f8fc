"""Stopped or killed and gone on with: the same bits as a run that nobody disturbed, for everything that has a state."""

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lkd.cli import main
from lkd.config import DataRecipe, ModelRecipe, TeacherRecipe, TrainRecipe
from lkd.core.interrupt import Interrupted
from lkd.core.tensor_files import digest, load_checkpoint, save_checkpoint
from lkd.evaluation.comparison.trials import open_once
from lkd.losses.learned.file import read_provenance
from lkd.meta_training.outer_loop import OuterLoop
from lkd.training.build import prepare_images
from lkd.training.training import Training
from tests.lkd.meta_recipes import SMALL, run_recipe, tiny_recipe
from tests.lkd.parts import prepare_loss, prepare_teacher, start_training
from tests.lkd.tiny_images import write_image_folder
from tests.processes import RUNS, Command, read_results

MOMENTS = {  # what has to be there before a run is killed, for each time that it is
    "distill": ["checkpoints/00000000*", "checkpoints/00000001*"],
    "pool": ["pool/checkpoints-000/*", "pool/checkpoints-001/00000001*"],
    "meta-train": ["pool/checkpoints-001/*", "look/step-000002/*/*"],
}


def run(words: list[str]) -> None:
    command = Command(words)
    assert command.wait() == 0, command.text


def kill_when_there(words: list[str], pattern: str, delay: float) -> None:
    command = Command(words)
    folder = Path(words[words.index("--run_dir") + 1])
    command.wait_for(lambda: list(folder.glob(f"{pattern}.safetensors")))
    time.sleep(delay)
    command.send_signal(signal.SIGKILL)
    assert command.wait() == -signal.SIGKILL, command.text


@pytest.mark.parametrize("command", MOMENTS)
def test_a_killed_run_goes_on_to_the_same_bits(command: str) -> None:
    words = [command, *RUNS[command]]
    run([*words, "--run_dir", "whole"])
    chance = random.Random(command)
    for pattern in MOMENTS[command]:
        kill_when_there([*words, "--run_dir", "killed", "--resume", "auto"], pattern, chance.uniform(0, 0.05))
        assert not list(Path("killed").glob("*.safetensors")), "killed too late to show anything"
    run([*words, "--run_dir", "killed", "--resume", "auto"])
    whole, killed = read_results(Path("whole")), read_results(Path("killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(tensor, killed[name]) for name, tensor in whole.items())


def test_a_run_does_not_go_on_with_other_images(tmp_path, capsys) -> None:
    root, arrays = Path(write_image_folder(tmp_path / "files")), tmp_path / "mine.npz"
    pixels, labels = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8), np.arange(40) % 2
    content = {
        f"{part}_{kind}": each for part in ("train", "test") for kind, each in (("images", pixels), ("labels", labels))
    }
    np.savez(arrays, **content)

    def train(name: str, folder: Path) -> int:
        words = [
            *("--data.name", name, "--data.root", str(folder), "--data.image_size", "16", "--model.name", "tiny_cnn")
        ]
        words += ["--train.batch_size", "6", "--train.epochs", "2", "--run_dir", name[:3], "--resume", "auto"]
        return main(["teacher", *words, "--data.meta_validation_size", "4", "--threads", "1"])

    def rename(part: str) -> None:
        (root / part / "n00000000").rename(root / part / "n9")

    for change in (
        lambda: [rename(part) for part in ("train", "val")],
        lambda: (root / "train" / "n00000001" / "3.JPEG").rename(root / "train" / "n00000001" / "x.JPEG"),
        lambda: np.savez(arrays, **content | {"train_images": pixels[::-1]}),
        lambda: np.savez(arrays, **content | {"train_labels": 1 - labels}),
        lambda: (root / "val" / "n00000001" / "1.JPEG").unlink(),
    ):
        for name, folder in (("image_folder", root), ("npz/mine", tmp_path)):
            shutil.rmtree(name[:3], ignore_errors=True)
            assert train(name, folder) == 0
            max(Path(name[:3], "checkpoints").iterdir()).unlink()
            assert train(name, folder) == 0
        change()
        assert {train("image_folder", root), train("npz/mine", tmp_path)} == {0, 2}
        assert "data: the images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("pool", ["--pool.students", "1"]),
        ("meta-train", ["--pool.students", "1", "--meta.outer_steps", "1", "--meta.rollout_steps", "2"]),
        ("compare", ["--seeds", "1", "--tuning_trainings", "1"]),
    ],
)
def test_no_command_goes_on_with_other_images(command: str, words: list[str], tmp_path, capsys) -> None:
    rng = np.random.default_rng(0)
    content = {"train_labels": np.arange(40) % 2, "test_labels": np.arange(10) % 2}
    content |= {
        f"{part}_images": rng.integers(0, 256, (n, 28, 28, 1), np.uint8)
        for part, n in {"train": 40, "test": 10}.items()
    }
    np.savez(tmp_path / "mine.npz", **content)
    words += ["--data.name", "npz/mine", "--data.root", str(tmp_path), "--data.meta_validation_size", "8"]
    words += [
        "--teacher.path",
        "random",
        "--teacher.name",
        "tiny_cnn",
        "--train.batch_size",
        "8",
        "--train.epochs",
        "2",
    ]
    words += ["--threads", "1", "--run_dir", str(tmp_path / "run"), "--resume", "auto"]
    assert main([command, *words]) == 0
    assert main([command, *words]) == 0
    for other in ("train_images", "test_images", "test_labels"):
        np.savez(tmp_path / "mine.npz", **content | {other: content[other][::-1]})
        open_once.cache_clear()  # a new process would have none
        assert main([command, *words]) == 2
        assert "data: the images" in capsys.readouterr().err


WEIGHTED = {"name": "influence_weighted", "loss": "kd", "first_epoch": 1}
WEIGHTED |= {"influence": {"iterations": 2, "curvature_examples": 50}}
STATES: dict[str, dict[str, Any]] = {  # what a training of 10 steps in 2 epochs holds besides its student and momentum
    "moving average": {"ema_decay": 0.7},
    "memory bank": {"loss": {"name": "torchdistill/CRDLoss", "num_negative_samples": 64}},
    "adapters": {"loss": "torchdistill/HierarchicalContextLoss"},
    "example weights and teacher in training": {"loss": WEIGHTED | {"teacher_rate": 0.1}},
    "an optimiser with lists of tensors": {"optimizer": "kron", "learning_rate": 1e-3},
    "dto_kd": {"balance": {"name": "dto_kd", "every": 3}},
    "variance_optimal": {"balance": {"name": "variance_optimal", "every": 5, "samples": 3}},
}


def start(loss: Any = "kd", balance: Any = None, **changes: Any) -> Training:
    teacher = TeacherRecipe("random", "small_cnn")
    data = DataRecipe(train_size=100, meta_validation_size=60, augmentation="flip_and_crop")
    images = prepare_images(data)
    built = prepare_loss(loss, ModelRecipe(), teacher, images, 3)
    answers = prepare_teacher(teacher, data, images, torch.device("cpu"), built.teacher_stages)
    recipe = TrainRecipe(epochs=2, batch_size=20, **changes)
    return start_training(
        ModelRecipe(), images.train, built, answers, recipe, data, 3, torch.device("cpu"), balance=balance
    )


def take_steps(training: Training, last: int) -> None:
    while training.step < last:
        training.run_step()


@pytest.mark.parametrize("name", STATES)
@torch.compiler.set_stance("force_eager")  # kron compiles parts of its step, otherwise when it has seen more shapes
def test_a_training_goes_on_from_its_checkpoint_to_the_same_bits(name: str, tmp_path) -> None:
    whole = start(**STATES[name])
    take_steps(whole, 10)
    expected = digest([whole.state_dict(), whole.result.state_dict()])
    first = start(**STATES[name])
    take_steps(first, 6)  # within the second epoch, and within a window of variance_optimal
    save_checkpoint(tmp_path / "c", first.state_dict())
    second = start(**STATES[name])
    second.load_state_dict(load_checkpoint(tmp_path / "c"))
    take_steps(second, 10)
    assert digest([second.state_dict(), second.result.state_dict()]) == expected
    assert not any("memory" in key or "adapter" in key for key in second.student.state_dict()), "the loss's own"


class Killed(BaseException):
    """Like SIGKILL: nobody catches it, nothing is saved."""


def test_a_meta_training_that_is_stopped_and_killed_goes_on_to_the_same_bits(monkeypatch) -> None:
    """Stopped at several places: while pools are built, losses tried, students trained, rollouts taken."""
    pool = SMALL | {"sampling": "live", "refresh_every": 1}
    meta = {"outer_steps": 4, "interleaving": "both", "initial_rollout_steps": 1, "average": 0.5, "reuse_every": 2}
    whole = run_recipe(tiny_recipe(pool, run_dir="whole", checkpoint_every=2, **meta))
    calls, kills, stops = 0, (8, 50, 110), (24, 66, 95)

    def interrupt(function):
        def interrupted(*arguments):
            nonlocal calls
            calls += 1
            if calls in kills:
                raise Killed
            if calls in stops:
                os.kill(os.getpid(), signal.SIGTERM)
            return function(*arguments)

        return interrupted

    monkeypatch.setattr(Training, "run_step", interrupt(Training.run_step))
    monkeypatch.setattr(OuterLoop, "differentiate_pool_student", interrupt(OuterLoop.differentiate_pool_student))
    recipe = tiny_recipe(pool, run_dir="stopped", checkpoint_every=2, **meta)
    recipe.resume = "auto"
    ends = []
    while True:
        try:
            resumed = run_recipe(recipe)
            break
        except (Interrupted, Killed) as end:
            ends.append(type(end))
    assert min(ends.count(Interrupted), ends.count(Killed)) >= 2
    assert digest(load_file(whole)) == digest(load_file(resumed))
    assert len(list((resumed.parent / "live").iterdir())) <= 1, "those that are drawn from no more are gone"
    expected, found = read_provenance(whole), read_provenance(resumed)
    assert expected["reuse"] == found["reuse"]
    for a, b in zip(expected["curve"], found["curve"], strict=True):
        assert a == b
