"""Images and networks of a caller's own."""

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

import lkd
from lkd.api import name_images
from lkd.config import DataRecipe
from lkd.data.arrays import read_images
from lkd.data.image_files import ImageFiles
from lkd.models.build import adapt_given
from lkd.models.small import SMALL_NETWORKS
from lkd.training.build import prepare_images

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 6, 5, 3), dtype=np.uint8)


class Pictures(Dataset):
    """A data set as torchvision has them."""

    def __init__(self, transform=None, target=lambda position: position % 3) -> None:
        self.transform, self.target = transform, target

    def __len__(self) -> int:
        return len(PIXELS)

    def __getitem__(self, position: int):
        image = Image.fromarray(PIXELS[position])
        return (self.transform(image) if self.transform else image), self.target(position)


def test_a_dataset_of_pictures_is_read_as_it_is() -> None:
    images = read_images(Pictures(), num_classes=4)
    assert torch.equal(images.images, torch.from_numpy(PIXELS).permute(0, 3, 1, 2))
    assert images.labels.tolist() == [position % 3 for position in range(30)]
    assert (images.num_classes, images.class_names, images.image_shape) == (4, ("0", "1", "2", "3"), (3, 6, 5))
    normal = images.normalize(images.images)
    torch.testing.assert_close(normal.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(normal.std((0, 2, 3), correction=0), torch.ones(3))


def test_floating_point_images_reach_the_networks_as_they_are() -> None:
    pixels, labels = torch.randn(20, 1, 4, 4, dtype=torch.float64), torch.arange(20) % 2
    images = read_images((pixels, labels))
    batch = images.batch(torch.tensor([3, 1]), torch.device("cpu"))
    assert torch.equal(batch.images, pixels[[3, 1]].float())
    assert (images.mean, images.std) == ((0.0,), (1.0,))


def test_pictures_of_a_torchvision_dataset_stay_where_they_are() -> None:
    pictures = Pictures()
    pictures.targets, pictures.classes = [p % 3 for p in range(30)], ["a", "b", "c"]
    images = read_images(pictures, image_size=8, workers=1)
    assert isinstance(images.images, ImageFiles)
    assert images.class_names == ("a", "b", "c")
    assert images.batch(torch.arange(4), torch.device("cpu")).images.shape == (4, 3, 8, 8)
    with pytest.raises(lkd.UserError, match="has no `targets`"):
        read_images(Pictures(), image_size=8)
    pictures.transform = lambda image: image
    with pytest.raises(lkd.UserError, match="would not be used: leave it out"):
        read_images(pictures, image_size=8)


def shift_at_random(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.roll(np.asarray(image), int(torch.randint(6, ())), 0)).movedim(-1, 0)


def crop_some(image: Image.Image) -> Image.Image:
    return image.resize((3, 3)) if image.getpixel((0, 0))[0] > 128 else image


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (Pictures(shift_at_random), {}, "its transform is random"),
        (Pictures(crop_some), {}, "make them alike"),
        (Pictures(target=lambda position: "cat"), {}, "label 0 is 'cat'"),
        (Pictures(), {"num_classes": 2}, "label 2 is none of 2 classes"),
        (Pictures(), {"mean": (0.5,), "std": (0.5,)}, "mean has 1 values"),
        (Pictures(), {"mean": (0.5,)}, "mean and std"),
        ([1, 2, 3], {}, "item 0"),
        (iter([]), {}, "neither"),
        ((torch.zeros(4, 3, 3), torch.zeros(4)), {}, "images are torch.float32"),
        ((torch.zeros(4, 1, 3, 3), torch.zeros(4)), {}, "labels are torch.float32"),
        ((torch.zeros(4, 1, 3, 3), torch.zeros(3).long()), {}, r"labels are torch.int64, \[3\]"),
        ((torch.zeros(2, 1, 3, 3), torch.tensor([0, -1])), {}, "a label is -1"),
        ((torch.zeros(2, 1, 3, 3).byte(), torch.tensor([0, 1])), {}, "is not positive"),
    ],
)
def test_images_that_cannot_be_used_are_refused_in_one_line(source, options: dict, message: str) -> None:
    with pytest.raises(lkd.UserError, match=message) as caught:
        read_images(source, **options)
    assert "\n" not in str(caught.value)


def test_too_large_a_dataset_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lkd.data.arrays.MEMORY_LIMIT", 30 * 6 * 5 * 3 - 1)
    with pytest.raises(lkd.UserError, match=r"take 0.0 GiB of memory, more than 0: give image_size"):
        read_images(Pictures())


def test_a_split_is_known_by_the_images_in_it() -> None:
    images, other = read_images(Pictures()), read_images(Pictures(target=lambda position: position % 2))
    fields, given = {"train_size": 0, "meta_validation_size": 6}, {}
    first, same, another = (
        prepare_images(name_images(each, None, DataRecipe(), fields, given), given) for each in (images, images, other)
    )
    assert first.name == same.name != another.name
    assert first.fingerprint == same.fingerprint != another.fingerprint
    apart = prepare_images(name_images(images, images, DataRecipe(), {}, given), given)
    assert not set(apart.train.index.tolist()) & set(apart.meta_validation.index.tolist())


def test_networks_of_other_libraries_are_read() -> None:
    shape = (1, 28, 28)
    own = SMALL_NETWORKS["small_cnn"](10, 1)
    assert adapt_given(own, "student", 10, shape) is own
    answering = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    answering.forward = lambda images, layers=list(answering): SimpleNamespace(logits=layers[1](layers[0](images)))
    batch = torch.randn(3, *shape)
    adapted = adapt_given(answering, "student", 10, shape)
    assert torch.equal(adapted(batch).logits, answering(batch).logits)
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1).eval()
    outputs = adapt_given(model, "teacher", 10, shape)(batch)
    torch.testing.assert_close(outputs.logits, model(batch))
    assert len(outputs.features) > 1, "timm's stages are features"
