"""Which images a plan is for: those of the recipe if they are there, else what is known of the data set."""

import time
from typing import NamedTuple

import torch

from lkd.assembly import Images, prepare_images
from lkd.config import DataRecipe
from lkd.data import ImageSet, seeded_generator
from lkd.data.crops import CROP_NUMBERS, cut_random
from lkd.data.image_files import ImageFiles
from lkd.data.loading import Loading
from lkd.errors import UserError

IMAGENET_FILE_BYTES = 147_897_477_120 / 1_281_167  # ILSVRC2012_img_train.tar over its images
KNOWN = {"image_folder": (1_281_167, 1000, 3, 0), "cifar10": (50_000, 10, 3, 32), "cifar100": (50_000, 100, 3, 32)}
KNOWN |= dict.fromkeys(("fashion_mnist", "fashion_mnist_unseen", "fashion_mnist_rest"), (60000, 10, 1, 28))


class PlannedImages(NamedTuple):
    """Images without pixels.

    Attributes:
        stand_in: What networks and losses are built for: shapes and classes, no images.
        train_size: Training images.
        source: Where the counts come from.
        files: The training images' files, if they are decoded and there.
        decoded: Whether each image is decoded when a batch needs it.
        file_bytes: Mean size of a file, or of an image in memory.
    """

    stand_in: Images
    train_size: int
    source: str
    files: ImageFiles | None
    decoded: bool
    file_bytes: float


def plan_images(recipe: DataRecipe) -> PlannedImages:
    """Count the images of a recipe.

    Raises:
        UserError: If the data set is named with a root and is not good, or is neither there nor known.
    """
    if recipe.root is None and recipe.name != "embedded":
        if recipe.name not in KNOWN:
            raise UserError(f"data.root: missing; without it only {', '.join(KNOWN)} can be planned, not {recipe.name}")
        count, classes, channels, pixels = KNOWN[recipe.name]
        pixels = pixels or recipe.image_size
        train_size = recipe.train_size or count - recipe.meta_validation_size
        decoded = recipe.name == "image_folder"
        source = "ImageNet-1k's" if decoded else f"{recipe.name}'s"
        size = IMAGENET_FILE_BYTES if decoded else channels * pixels**2
        return PlannedImages(
            stand_in(recipe.name, classes, (channels, pixels, pixels)), train_size, source, None, decoded, size
        )
    images = prepare_images(recipe)
    train = images.train
    files = train.images if isinstance(train.images, ImageFiles) else None
    shape = train.image_shape
    size = measure_files(files) if files else float(torch.tensor(shape).prod())
    source = f"of {recipe.root or 'the package'}"
    return PlannedImages(
        stand_in(images.name, train.num_classes, shape), len(train), source, files, files is not None, size
    )


def measure_files(files: ImageFiles, sample: int = 1000) -> float:
    """Mean size of the files, by a sample of them, bytes."""
    chosen = files.positions[:: max(1, len(files.positions) // sample)].tolist()
    sizes = [files.source.size(position) for position in chosen]
    return sum(sizes) / len(sizes)


def measure_decoding(files: ImageFiles, sample: int = 64) -> float:
    """Images that one core decodes and crops a second, by a sample of them."""
    slots = torch.arange(0, len(files.positions), max(1, len(files.positions) // sample))
    numbers = torch.rand(len(files.positions), CROP_NUMBERS, generator=seeded_generator(0), dtype=torch.float64)
    started = time.process_time()
    cut = lambda image, slot: cut_random(image, files.size, numbers[slot])  # noqa: E731
    Loading(files, slots, cut, replace=True, pin=False).wait()
    return len(slots) / (time.process_time() - started)


def stand_in(name: str, classes: int, shape: tuple[int, int, int]) -> Images:
    """A data set of no images."""
    names = tuple(str(number) for number in range(classes))
    nothing = torch.zeros(0, dtype=torch.int64)
    mean = (0.5,) * shape[0]
    part = ImageSet(torch.zeros(0, *shape, dtype=torch.uint8), nothing, nothing, names, mean, mean)
    return Images(name, part, part, part, "")
