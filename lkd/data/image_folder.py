"""Image folders of ImageNet's layout: `root/train/CLASS/*.jpg` and `root/val/CLASS/*.jpg`."""

import os
from pathlib import Path

from lkd.data.dataset import Dataset
from lkd.data.image_files import LoadingOptions
from lkd.data.labelled_sources import LabelledSource, build_dataset, check_root, number_classes
from lkd.data.sources import FileSource
from lkd.errors import UserError

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
    root = check_root(root, LAYOUT)
    classes = class_folders(Path(root), "train")
    number_classes(list(class_folders(Path(root), "val")), classes, f"{root}/val")
    parts = [find_images(Path(root) / part, classes) for part in ("train", "val")]
    return build_dataset("image_folder", parts, classes, loading, f"{root} ({', '.join(SUFFIXES)})")


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


def find_images(folder: Path, classes: tuple[str, ...]) -> LabelledSource:
    """List the images of one part, class by class."""
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        entries = os.scandir(folder / name) if (folder / name).is_dir() else ()
        found = sorted(entry.name for entry in entries if entry.name.lower().endswith(SUFFIXES))
        names += [f"{name}/{file}" for file in found]
        labels += [label] * len(found)
    return LabelledSource(FileSource(folder, names), labels)
