"""Teachers: live, tabulated, unreliable; a cache of one answers as it would, and only for what it was made with."""

import dataclasses
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lkd.cli import main
from lkd.config import CacheRecipe, DataRecipe, ModelRecipe, TeacherRecipe, TrainRecipe
from lkd.core.errors import UserError
from lkd.data import Batches
from lkd.data.embedded import TEACHER
from lkd.export.cache import cache_answers
from lkd.models import build
from lkd.models.files import load_network, save_network
from lkd.models.teacher import TabulatedTeacher, Teacher, UnreliableTeacher
from lkd.models.teacher_cache import bytes_of_answer, check_made_with, check_top_k, compress_logits, restore_logits
from lkd.training import answers as asking
from lkd.training.answers import ask_anew
from lkd.training.build import check_network, choose_student, open_teacher, prepare_images
from lkd.training.introduce import introduce_teacher
from tests.lkd.parts import prepare_teacher
from tests.lkd.tiny_images import write_image_folder
from tests.processes import Command

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images():
    return prepare_images(DataRecipe(train_size=300, meta_validation_size=300))


def test_a_table_answers_as_the_network_does(images) -> None:
    teacher = Teacher(build("small_cnn", 10, 1).train())
    table = TabulatedTeacher(teacher, dataclasses.replace(images.train, at_once=70), CPU)
    batch = Batches(images.train, 50, seed=1).at(3)
    torch.testing.assert_close(table(batch).logits, teacher(batch).logits)
    assert not any(module.training for module in teacher.network.modules())
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())
    unknown = [index for index in range(int(images.train.index.max())) if index not in images.train.index]
    others = batch._replace(index=torch.tensor(unknown[:50]))
    assert bool(table(others).logits.isnan().all()), "another image's answer would be taken for theirs"


def test_scaled_logits_wherever_the_teacher_is_asked(images, tmp_path) -> None:
    batch = Batches(images.train, 50, seed=1).at(3)
    plain = TeacherRecipe("random", "tiny_cnn")
    expected = 3 * asking.prepare_teacher(open_teacher(plain, images.train), images, CPU)(batch).logits
    scaled = dataclasses.replace(plain, logit_scale=3.0)
    opened = open_teacher(scaled, images.train)
    for answers in (ask_anew(opened, images, CPU), asking.prepare_teacher(opened, images, CPU)):
        torch.testing.assert_close(answers(batch).logits, expected)
    assert "logits times 3" in introduce_teacher(opened, images, CPU)
    wrong = dataclasses.replace(scaled, random_answers=1.0)
    shuffled = ask_anew(open_teacher(wrong, images.train), images, CPU)(batch).logits
    torch.testing.assert_close(shuffled.sort(1).values, expected.sort(1).values)
    cached = dataclasses.replace(scaled, cache=str(tmp_path / "cache"))
    cache_answers(CacheRecipe(data=images.settings, teacher=cached))
    answers = asking.prepare_teacher(open_teacher(cached, images.train), images, CPU)
    torch.testing.assert_close(answers(batch).logits, expected.half().float())
    other = dataclasses.replace(cached, logit_scale=1.0)
    with pytest.raises(UserError, match=r"teacher\.logit_scale"):
        asking.prepare_teacher(open_teacher(other, images.train), images, CPU)


def test_random_answers_stay_with_the_image(images) -> None:
    reliable = Teacher(build("small_cnn", 10, 1))
    teacher = UnreliableTeacher(reliable, 0.6, seed=0)
    batches = Batches(images.train, 300, seed=1)
    first, second = batches.at(0), batches.at(1)
    assert not torch.equal(first.index, second.index)
    answers = {
        int(i): row for batch in (first, second) for i, row in zip(batch.index, teacher(batch).logits, strict=True)
    }
    torch.testing.assert_close(torch.stack([answers[int(i)] for i in first.index]), teacher(first).logits)
    truth = reliable(first).logits
    changed = (teacher(first).logits != truth).any(1).float().mean()
    assert 0.5 < changed < 0.7
    assert torch.equal(teacher(first).logits.sort(1).values, truth.sort(1).values)


