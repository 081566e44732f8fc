"""CIFAR and image folders: read, split, augmented; and what is said when they are not there."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from lkd.assembly import prepare_images
from lkd.config import DataRecipe
from lkd.data import Batches, load_dataset
from lkd.data.image_files import ImageFiles, choose_crop, cut_centers, cut_random_crops
from lkd.errors import UserError
from tests.lkd.tiny_images import write_cifar, write_image_folder


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_is_read_and_split(name: str, classes: int, tmp_path, monkeypatch) -> None:
    root = write_cifar(tmp_path, name, monkeypatch)
    recipe = DataRecipe(name, root, 0, 100, augmentation="flip_and_crop_4")
    images = prepare_images(recipe)
    assert (len(images.train), len(images.meta_validation), len(images.test)) == (300, 100, 100)
    assert images.train.num_classes == classes
    assert images.train.image_shape == (3, 32, 32)
    assert torch.bincount(images.meta_validation.labels, minlength=classes).tolist() == [100 // classes] * classes
    assert Batches(images.train, 8, 0, "flip_and_crop_4").at(0).images.shape == (8, 3, 32, 32)


def test_missing_and_damaged_cifar_is_one_line(tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"data\.root: missing; give the folder that holds cifar-100-python/"):
        load_dataset("cifar100")
    with pytest.raises(UserError, match="holds no cifar-100-python/; unpack https://"):
        load_dataset("cifar100", str(tmp_path))
    root = write_cifar(tmp_path, "cifar100", monkeypatch)
    with (tmp_path / "cifar-100-python" / "train").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="is damaged") as caught:
        load_dataset("cifar100", root)
    assert "\n" not in str(caught.value)


def test_an_image_folder_is_split_and_batched_as_a_function_of_the_step(tmp_path) -> None:
    recipe = DataRecipe("image_folder", write_image_folder(tmp_path), 0, 8, image_size=24)
    images = prepare_images(recipe)
    assert (len(images.train), len(images.meta_validation), len(images.test)) == (24, 8, 8)
    assert images.train.image_shape == (3, 24, 24)
    assert torch.bincount(images.meta_validation.labels).tolist() == [2] * 4
    assert not set(images.train.index.tolist()) & set(images.meta_validation.index.tolist())
    for position, path in enumerate(images.train.images.paths):
        assert path.parent.name == images.train.class_names[images.train.labels[position]]
    first, second = (Batches(images.train, 5, 3, "random_resized_crop") for _ in range(2))
    in_order = [first.at(step) for step in range(6)]
    for step in (5, 1, 3):
        assert torch.equal(second.at(step).images, in_order[step].images)
        assert torch.equal(second.at(step).target, in_order[step].target)
    assert not torch.equal(first.at(0).images, Batches(images.train, 5, 4, "random_resized_crop").at(0).images)
    with pytest.raises(UserError, match=r"data\.augmentation: unknown name 'flip_and_crop'"):
        Batches(images.train, 5, 0, "flip_and_crop")


def write_picture(folder: Path, width: int, height: int) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "p.png")
    return folder / "p.png"


@pytest.mark.parametrize(("width", "height"), [(300, 290), (260, 512), (40, 37)])
def test_the_centre_is_torchvisions(width: int, height: int, tmp_path) -> None:
    path = write_picture(tmp_path, width, height)
    cut = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()])
    assert torch.equal(cut_centers(ImageFiles((path,), 224))[0], cut(Image.open(path)))


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
    theirs = torch.tensor(
        [
            transforms.RandomResizedCrop.get_params(torch.empty(3, height, width), (0.08, 1), (3 / 4, 4 / 3))
            for _ in range(2000)
        ]
    ).double()
    assert abs(area.mean() - (theirs[:, 2] * theirs[:, 3]).mean() / (width * height)) < 0.03
    assert abs(left.mean() - theirs[:, 1].mean()) < 10
    assert choose_crop((100, 10), [[1.0, 0.5, 0.0, 0.0]] * 10) == (43, 0, 56, 10)


def test_a_random_crop_is_the_part_and_its_flip(tmp_path) -> None:
    path = write_picture(tmp_path, 64, 64)
    crops = cut_random_crops(ImageFiles((path,) * 8, 16), torch.Generator().manual_seed(0))
    assert crops.shape == (8, 3, 16, 16)
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(8, 10, 4, generator=generator, dtype=torch.float64)
    flips = torch.rand(8, generator=generator) < 0.5
    assert 0 < flips.sum() < 8
    image = Image.open(path)
    for crop, draw, flip in zip(crops, draws, flips, strict=True):
        left, top, right, bottom = choose_crop((64, 64), draw.tolist())
        part = transforms.functional.resized_crop(image, top, left, bottom - top, right - left, [16, 16])
        expected = transforms.functional.pil_to_tensor(part)
        assert torch.equal(crop, expected.flip(-1) if flip else expected)


def test_folders_of_another_layout_are_one_line(tmp_path) -> None:
    def refuse(message: str, root: str | None = str(tmp_path), size: int = 24) -> None:
        with pytest.raises(UserError, match=message):
            load_dataset("image_folder", root, size)

    refuse(r"data\.root: missing; give the folder that holds train/CLASS", None)
    refuse("holds no train/CLASS/ folders; expected train/CLASS")
    refuse("image_size: 4 is not at least 8", size=4)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    refuse("holds no val/CLASS/ folders")
    (tmp_path / "val" / "dog").mkdir(parents=True)
    refuse("val/dog is of no class in")
    (tmp_path / "val" / "dog").rename(tmp_path / "val" / "cat")
    refuse("no images")
    (tmp_path / "train" / "cat" / "a.jpg").write_bytes(b"no picture")
    (tmp_path / "val" / "cat" / "a.jpg").write_bytes(b"no picture")
    broken = load_dataset("image_folder", str(tmp_path), 24).train
    with pytest.raises(UserError, match=r"a\.jpg: cannot be decoded"):
        broken.batch(torch.tensor([0]), torch.device("cpu"))
