"""A caller's own images as an image set."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lkd.core.errors import UserError
from lkd.data.image_files import LoadingOptions, to_8_bits
from lkd.data.images import ImageSet, measure
from lkd.data.readers import label_images
from lkd.data.sources import MEAN, STD, LabelledSource, check_class_names, wrap_source

MEMORY_LIMIT = 2**33  # bytes of images that are read into memory
READ_TWICE = 16  # images that are read twice, to find a transform that is random


def read_images(
    source: Any,
    *,
    num_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int | None = None,
    crop_pct: float = 0.875,
    workers: int = 0,
) -> ImageSet:
    """Make images of your own ready for `lkd.distill` and `lkd.meta_train`.

    Args:
        source: Tensors (images [N, C, H, W], labels [N]); or a map-style dataset of (image, label), an image being a
            tensor [C, H, W] or a Pillow image, all of one shape. A dataset is read once, into memory (at most 8 GiB),
            so its transform must not be random: augmentation is an option of the training. With `image_size` a
            torchvision dataset of Pillow images stays where it is, and is decoded as batches need it.
        num_classes: The number of classes; by default 1 + the largest label.
        mean: For each channel. uint8 images are normalised with `mean` and `std`, of pixels scaled to [0, 1]; by
            default those of the images themselves. Floating-point images are given to student and teacher as they are:
            `mean` and `std`, by default 0 and 1, then say what they were normalised with, which only a network asks
            that has a normalisation of its own: one of a file, or of timm's pretrained weights.
        std: Standard deviation for each channel.
        image_size: Height and width of the crops to cut.
        crop_pct: With `image_size`, the crops' share of the shorter side; 1 for pictures that are small.
        workers: With `image_size`, threads that decode; 0 for one for each CPU core.

    Raises:
        UserError: If the images or the labels are not like that.
    """
    if (mean is None) != (std is None):
        raise UserError("read_images: mean and std go together: give both, or neither")
    if not 0 < crop_pct <= 1:
        raise UserError(f"read_images: crop_pct {crop_pct} is not in (0, 1]")
    if image_size is not None:
        part = label_in_place(source)
        classes = name_classes(source, torch.tensor(part.labels), num_classes)
        opened = wrap_source("train", part, classes, LoadingOptions(image_size, workers, crop_pct=crop_pct))
        return replace(opened, mean=tuple(mean or MEAN), std=tuple(std or STD))
    is_pair = isinstance(source, tuple | list) and len(source) == 2 and all(isinstance(part, Tensor) for part in source)
    images, labels = check_tensors(*(source if is_pair else read_dataset(source)))
    if mean is None or std is None:
        mean, std = measure(images)
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != images.shape[1]:
            raise UserError(f"read_images: {name} has {len(values)} values, the images have {images.shape[1]} channels")
    if min(std) <= 0:
        raise UserError(f"read_images: std {list(std)} is not positive; a channel that is constant needs one given")
    classes = name_classes(source, labels, num_classes)
    return ImageSet(images, labels, torch.arange(len(labels)), classes, tuple(mean), tuple(std))


def check_tensors(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Check images and labels: uint8 or float32, and int64, on the CPU."""
    if images.ndim != 4 or not len(images) or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise UserError(
            f"read_images: images are {images.dtype}, {list(images.shape)}; give uint8 or float32, [N, C, H, W]"
        )
    if labels.shape != images.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise UserError(
            f"read_images: labels are {labels.dtype}, {list(labels.shape)}; give class indices, [{len(images)}]"
        )
    if int(labels.min()) < 0:
        raise UserError(f"read_images: a label is {int(labels.min())}; classes are counted from 0")
    images = images.detach().cpu()
    return images.float() if images.is_floating_point() else images, labels.detach().cpu().long()


def read_dataset(dataset: Any) -> tuple[Tensor, Tensor]:
    """Read a dataset's images and labels into memory."""
    kind = type(dataset).__name__
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")) or not len(dataset):
        raise UserError(
            f"read_images: a {kind} is neither (images, labels) nor a map-style dataset with a length and items"
        )
    count, (first, _) = len(dataset), read_item(dataset, 0)
    size = count * first.numel() * first.element_size()
    if size > MEMORY_LIMIT:
        raise UserError(
            f"read_images: the {count:,} images of this {kind} take {size / 2**30:.1f} GiB of memory, more than "
            f"{MEMORY_LIMIT / 2**30:.0f}: give image_size, or name a data set and its root (docs/data.md)"
        )
    images, labels = first.new_empty(count, *first.shape), torch.empty(count, dtype=torch.int64)
    for position in range(count):
        image, labels[position] = read_item(dataset, position)
        if image.shape != first.shape or image.dtype != first.dtype:
            raise UserError(
                f"read_images: image {position} of this {kind} is {image.dtype}, {list(image.shape)}, the first one "
                f"{first.dtype}, {list(first.shape)}: make them alike in its transform, or give image_size"
            )
        images[position] = image
    for position in range(min(READ_TWICE, count)):
        if not torch.equal(read_item(dataset, position)[0], images[position]):
            raise UserError(
                f"read_images: image {position} of this {kind} is another at a second reading: its transform is "
                "random, and reading it once would freeze it; take that part out, and give augmentation=flip_and_crop"
            )
    return images, labels


def read_item(dataset: Any, position: int) -> tuple[Tensor, int]:
    """An image, [C, H, W], and its label."""
    item = dataset[position]
    if not isinstance(item, tuple | list) or len(item) != 2:
        kinds = type(dataset).__name__, type(item).__name__
        raise UserError(f"read_images: item {position} of this {kinds[0]} is a {kinds[1]}, not (image, label)")
    image, label = item
    if not isinstance(image, Tensor):
        try:
            pixels = torch.from_numpy(np.array(image if getattr(image, "mode", "F") == "F" else to_8_bits(image)))
        except ValueError as error:
            raise UserError(f"read_images: image {position}: {error}") from error
        image = pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.movedim(-1, 0)
    try:
        return image, int(label)
    except (TypeError, ValueError) as error:
        raise UserError(f"read_images: label {position} is {label!r}, not a class index") from error


def label_in_place(dataset: Any) -> LabelledSource:
    """The images of a dataset, decoded when they are needed, and their labels."""
    kind = type(dataset).__name__
    if getattr(dataset, "transform", None) is not None or getattr(dataset, "target_transform", None) is not None:
        raise UserError(
            f"read_images: with image_size the images are cut and augmented by options of the training; the transform "
            f"of this {kind} would not be used: leave it out"
        )
    try:
        return label_images(dataset, kind)
    except (TypeError, ValueError) as error:
        raise UserError(f"read_images: with image_size labels are needed beforehand, but {error}") from error


def name_classes(source: Any, labels: Tensor, num_classes: int | None) -> tuple[str, ...]:
    """The classes' names: the dataset's own, as far as it names them, or else numbers."""
    least, largest = int(labels.min()), int(labels.max())
    names = tuple(str(name) for name in getattr(source, "classes", ()))
    check_class_names(names, "read_images")
    if least and num_classes is None and (not names or largest >= len(names)):
        raise UserError(
            f"read_images: labels go from {least} to {largest}, so class 0 would be empty: count from 0 (labels - "
            f"{least}), or give num_classes={largest + 1} if classes without images are meant"
        )
    count = num_classes or max(len(names), largest + 1)
    if largest >= count or count < 2:
        raise UserError(f"read_images: label {largest} is none of {count} classes; at least 2 are needed")
    return names[:count] + tuple(str(number) for number in range(len(names), count))