def test_the_embedded_teacher_never_saw_an_embedded_image() -> None:
    header = load_network(TEACHER)[1]
    assert header["provenance"]["recipe"]["data"]["name"] == "fashion_mnist_rest"


def test_a_teacher_that_does_not_fit_is_refused(images, tmp_path) -> None:
    with pytest.raises(UserError, match="has 100 classes, the data set and its students have 10"):
        check_network("t", {"num_classes": 100, "in_chans": 1}, images.train)
    with pytest.raises(UserError, match="has 3 input channels"):
        check_network("t", {"num_classes": 10, "in_chans": 3}, images.train)
    with pytest.raises(UserError, match="no such file"):
        prepare_teacher(TeacherRecipe("missing.safetensors"), DataRecipe(), images, CPU)


# ----------------------------------------------------------------------------------------------------------------------
# Caches.

IN_MEMORY = DataRecipe(train_size=200, meta_validation_size=100, augmentation="flip_and_crop", augmentation_seeds=2)
RANDOM = TeacherRecipe("random", "tiny_cnn", random_answers=0.3, cache="cache")
WORDS = ["--data.train_size", "200", "--data.meta_validation_size", "100", "--data.augmentation", "flip_and_crop"]
WORDS += ["--data.augmentation_seeds", "2", "--device", "cpu", "--train.batch_size", "40", "--train.epochs", "2"]
CACHE = ["--teacher.cache", "cache"]


def in_files(tmp_path: Path) -> DataRecipe:
    """A data set in files; one cannot be decoded."""
    root = Path(write_image_folder(tmp_path / "images"))
    (root / "train" / "n00000002" / "5.JPEG").write_bytes(b"no picture")
    return DataRecipe(
        "image_folder", str(root), 0, 4, augmentation="random_resized_crop", augmentation_seeds=2, image_size=32
    )


