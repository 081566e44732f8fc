"""Image folders of ImageNet's layout: `root/train/CLASS/*.jpg` and `root/val/CLASS/*.jpg`."""

from pathlib import Path

import torch

from lkd.data.dataset import Dataset
from lkd.data.image_files import SUFFIXES, ImageFiles
from lkd.data.images import ImageSet
from lkd.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which torchvision's teachers expect
LAYOUT = "train/CLASS/*.jpg and val/CLASS/*.jpg"


def load_image_folder(root: str | None, image_size: int = 224) -> Dataset:
    """Find the images; they are decoded only when a batch needs them.

    Args:
        root: The folder. The classes are the folders in `root/train`, in alphabetical order.
        image_size: Height and width of the crops.

    Raises:
        UserError: If the folder is missing or laid out otherwise.
    """
    if image_size < 8:
        raise UserError(f"data.image_size: {image_size} is not at least 8 pixels")
    if root is None:
        raise UserError(f"data.root: missing; give the folder that holds {LAYOUT}")
    classes = class_folders(Path(root), "train")
    unknown = sorted(set(class_folders(Path(root), "val")) - set(classes))
    if unknown:
        raise UserError(f"data.root: {root}/val/{unknown[0]} is of no class in {root}/train ({len(classes)} classes)")
    return Dataset("image_folder", *(find_images(Path(root) / part, classes, image_size) for part in ("train", "val")))


def class_folders(root: Path, part: str) -> tuple[str, ...]:
    """Names of the folders in `root/part`, sorted.

    Raises:
        UserError: If there is none.
    """
    folder = root / part
    names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir())) if folder.is_dir() else ()
    if not names:
        raise UserError(f"data.root: {str(root)!r} holds no {part}/CLASS/ folders; expected {LAYOUT}")
    return names


def find_images(folder: Path, classes: tuple[str, ...], image_size: int) -> ImageSet:
    """List the images of one part, class by class.

    Raises:
        UserError: If there is none.
    """
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(p for p in (folder / name).glob("*") if p.suffix.lower() in SUFFIXES)
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise UserError(f"data.root: no images ({', '.join(SUFFIXES)}) in {folder}/CLASS/; expected {LAYOUT}")
    files = ImageFiles(tuple(paths), image_size)
    return ImageSet(files, torch.tensor(labels), torch.arange(len(labels)), classes, MEAN, STD)
