"""What users of other projects ran into without a word: each is right here, or one line says what is wrong."""

import pytest

from lkd.config import DataRecipe
from lkd.training.build import prepare_images
from tests.lkd.tiny_images import write_image_folder


@pytest.mark.outside(11)
@pytest.mark.parametrize("name", ["embedded", "image_folder"])
def test_all_images_are_trained_on_by_default(name: str, tmp_path) -> None:
    root = write_image_folder(tmp_path, classes=4, train=10) if name == "image_folder" else None
    images = prepare_images(DataRecipe(name, root, image_size=24))
    count = {"embedded": 12_000, "image_folder": 40}[name]
    assert (len(images.train), len(images.meta_validation)) == (count * 9 // 10, count // 10)