@pytest.mark.parametrize(("where", "augmented"), [("memory", True), ("memory", False), ("files", True)])
def test_a_full_cache_answers_as_the_teacher_does_in_float16_to_the_bit(where, augmented, tmp_path) -> None:
    data = IN_MEMORY if where == "memory" else in_files(tmp_path)
    data = data if augmented else dataclasses.replace(data, augmentation="none", augmentation_seeds=0)
    size = 40 if where == "memory" else 7
    recipe = CacheRecipe(data=data, teacher=RANDOM, train=TrainRecipe(batch_size=size), shard_size=2 * size)
    cache_answers(recipe)
    images = prepare_images(data)
    cached = prepare_teacher(RANDOM, data, images, CPU)
    live = prepare_teacher(dataclasses.replace(RANDOM, cache=None), data, images, CPU)
    batches = Batches(images.train, size, 5, data.augmentation, augmentation_seeds=data.augmentation_seeds)
    for step in range(3 * batches.steps_per_epoch):
        batch = batches.at(step)
        answers, expected = cached(batch).logits, live(batch).logits
        assert torch.equal(answers, expected.half().float())
    with pytest.raises(UserError, match=r"teacher\.cache"):
        cached(batch._replace(index=images.meta_validation.index[:1].expand(size)))
    if augmented:  # to images as they are, of which the cache knows nothing
        plain = images.train.batch(torch.arange(size), CPU)
        assert torch.equal(cached(plain).logits, live(plain).logits)
    fewer = images.train.select(torch.arange(0, len(images.train), 2))
    batch = Batches(fewer, 8, 1, data.augmentation, augmentation_seeds=data.augmentation_seeds).at(0)
    found = prepare_teacher(RANDOM, data, dataclasses.replace(images, train=fewer), CPU)(batch).logits
    torch.testing.assert_close(found, live(batch).logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("classes", [10, 40_000])
def test_top_k_keeps_the_probabilities_of_the_largest_and_their_rest(classes: int) -> None:
    logits = 3 * torch.randn(6, classes)
    kept = compress_logits(logits, 3)
    assert sum(tensor.numel() * tensor.itemsize for tensor in kept.values()) == 6 * bytes_of_answer(classes, 3)
    restored, expected = restore_logits(kept, classes).softmax(1), logits.softmax(1)
    largest = expected.topk(3, 1).indices
    torch.testing.assert_close(restored.gather(1, largest), expected.gather(1, largest), rtol=0.02, atol=1e-4)
    rest = restored.scatter(1, largest, 0)
    torch.testing.assert_close(rest.sum(1), expected.scatter(1, largest, 0).sum(1), rtol=0.02, atol=1e-4)
    assert torch.equal((rest > 0).sum(1), torch.full((6,), classes - 3))
    with pytest.raises(UserError, match="its logits reach 100000, float16 holds up to 65504"):
        compress_logits(torch.tensor([[1e5, 0.0, 0.0]]), 0)
    check_top_k(4, 10)
    for wrong in (-1, 5):
        with pytest.raises(UserError, match=f"top_k: {wrong} of 10 classes; 0 keeps them all, more than 4 save"):
            check_top_k(wrong, 10)


def test_distillation_never_asks_a_cached_teacher(monkeypatch) -> None:
    assert main(["cache", *WORDS, *CACHE, "--top_k", "3"]) == 0
    monkeypatch.setattr(Teacher, "__call__", lambda *arguments: pytest.fail("asked"))
    assert main(["distill", *WORDS, *CACHE]) == 0
    assert "98.00 % on meta-validation when its answers were cached" in Path("runs/run/output.txt").read_text()


def test_what_a_cache_was_not_made_for_is_refused(capsys, monkeypatch) -> None:
    assert main(["distill", *WORDS, *CACHE]) == 2
    assert "cache holds no teacher cache; make one with lkd cache" in capsys.readouterr().err
    full = shutil.disk_usage(".")._replace(free=3000)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda folder: full)
        assert main(["cache", *WORDS, *CACHE]) == 2
    assert "teacher.cache: cache has" in capsys.readouterr().err
    assert not list(Path("cache").glob("*"))
    teachers = ["--teacher.path", "random", "--teacher.name", "tiny_cnn"]
    assert main(["cache", *WORDS, *teachers, *CACHE, "--shard_size", "90"]) == 0
    capsys.readouterr()
    for number, (wrong, message) in enumerate(
        [
            (["--teacher.path", "embedded", "--teacher.name", "null"], "teacher.network"),
            (["--teacher.random_answers", "0.1"], "teacher.random_answers"),
            (["--data.augmentation", "flip_and_crop_4"], "data.augmentation"),
            (["--data.augmentation_seeds", "3"], "lacks 3 of the 9 files for data.augmentation_seeds 3"),
            (["--data.augmentation_seeds", "0"], "data.augmentation_seeds: 0"),
            (["--data.mixup", "0.2"], "data.mixup"),
            (["--data.train_size", "300"], "data.train_size"),
            (["--loss", "fitnet"], "holds logits alone"),
        ]
    ):
        assert main(["distill", *WORDS, *teachers, *CACHE, *wrong, "--run_dir", f"refused-{number}"]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    for wrong, message in [
        (["--top_k", "3"], "top_k: 3, but the cache in cache has 0"),
        (["--data.split_seed", "1"], "holds answers to other images"),
        (["--loss", "fitnet"], "holds logits alone"),
        (["--data.cutmix", "1.0"], "holds no answers to mixed"),
    ]:
        assert main(["cache", *WORDS, *teachers, *CACHE, "--shard_size", "90", *wrong]) == 2
        assert message in capsys.readouterr().err


def test_a_cache_is_not_of_an_image_that_was_replaced(tmp_path) -> None:
    data, teacher = in_files(tmp_path), dataclasses.replace(RANDOM, random_answers=0.0)
    made = cache_answers(CacheRecipe(data=data, teacher=teacher, train=TrainRecipe(batch_size=7)))
    (Path(str(data.root)) / "train" / "n00000001" / "3.JPEG").write_bytes(b"another picture")
    now = prepare_images(data)
    with pytest.raises(UserError, match=r"was made with data\.sizes"):
        prepare_teacher(teacher, data, now, CPU)
    del made.header["made_with"]["data"]["sizes"]  # as in caches from before
    check_made_with(made, asking.identify_answers(open_teacher(teacher, now.train), now))


def test_a_cache_is_not_of_arrays_in_another_order(tmp_path) -> None:
    pixels, labels = np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8), np.arange(40) % 2
    data = DataRecipe("npz/mine", str(tmp_path), meta_validation_size=4)
    recipe = CacheRecipe(data=data, teacher=TeacherRecipe("random", "tiny_cnn", cache="cache"))
    recipe.train.batch_size = 6
    for order in (np.arange(40), np.arange(40).reshape(20, 2)[::-1].ravel()):  # of equal labels, mean and std
        part = {"images": pixels[order], "labels": labels[order]}
        np.savez(tmp_path / "mine.npz", **{f"{name}_{key}": part[key] for name in ("train", "test") for key in part})
        if order[0]:
            with pytest.raises(UserError, match=r"was made with data\.file"):
                prepare_teacher(recipe.teacher, data, prepare_images(data), CPU)
        else:
            made = cache_answers(recipe)
            prepare_teacher(recipe.teacher, data, prepare_images(data), CPU)
    del made.header["made_with"]["data"]["file"]  # as in caches from before
    now = prepare_images(data)
    check_made_with(made, asking.identify_answers(open_teacher(recipe.teacher, now.train), now))


