"""Image folders of ImageNet's layout: `root/train/CLASS/*.jpg` and `root/val/CLASS/*.jpg`."""

import os
from pathlib import Path

import torch

from lkd.data.dataset import Dataset
from lkd.data.image_files import LoadingOptions, open_source
from lkd.data.images import ImageSet
from lkd.data.sources import FileSource
from lkd.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which torchvision's teachers expect
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
LAYOUT = "train/CLASS/*.jpg and val/CLASS/*.jpg"


def load_image_folder(root: str | None, loading: LoadingOptions) -> Dataset:
    """Find the images; they are decoded only when a batch needs them.

    Args:
        root: The folder. The classes are the folders in `root/train`, in alphabetical order.
        loading: How images are loaded.

    Raises:
        UserError: If the folder is missing or laid out otherwise, or a class has no training images.
    """
    if root is None:
        raise UserError(f"data.root: missing; give the folder that holds {LAYOUT}")
    classes = class_folders(Path(root), "train")
    unknown = sorted(set(class_folders(Path(root), "val")) - set(classes))
    if unknown:
        raise UserError(f"data.root: {root}/val/{unknown[0]} is of no class in {root}/train ({len(classes)} classes)")
    return Dataset("image_folder", *(find_images(Path(root) / part, classes, loading) for part in ("train", "val")))


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


def find_images(folder: Path, classes: tuple[str, ...], loading: LoadingOptions) -> ImageSet:
    """List the images of one part, class by class.

    Raises:
        UserError: If there is none, or none of a class that is to be trained on.
    """
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = list_images(folder / name)
        if not found and folder.name == "train":
            raise UserError(
                f"data.root: {folder / name} holds no images ({', '.join(SUFFIXES)}): fill it, or remove the class"
            )
        names += [f"{name}/{file}" for file in found]
        labels += [label] * len(found)
    if not names:
        raise UserError(f"data.root: no images ({', '.join(SUFFIXES)}) in {folder}/CLASS/; expected {LAYOUT}")
    files = open_source(FileSource(folder, names), loading)
    return ImageSet(files, torch.tensor(labels), torch.arange(len(labels)), classes, MEAN, STD)


def list_images(folder: Path) -> list[str]:
    """Names of the images in a folder, sorted; none if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(folder) if entry.name.lower().endswith(SUFFIXES))
