"""Packed images look as the files do, and are refused where they do not belong to them."""

import shutil
from pathlib import Path

import pytest
import torch

from lkd.cli import main
from lkd.config import DataRecipe
from lkd.core.errors import UserError
from lkd.data import Batches
from lkd.training.build import prepare_images
from tests.lkd.tiny_images import write_image_folder

SIZE = 28  # 7/8 of 32, the shorter side that is packed


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    root = Path(write_image_folder(tmp_path_factory.mktemp("images")))
    (root / "train" / "n00000002" / "5.JPEG").write_bytes(b"no picture")
    packed = tmp_path_factory.mktemp("packed")
    words = ["--data.name", "image_folder", "--data.root", str(root), "--data.packed", str(packed)]
    assert main(["pack", *words, "--shorter_side", "32"]) == 0
    return root, packed


def read(root: Path, packed: Path | None, size: int = SIZE):
    return prepare_images(DataRecipe("image_folder", str(root), 0, 8, image_size=size, packed=packed and str(packed)))


def test_centres_are_those_of_the_files_and_crops_nearly(folders) -> None:
    files, packed = read(folders[0], None), read(*folders)
    for part in ("train", "meta_validation", "test"):
        ours, theirs = (getattr(images, part) for images in (packed, files))
        batches = [images.batch(torch.arange(len(images)), torch.device("cpu")) for images in (ours, theirs)]
        for column, expected in zip(*batches, strict=True):
            assert torch.equal(column, expected), "the damaged one is left out of both"
    crops = [Batches(images.train, 24, 0, "random_resized_crop").at(1) for images in (packed, files)]
    assert torch.equal(crops[0].index, crops[1].index)
    assert torch.corrcoef(torch.stack([crop.images.flatten() for crop in crops]))[0, 1] > 0.7, "of noise"


def test_what_does_not_belong_to_the_images_is_refused(folders, tmp_path, monkeypatch) -> None:
    def refuse(message: str, root: Path = folders[0], packed: Path = folders[1], size: int = SIZE) -> None:
        with pytest.raises(UserError, match=rf"data\.packed: .*{message}"):
            read(root, packed, size)

    refuse("lkd pack", packed=tmp_path)
    refuse("shorter side 32, data.image_size 32 needs 37", size=32)
    more = shutil.copytree(folders[0], tmp_path / "more")
    (more / "train" / "n00000000" / "0.JPEG").rename(more / "train" / "n00000000" / "00.JPEG")
    refuse(r"32 train images that are not the 32 of data\.root", root=more)
    cut = shutil.copytree(folders[1], tmp_path / "cut")
    with (cut / "train.pixels").open("r+b") as file:
        file.truncate(1000)
    refuse(r"train\.pixels", packed=cut)
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    words = ["--data.name", "image_folder", "--data.root", str(folders[0]), "--data.packed", str(tmp_path / "new")]
    assert main(["pack", *words]) == 2
    assert not list((tmp_path / "new").glob("*")), "nothing is left behind"
    assert main(["pack", "--data.packed", str(tmp_path / "new")]) == 2, "images in memory"
