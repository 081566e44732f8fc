"""From two sources with labels to a data set, checked."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from lkd.data.dataset import Dataset
from lkd.data.image_files import LoadingOptions, open_source
from lkd.data.images import ImageSet
from lkd.data.packed import open_packed
from lkd.data.sources import ImageSource
from lkd.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which torchvision's teachers expect


class LabelledSource(NamedTuple):
    """A source, and the class of each of its images."""

    source: ImageSource
    labels: list[int]


def build_dataset(
    name: str,
    parts: Sequence[LabelledSource],
    classes: tuple[str, ...],
    loading: LoadingOptions,
    place: str,
) -> Dataset:
    """Build a data set.

    Args:
        name: Its name.
        parts: The training and the test images.
        classes: The classes' names.
        loading: How images are loaded.
        place: Where the images lie, for messages.

    Raises:
        UserError: If a part has no images, or a class has none to train on.
    """
    for part, labelled in zip(("training", "validation"), parts, strict=True):
        if not labelled.labels:
            raise UserError(f"data.root: {place} holds no {part} images")
    counts = torch.bincount(torch.tensor(parts[0].labels), minlength=len(classes))
    empty = [classes[label] for label in (counts == 0).nonzero().flatten().tolist()]
    if empty:
        named = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        raise UserError(
            f"data.root: {len(empty)} of the {len(classes)} classes have no training images in {place} ({named}): "
            "add some, or remove the classes"
        )
    return Dataset(name, *(wrap_source(*part, classes, loading) for part in zip(("train", "val"), parts, strict=True)))


def wrap_source(part: str, labelled: LabelledSource, classes: tuple[str, ...], loading: LoadingOptions) -> ImageSet:
    """All images of a source as an image set.

    Raises:
        UserError: If they are to be packed ones, and these are not there or of other images.
    """
    source, labels = labelled.source, torch.tensor(labelled.labels)
    if loading.packed:
        source = open_packed(source, Path(loading.packed), part, loading.image_size)
    return ImageSet(open_source(source, loading), labels, torch.arange(len(labels)), classes, MEAN, STD)


def number_classes(names: list[str], classes: tuple[str, ...], place: str) -> list[int]:
    """The label of each class name.

    Raises:
        UserError: If a name is none of the classes.
    """
    labels = {name: label for label, name in enumerate(classes)}
    for name in names:
        if name not in labels:
            raise UserError(f"data.root: {place}: {name!r} is none of the {len(classes)} classes that are trained on")
    return [labels[name] for name in names]


def check_root(root: str | None, layout: str) -> str:
    """The folder of a data set.

    Raises:
        UserError: If it is missing, or not on a file system.
    """
    if root is None:
        raise UserError(f"data.root: missing; give the folder that holds {layout}")
    if "://" in root or root.startswith("pipe:"):
        raise UserError(
            f"data.root: {root} is a stream, in which a training cannot be resumed to the bit; copy it to a disk, or "
            "mount it, and give the folder"
        )
    return root