def test_another_network_of_the_same_name_and_files_of_another_cache_are_refused() -> None:
    recipe = CacheRecipe(data=IN_MEMORY, teacher=TeacherRecipe("random", "small_cnn", cache="cache"))
    cache = cache_answers(recipe)
    images = prepare_images(IN_MEMORY)
    architecture = choose_student(ModelRecipe("small_cnn"), images.train).architecture
    torch.manual_seed(1)
    save_network(Path("other.safetensors"), build(**architecture), architecture, {})
    with pytest.raises(UserError, match=r"was made with teacher\.weights '\w+', not with '\w+'"):
        prepare_teacher(TeacherRecipe("other.safetensors", cache="cache"), IN_MEMORY, images, CPU)
    smaller = dataclasses.replace(recipe, top_k=2, teacher=dataclasses.replace(recipe.teacher, cache="smaller"))
    shutil.copy(cache_answers(smaller).path(2, 0), cache.path(2, 0))
    with pytest.raises(UserError, match="belongs to another cache"):
        prepare_teacher(recipe.teacher, IN_MEMORY, images, CPU)
    cache.path(2, 0).write_bytes(cache.path(1, 0).read_bytes()[:-100])
    with pytest.raises(UserError, match="is damaged"):
        prepare_teacher(recipe.teacher, IN_MEMORY, images, CPU)


def test_a_killed_cache_goes_on_to_the_same_bytes_and_processes_share_it(monkeypatch) -> None:
    words = ["cache", *WORDS, "--shard_size", "40", "--threads", "1"]
    assert main([*words, "--teacher.cache", "whole"]) == 0
    words += CACHE
    command = Command(words)
    command.wait_for(lambda: list(Path("cache").glob("seed-*")))
    time.sleep(random.Random(0).uniform(0, 0.02))
    command.send_signal(signal.SIGKILL)
    assert command.wait() == -signal.SIGKILL, command.text
    begun = {path: path.stat().st_mtime_ns for path in Path("cache").glob("seed-*")}
    assert 0 < len(begun) < 10
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert main(words) == 0
        assert (len(list(Path("cache").glob("seed-*"))) == 10) == (rank == "0")
    assert all(path.stat().st_mtime_ns == when for path, when in begun.items()), "what was there is kept"
    for path in Path("whole").iterdir():
        assert path.read_bytes() == (Path("cache") / path.name).read_bytes()
