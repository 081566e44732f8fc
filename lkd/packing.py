"""`lkd pack`: all images of a data set, decoded and scaled down once."""

from pathlib import Path

from tqdm import tqdm

from lkd.config import PackRecipe
from lkd.data import LoadingOptions, load_dataset
from lkd.data.image_files import ImageFiles
from lkd.data.packed import pack
from lkd.errors import UserError


def pack_dataset(recipe: PackRecipe) -> list[Path]:
    """Pack the training and the test part of a data set into the folder `data.packed`.

    Returns:
        The index of each part.

    Raises:
        UserError: If a setting or the data set is not good, the images are in memory anyway, or the disk is too small.
    """
    data = recipe.data
    if data.packed is None:
        raise UserError("data.packed: missing; give the folder that the packed images go to")
    if recipe.shorter_side < 8:
        raise UserError(f"shorter_side: {recipe.shorter_side} is not at least 8 pixels")
    dataset = load_dataset(data.name, data.root, LoadingOptions(data.image_size, data.workers, data.damaged_limit))
    indices = []
    for part, images in (("train", dataset.train.images), ("val", dataset.test.images)):
        if not isinstance(images, ImageFiles):
            raise UserError(f"data.name: {data.name} is in memory as it is; only images in files can be packed")
        with tqdm(total=len(images.positions), desc=f"pack {part}", unit="image", disable=None) as bar:
            options = images.workers, images.damage, bar.update
            indices.append(pack(images.source, Path(data.packed), part, recipe.shorter_side, *options))
    return indices
