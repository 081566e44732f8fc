"""Images in folders: read, split, cropped, damaged; and what is said when they are not there."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor

from lkd.cli import main
from lkd.config import DataRecipe
from lkd.core.errors import UserError
from lkd.core.random import draw_uniform
from lkd.data import Batches, ImageSet, load_dataset
from lkd.data.arrays import read_images
from lkd.data.augment import choose_crop, cut_center, cut_random
from lkd.data.image_files import DamagedImageError, FileSource, ImageFiles, LoadingOptions, open_source
from lkd.models import build
from lkd.models.files import load_network
from lkd.training.build import prepare_images
from lkd.training.evaluate import evaluate
from lkd.training.introduce import introduce_images
from tests.lkd.tiny_images import write_image_folder


def test_an_image_folder_is_split_and_batched_as_a_function_of_the_step(tmp_path) -> None:
    images = prepare_images(DataRecipe("image_folder", write_image_folder(tmp_path), 0, 8, image_size=24, workers=3))
    assert (len(images.train), len(images.meta_validation), len(images.test)) == (24, 8, 8)
    assert images.train.image_shape == (3, 24, 24)
    assert torch.bincount(images.meta_validation.labels).tolist() == [2] * 4
    assert not set(images.train.index.tolist()) & set(images.meta_validation.index.tolist())
    for position in range(24):
        folder = images.train.images.name(position).split("/")[0]
        assert folder == images.train.class_names[images.train.labels[position]]
    first, second = (Batches(images.train, 5, 3, "random_resized_crop") for _ in range(2))
    in_order = [first.at(step) for step in range(6)]
    for step in (5, 1, 3):
        assert torch.equal(second.at(step).images, in_order[step].images)
        assert torch.equal(second.at(step).target, in_order[step].target)
    assert not torch.equal(first.at(0).images, Batches(images.train, 5, 4, "random_resized_crop").at(0).images)
    alone = dataclasses.replace(
        images.train, images=dataclasses.replace(images.train.images, loading=LoadingOptions(24, 1))
    )
    assert torch.equal(Batches(alone, 5, 3, "random_resized_crop").at(4).images, in_order[4].images)
    assert first.wait_seconds > 0
    plain, changed = (Batches(images.train, 24, 0, name).at(0) for name in ("random_resized_crop", "rand_augment"))
    same = [torch.equal(a, b) for a, b in zip(plain.images, changed.images, strict=True)]
    assert sum(same) < 8, "two operations that change nothing are rare"
    with pytest.raises(UserError, match=r"data\.augmentation: unknown name 'flip_and_crop'"):
        Batches(images.train, 5, 0, "flip_and_crop")


def write_picture(folder: Path, width: int, height: int) -> ImageFiles:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "p.png")
    return open_source(FileSource(folder, ["p.png"]), LoadingOptions())


@pytest.mark.parametrize(("width", "height"), [(300, 290), (260, 512), (40, 37)])
def test_the_centre_is_torchvisions(width: int, height: int, tmp_path) -> None:
    image = write_picture(tmp_path, width, height).load(0)
    cut = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])
    assert torch.equal(cut_center(image, 224, 256), cut(v2.functional.pil_to_tensor(Image.open(tmp_path / "p.png"))))
    pillow = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()])
    theirs = pillow(Image.open(tmp_path / "p.png"))
    assert (cut_center(image, 224, 256).int() - theirs.int()).abs().max() <= 1, "the usual path, but for rounding"


def test_small_pictures_are_taken_whole(tmp_path, capsys) -> None:
    root = write_image_folder(tmp_path, classes=2, train=4)
    for path in Path(root).glob("*/*/*"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(path, "PNG")
    images = prepare_images(DataRecipe("image_folder", root, image_size=32, crop_pct=1.0)).train
    pixels = next(images.load([torch.arange(1)], torch.device("cpu")))[0][0]
    path = next(Path(root, "train").glob("*/0.JPEG"))
    assert torch.equal(pixels, v2.functional.pil_to_tensor(Image.open(path)))
    batch = Batches(images, 1, 0, "none").at(0)
    alone = images.batch((images.index == batch.index).nonzero()[0], torch.device("cpu"))
    assert torch.equal(batch.images, alone.images), "training sees the same centre"
    whole = read_images(ImageFolder(f"{root}/train"), image_size=32, crop_pct=1.0)
    assert torch.equal(next(whole.load([torch.arange(1)], torch.device("cpu")))[0][0], pixels)
    words = ["--data.name", "image_folder", "--data.root", root, "--data.image_size", "32"]
    for size, warned in ((32, True), (24, False)):
        said = introduce_images(prepare_images(DataRecipe("image_folder", root, image_size=size)))
        assert ("--data.crop_pct 1 takes them whole" in said) == warned
    words += ["--data.crop_pct", "1"]
    words += ["--model.name", "tiny_cnn", "--train.batch_size", "2", "--train.epochs", "1", "--run_dir", "t"]
    assert main(["teacher", *words]) == 0
    assert "crops of 32×32, their centres from a shorter side of 32" in capsys.readouterr().out
    assert load_network(Path("t/teacher.safetensors"))[1]["input"]["crop_pct"] == 1


def test_random_crops_cover_what_the_literature_says() -> None:
    width, height = 400, 300
    draws = torch.rand(2000, 10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    boxes = torch.tensor([choose_crop((width, height), draw.tolist()) for draw in draws]).double()
    left, top, right, bottom = boxes.unbind(1)
    assert ((left >= 0) & (top >= 0) & (right <= width) & (bottom <= height)).all()
    area, ratio = (right - left) * (bottom - top) / (width * height), (right - left) / (bottom - top)
    assert 0.078 < area.min() < 0.1
    assert area.max() > 0.9
    assert 0.74 < ratio.min() < 0.77
    assert 1.3 < ratio.max() < 1.35
    draw = transforms.RandomResizedCrop.get_params
    whole = torch.empty(3, height, width)
    theirs = torch.tensor([draw(whole, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(2000)]).double()
    assert abs(area.mean() - (theirs[:, 2] * theirs[:, 3]).mean() / (width * height)) < 0.03
    assert abs(left.mean() - theirs[:, 1].mean()) < 10
    assert choose_crop((100, 10), [[1.0, 0.5, 0.0, 0.0]] * 10) == (43, 0, 56, 10)


def test_a_random_crop_is_the_part_and_its_flip(tmp_path) -> None:
    image = write_picture(tmp_path, 64, 64).load(0)
    numbers = draw_uniform(torch.arange(8), torch.zeros(8, dtype=torch.int64), 41)
    flips = numbers[:, 40] < 0.5
    assert 0 < flips.sum() < 8
    for row, flip in zip(numbers, flips, strict=True):
        left, top, right, bottom = choose_crop((64, 64), row[:40].view(10, 4).tolist())
        part = v2.functional.resized_crop(image, top, left, bottom - top, right - left, [16, 16], antialias=True)
        assert torch.equal(cut_random(image, 16, row), part.flip(-1) if flip else part)


def test_every_format_is_decoded_as_pillow_does(tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    for mode, suffix in [("RGB", "png"), ("L", "png"), ("RGBA", "png"), ("P", "png"), ("RGB", "bmp"), ("CMYK", "tiff")]:
        picture.convert(mode).save(tmp_path / f"a.{suffix}")
        expected = pil_to_tensor(Image.open(tmp_path / f"a.{suffix}").convert("RGB"))
        assert torch.equal(FileSource(tmp_path, [f"a.{suffix}"]).load(0), expected), (mode, suffix)
    for mode in ("RGB", "L", "CMYK"):
        picture.convert(mode).save(tmp_path / "a.png.jpg", format="JPEG")  # of a suffix that lies
        expected = pil_to_tensor(Image.open(tmp_path / "a.png.jpg").convert("RGB"))
        assert (FileSource(tmp_path, ["a.png.jpg"]).load(0).int() - expected.int()).abs().max() <= 2, mode
    (tmp_path / "half.jpg").write_bytes((tmp_path / "a.png.jpg").read_bytes()[:500])
    with pytest.raises(DamagedImageError, match=r"^half\.jpg: cannot be decoded \("):
        FileSource(tmp_path, ["half.jpg"]).load(0)


def test_an_image_looks_as_its_index_and_augmentation_seed_say(tmp_path) -> None:
    images = prepare_images(DataRecipe("image_folder", write_image_folder(tmp_path), 0, 8, image_size=24)).train
    batches = Batches(images, 8, 0, "random_resized_crop", augmentation_seeds=2)
    looks: dict[tuple[int, int], torch.Tensor] = {}
    for step in range(4 * 3):  # four epochs
        batch = batches.at(step)
        for image, *look in zip(batch.images, batch.index.tolist(), batch.augmentation.tolist(), strict=True):
            assert torch.equal(looks.setdefault(tuple(look), image), image)
    assert len(looks) == 2 * 24
    assert {augmentation for _, augmentation in looks} == {1, 2}
    for index in images.index.tolist():
        assert not torch.equal(looks[index, 1], looks[index, 2])
    other = Batches(images, 8, 9, "random_resized_crop", augmentation_seeds=2).at(0)
    for image, index in zip(other.images, other.index.tolist(), strict=True):
        assert torch.equal(image, looks[index, 1]), "whatever the seed of the training"
    endless = Batches(images, 24, 0, "random_resized_crop")
    seeds = [endless.at(epoch).augmentation for epoch in range(3)]
    assert len({int(seed[0]) for seed in seeds}) == 3
    halves = [Batches(images, 24, 0, "random_resized_crop", part=(number, 2)).at(1) for number in (0, 1)]
    whole = endless.at(1)
    for number, half in enumerate(halves):
        assert torch.equal(half.images, whole.images[number::2]), "processes see what one process would"


def damage(images: ImageSet, slots: list[int]) -> list[str]:
    names = [images.images.name(slot) for slot in slots]
    for name in names:
        Path(images.images.source.root, name).write_bytes(b"no picture")
    return names


def test_damaged_images_are_skipped_counted_and_named(tmp_path, caplog) -> None:
    recipe = DataRecipe("image_folder", write_image_folder(tmp_path), 0, 8, image_size=24)
    images = prepare_images(recipe).train
    batches = Batches(images, 24, 0, "random_resized_crop", steps=1)
    whole = batches.at(0)
    order = batches.order(0)
    names = damage(images, order[[3, 4, 23]].tolist())
    again = Batches(images, 24, 0, "random_resized_crop", steps=1).at(0)
    replaced = order.clone()
    replaced[[3, 4, 23]] = order[[5, 5, 0]]
    assert torch.equal(again.index, images.index[replaced])
    assert torch.equal(again.target, images.labels[replaced])
    for slot, source in [(3, 5), (4, 5), (23, 0), (6, 6)]:
        assert torch.equal(again.images[slot], whole.images[source])
    for name in names:
        assert sum(name in message for message in caplog.messages) == 1
    count = images.images.damage
    assert (count.damaged, count.seen) == (4, 24 + 24 + 4), "place 3 asks for 4 and 5, place 23 for 0"
    kept = images.batch(torch.arange(24), torch.device("cpu"))
    assert sorted(kept.index.tolist()) == sorted(images.index[order[[*range(3), *range(5, 23)]]].tolist())


def test_too_many_damaged_images_end_the_run(tmp_path, capsys) -> None:
    root = write_image_folder(tmp_path)
    images = load_dataset("image_folder", root, LoadingOptions(24, damaged_limit=0.0)).train
    again = load_dataset("image_folder", root, LoadingOptions(24, damaged_limit=0.0001)).train
    [name] = damage(images, [0])
    for _ in range(3):  # the same picture again is no other one
        again.batch(torch.arange(2), torch.device("cpu"))
    with pytest.raises(UserError, match=rf"1 of \d+ images seen cannot be decoded \({name}\), more than data\.damaged"):
        images.batch(torch.arange(2), torch.device("cpu"))
    words = ["--data.root", root, "--data.train_size", "24", "--data.meta_validation_size", "8", "--student.name"]
    words += ["small_cnn", "--teacher.path", "random", "--teacher.name", "small_cnn", "--train.batch_size", "8"]
    words += ["--data.name", "image_folder", "--data.image_size", "24", "--train.epochs", "1"]
    assert main(["distill", *words, "--run_dir", str(tmp_path / "stopped"), "--data.damaged_limit", "0"]) == 2
    assert f"({name})" in capsys.readouterr().err


def test_an_evaluation_says_of_how_many_and_of_which_images_it_is(tmp_path, capsys) -> None:
    root = write_image_folder(tmp_path, classes=2, train=10, val=6)
    words = ["--data.name", "image_folder", "--data.root", root, "--data.image_size", "24", "--threads", "1"]
    words += ["--model.name", "tiny_cnn", "--train.batch_size", "6", "--train.epochs", "1", "--run_dir", "t"]
    assert main(["teacher", *words, "--data.meta_validation_size", "6"]) == 0
    evaluate = ["evaluate", "t/teacher.safetensors", "--device", "cpu"]
    assert main(evaluate) == 0
    assert "on 12 test images of image_folder" in capsys.readouterr().out
    assert main([*evaluate, "--split", "meta_validation"]) == 0
    assert "on 6 meta_validation images" in capsys.readouterr().out
    damage(load_dataset("image_folder", root, LoadingOptions(24)).test, [0, 7, 8])
    assert main(evaluate) == 0
    said = capsys.readouterr().out
    assert "on 9 test images of image_folder" in said
    assert "a shorter side of 27, 3 that cannot be decoded left out" in said
    first = next(Path(root, "train").glob("*/0.JPEG"))
    first.with_name("00.JPEG").write_bytes(first.read_bytes())
    assert main([*evaluate, "--split", "meta_validation"]) == 2
    assert "may have been trained on" in capsys.readouterr().err


def test_an_evaluation_on_damaged_images_alone_is_one_line(tmp_path) -> None:
    images = load_dataset("image_folder", write_image_folder(tmp_path, classes=2), LoadingOptions(24, 1)).train
    images = images.select(torch.arange(3))
    damage(images, [0, 1, 2])
    with pytest.raises(UserError, match="evaluation: none of the 3 images"):
        evaluate(build("tiny_cnn", 2), images, torch.device("cpu"))


def test_folders_of_another_layout_are_one_line(tmp_path) -> None:
    def refuse(message: str, root: str | None = str(tmp_path)) -> None:
        with pytest.raises(UserError, match=rf"data\.root: .*{message}"):
            load_dataset("image_folder", root, LoadingOptions(24))

    refuse("missing", None)
    refuse("train/CLASS/")
    (tmp_path / "train" / "cat").mkdir(parents=True)
    refuse("val/CLASS/")
    (tmp_path / "val" / "dog").mkdir(parents=True)
    refuse("val: 'dog' is none of the 1 classes")
    (tmp_path / "val" / "dog").rename(tmp_path / "val" / "cat")
    refuse("no training images")
    (tmp_path / "train" / "cat" / "a.jpg").write_bytes(b"no picture")
    (tmp_path / "train" / "empty").mkdir()
    refuse("no validation images")
    (tmp_path / "val" / "cat" / "a.jpg").write_bytes(b"no picture")
    refuse(r"1 of the 2 classes have no training images in .* \(empty\)")
    (tmp_path / "train" / "empty").rmdir()
    refuse(r"holds 1 class \(cat\)")
    (tmp_path / "train" / "dog").mkdir()
    (tmp_path / "train" / "dog" / "a.jpg").write_bytes(b"no picture")
    broken = load_dataset("image_folder", str(tmp_path), LoadingOptions(24)).train
    with pytest.raises(UserError, match=r"no image can be decoded \(.../a\.jpg"):
        Batches(broken, 1, 0).at(0)


def test_the_teacher_of_the_package_is_for_its_own_images_alone(tmp_path, capsys) -> None:
    words = ["--data.name", "image_folder", "--data.root", write_image_folder(tmp_path), "--data.image_size", "24"]
    assert main(["distill", *words, "--loss", "cross_entropy"]) == 2
    assert "teacher.path: missing; embedded, the default, knows the 10 classes" in capsys.readouterr().err
